import json
import shutil
from pathlib import Path

import pytest

from semvid.runtime.config import VideoConfig
from semvid.runtime.models import folder as folders
from semvid.runtime.settings import DEMO_MODEL


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo model that a test may damage."""
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def rewrite(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_demo_model_is_whole_and_knows_its_tokens() -> None:
    geometry = folders.inspect(DEMO_MODEL)
    assert (geometry.heads, geometry.layers) == (4, 10)
    sizes = {(33, 160, 288): 1620, (33, 256, 448): 4032, (81, 480, 832): 32_760, (81, 720, 1280): 75_600}
    for (frames, height, width), tokens in sizes.items():
        assert geometry.tokens(VideoConfig(frames=frames, height=height, width=width)) == tokens


def test_the_demo_model_brings_its_defaults() -> None:
    assert folders.defaults(folders.locate("demo"))["video"]["frames"] == 33


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"frames": 32}, "frames is 32; accepted: 4k [+] 1, nearest 29 and 33"),
        ({"frames": 2}, "frames is 2; accepted: 4k [+] 1, nearest 1 and 5"),
        ({"height": 168}, "height is 168; accepted: a multiple of 16, nearest 160 and 176"),
        ({"width": 9}, "width is 9; accepted: a multiple of 16, nearest 16"),
    ],
)
def test_a_size_the_model_cannot_make_is_refused_with_the_nearest(size: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folders.check_size(VideoConfig(**size), folders.inspect(DEMO_MODEL))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which has no model_index.json"):
        folders.inspect(tmp_path)
    with pytest.raises(ValueError, match="which is no folder"):
        folders.inspect(tmp_path / "absent")


@pytest.mark.parametrize(
    ("index", "found"),
    [
        ({"_class_name": "FluxPipeline"}, "a FluxPipeline"),
        ({"_class_name": None}, "of an unnamed family"),
        ({"_class_name": "HunyuanVideo15Pipeline"}, "a HunyuanVideo-1.5 model"),
        ({"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9}, "a Wan 2.2 image-to-video model"),
    ],
)
def test_an_unsupported_family_is_refused_with_those_that_are(
    checkpoint: Path, index: dict[str, object], found: str
) -> None:
    rewrite(checkpoint / "model_index.json", **index)
    with pytest.raises(ValueError, match=f"{found}; supported: Wan 2.1 text-to-video"):
        folders.inspect(checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_safetensors_file_is_refused(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated file: .*vae"):
        folders.inspect(checkpoint)


def test_a_damaged_safetensors_header_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"#" + content[9:])
    with pytest.raises(ValueError, match="damaged file: .*vae"):
        folders.inspect(checkpoint)


def test_a_missing_shard_or_folder_is_refused(checkpoint: Path) -> None:
    shard = checkpoint / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(ValueError, match="lacks the file .*00002-of-00002"):
        folders.inspect(checkpoint)
    shutil.rmtree(checkpoint / "vae")
    with pytest.raises(ValueError, match="lacks the f"):
        folders.inspect(checkpoint)


def test_weights_in_another_format_are_not_read(checkpoint: Path) -> None:
    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ValueError, match="no safetensors file in .*vae"):
        folders.inspect(checkpoint)


def test_an_unreadable_index_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read as JSON"):
        folders.inspect(checkpoint)


def test_defaults_other_than_video_are_refused(checkpoint: Path) -> None:
    (checkpoint / "semvid.toml").write_text("[attention]\np = 0.5\n")
    with pytest.raises(ValueError, match="holds 'attention'"):
        folders.defaults(checkpoint)


def test_a_picture_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    Image.linear_gradient("L").save(whole)
    folders.check_image(whole)
    cut.write_bytes(whole.read_bytes()[:-95])
    with pytest.raises(ValueError, match="image is .*cut.jpg': no picture that can be read; accepted: a PNG, JPEG"):
        folders.check_image(cut)
