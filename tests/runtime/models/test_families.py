"""Every model family: through our loop, with everything selected, and against diffusers' own pipeline."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from semvid.runtime import load_pipeline, sparsify
from semvid.runtime.config import AttentionConfig, Config, VideoConfig
from semvid.runtime.jobs import denoise
from semvid.runtime.models import folder
from semvid.runtime.settings import resolve

Make = Callable[..., Config]
Stock = Callable[[Any, VideoConfig], Tensor]
NAMES = ["wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b", "hunyuanvideo"]
EXACT = {"p": 1.0, "dense_steps": 0.0, "dense_layers": 0}
TAIL = {"tail": "second", "selection": "error", "floor": 0.0, "seeding": "spread", "share_branches": "yes"}


def load(config: Config) -> Any:
    folder.check(config, folder.inspect(Path(config.model.path)))
    return load_pipeline(Path(config.model.path), config.model)


def run(pipeline: Any, config: Config) -> tuple[Tensor, Any, Any]:
    """Our loop: latents, density, the finished state."""
    handle = sparsify(pipeline, attention=config.attention, seed=config.video.seed)
    state = denoise.start(pipeline, config.video)
    for _ in denoise.steps(pipeline, state):
        pass
    found = state.family.result(state.latents, state.condition), handle.density(), state
    handle.remove()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_everything_selected_equals_the_stock_pipeline(name: str, family_config: Make, stock: Stock) -> None:
    config = family_config(name, EXACT)
    pipeline = load(config)
    expected = stock(pipeline, config.video)
    latents, density, _ = run(pipeline, config)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    branches = 1 if name == "hunyuanvideo" else 2
    layers = 4 if name == "hunyuanvideo" else 3
    assert (density.sparse_calls, density.dense_calls, density.sparse) == (4 * layers * branches, 0, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_with_dense_attention_equals_the_stock_pipeline(name: str, family_config: Make, stock: Stock) -> None:
    config = family_config(name, {"method": "dense"})
    pipeline = load(config)
    expected = stock(pipeline, config.video)
    latents, density, state = run(pipeline, config)
    if name == "hunyuanvideo":
        # Its dense calls leave the padding out, where diffusers masks it.
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(latents, expected)
    assert density.sparse_calls == 0
    frames = denoise.decode(pipeline, state)
    assert frames.shape == (config.video.frames, config.video.height, config.video.width, 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_stock_call_of_a_sparsified_pipeline_is_sparse(name: str, family_config: Make, stock: Stock) -> None:
    config = family_config(name, {"p": 0.5})
    pipeline = load(config)
    plain = stock(pipeline, config.video)
    handle = sparsify(pipeline, attention=config.attention)
    changed = stock(pipeline, config.video)
    assert 0 < handle.density().sparse < 1
    assert not torch.equal(changed, plain)
    ours, _, _ = run_again(pipeline, handle, config)
    torch.testing.assert_close(ours, changed, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert torch.equal(stock(pipeline, config.video), plain)


@pytest.mark.parametrize("name", ["hunyuanvideo", "wan2.1-i2v-14b"])
def test_a_scheduler_put_in_place_of_another_says_the_step(name: str, family_config: Make, stock: Stock) -> None:
    config = family_config(name, {"p": 0.5})
    pipeline = load(config)
    handle = sparsify(pipeline, attention=config.attention)
    stock(pipeline, config.video)
    expected = handle.density()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    stock(pipeline, config.video)
    assert expected.sparse_calls > 0
    assert handle.density() == expected


def run_again(pipeline: Any, handle: Any, config: Config) -> tuple[Tensor, Any, Any]:
    handle.remove()
    return run(pipeline, config)


def test_with_a_tail_too_everything_selected_equals_the_stock_pipeline(family_config: Make, stock: Stock) -> None:
    config = family_config("hunyuanvideo", EXACT | TAIL)
    pipeline = load(config)
    latents, density, _ = run(pipeline, config)
    torch.testing.assert_close(latents, stock(pipeline, config.video), rtol=1e-4, atol=1e-4)
    assert density.sparse == 1.0


@pytest.mark.parametrize("preset", ["quality", "balanced", "turbo"])
def test_a_preset_leaves_anchors_out_where_text_is_in_the_sequence(family_config: Make, preset: str) -> None:
    settings = resolve(None, {"video": {"prompt": "-"}}, preset=preset).attention
    config = family_config("hunyuanvideo")
    auto, no = (
        dataclasses.replace(config, attention=dataclasses.replace(settings, anchors=anchors, dense_steps=0.0))
        for anchors in ("auto", "no")
    )
    pipeline = load(auto)
    (found, density, _), (expected, without, _) = run(pipeline, auto), run(pipeline, no)
    assert torch.equal(found, expected)
    assert 0 < density.sparse < 1
    assert density == without


def test_anchors_by_auto_are_those_of_yes_in_a_sequence_of_video(family_config: Make) -> None:
    found = {}
    for anchors in ("auto", "yes", "no"):
        config = family_config("wan2.1-t2v-1.3b", TAIL | {"p": 0.5, "anchors": anchors})
        found[anchors] = run(load(config), config)[0]
    assert torch.equal(found["auto"], found["yes"])
    assert not torch.allclose(found["auto"], found["no"])


def test_anchors_that_are_insisted_on_are_refused_where_text_is_in_the_sequence(family_config: Make) -> None:
    config = family_config("hunyuanvideo", {"anchors": "yes"})
    message = "attention.anchors is 'yes', which HunyuanVideo .* has not; accepted: no, or auto"
    with pytest.raises(ValueError, match=message):
        load(config)
    pipeline = load(family_config("hunyuanvideo"))
    with pytest.raises(ValueError, match=message):
        sparsify(pipeline, attention=config.attention)


def test_an_image_changes_the_video_and_is_needed(family_config: Make, image: Path, tmp_path: Path) -> None:
    from PIL import Image

    config = family_config("wan2.1-i2v-14b", {"p": 0.9})
    pipeline = load(config)
    first, _, _ = run(pipeline, config)
    other = tmp_path / "other.png"
    Image.open(image).rotate(90).save(other)
    second, _, _ = run(pipeline, family_config("wan2.1-i2v-14b", {"p": 0.9}, image=str(other)))
    assert not torch.allclose(first, second, atol=1e-2)
    with pytest.raises(ValueError, match="image is None; accepted: --image FILE"):
        load(family_config("wan2.1-i2v-14b", image=None))


def test_the_small_model_begins_with_an_image_where_there_is_one(
    family_config: Make, image: Path, stock: Stock
) -> None:
    from diffusers import WanImageToVideoPipeline

    config = family_config("wan2.2-ti2v-5b", EXACT, image=str(image), height=96, width=96)
    pipeline = load(config)
    parts = {name: part for name, part in pipeline.components.items() if name != "transformer_2"}
    expected = stock(WanImageToVideoPipeline(**parts, expand_timesteps=True), config.video)
    latents, _, state = run(pipeline, config)
    # The stock one resizes by another filter.
    torch.testing.assert_close(latents[:, :, 0], state.condition[:, :, 0])
    assert (latents[:, :, 1:] - expected[:, :, 1:]).abs().max() < 0.05
    text, _, _ = run(pipeline, family_config("wan2.2-ti2v-5b", EXACT, height=96, width=96))
    assert not torch.allclose(text, latents, atol=1e-2)


def test_each_of_two_transformers_has_its_turn_and_its_state(family_config: Make) -> None:
    config = family_config("wan2.2-t2v-a14b", {"p": 0.7, "dense_steps": 0.0}, boundary=0.5, steps=6)
    pipeline = load(config)
    handle = sparsify(pipeline, attention=config.attention)
    state = denoise.start(pipeline, config.video)
    assert sorted(set(state.stages)) == [0, 1]
    seen = []
    for step in denoise.steps(pipeline, state):
        seen.append({branch for _, branch in handle.session.cache.memories})
        assert seen[-1] == [{"cond", "uncond"}, {"cond-2", "uncond-2"}][state.stages[step]]
    # 3 layers, of which the first is dense in each transformer.
    assert (handle.density().sparse_calls, handle.density().dense_calls) == (6 * 2 * 2, 6 * 2)
    low, _, _ = run(load(config), family_config("wan2.2-t2v-a14b", {"p": 0.7}, boundary=0.0))
    high, _, _ = run(load(config), family_config("wan2.2-t2v-a14b", {"p": 0.7}, boundary=1.0))
    assert not torch.allclose(low, high)


def test_branches_of_each_transformer_share_what_its_conditional_one_finds(family_config: Make) -> None:
    attention = TAIL | {"p": 0.5, "dense_steps": 0.0, "refresh": "growing"}
    config = family_config("wan2.2-t2v-a14b", attention, boundary=0.5, steps=6)
    pipeline = load(config)
    handle = sparsify(pipeline, attention=config.attention)
    state = denoise.start(pipeline, config.video)
    for step in denoise.steps(pipeline, state):
        assert {branch for _, branch in handle.session.cache.memories} == {("cond", "cond-2")[state.stages[step]]}
    assert 0 < handle.density().sparse < 1


def test_guidance_of_the_second_transformer_holds_from_the_boundary_on(family_config: Make) -> None:
    made = [
        run(load(config), config)[0]
        for config in (family_config("wan2.2-t2v-a14b", EXACT, guidance_2=scale) for scale in (None, 4.0, 1.5))
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2])


@pytest.mark.parametrize(
    ("name", "video", "message"),
    [
        ("wan2.1-t2v-1.3b", {"image": "x.png"}, "image is 'x.png', but Wan 2.1 text-to-video begins with none"),
        ("wan2.1-i2v-14b", {"image": "absent.png"}, "image is 'absent.png': no such file"),
        ("wan2.1-t2v-1.3b", {"guidance_2": 3.0}, "guidance_2 is 3.0, but the model is .* one transformer"),
        ("hunyuanvideo", {"boundary": 0.5}, "boundary is 0.5, but the model is .* one transformer"),
        ("hunyuanvideo", {"negative_prompt": "blur"}, "negative_prompt is 'blur', but .* no unconditional branch"),
    ],
)
def test_what_a_family_has_not_is_refused(name: str, video: dict[str, Any], message: str, family_config: Make) -> None:
    with pytest.raises(ValueError, match=message):
        load(family_config(name, **video))


def test_a_picture_that_is_none_is_refused(family_config: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(ValueError, match="no picture that can be read; accepted: a PNG, JPEG or WebP file"):
        load(family_config("wan2.1-i2v-14b", image=str(text)))


@pytest.mark.parametrize(
    ("name", "part"),
    [("wan2.1-i2v-14b", "image_encoder"), ("wan2.2-t2v-a14b", "transformer_2"), ("hunyuanvideo", "text_encoder_2")],
)
def test_a_missing_part_is_refused_by_name_before_loading(
    name: str, part: str, family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(family_model(name), tmp_path / "model"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {part: [None, None]}))
    with pytest.raises(ValueError, match=f"without '{part}', which it needs"):
        folder.inspect(copy)
    (copy / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(copy / part)
    with pytest.raises(ValueError, match=f"lacks the folder .*{part}"):
        folder.inspect(copy)


def test_a_transformer_of_another_family_is_refused(family_model: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(family_model("hunyuanvideo"), tmp_path / "model"))
    index = json.loads((copy / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "WanTransformer3DModel"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="'transformer' is a WanTransformer3DModel; HunyuanVideo text-to-video has a H"
    ):
        folder.inspect(copy)


def test_prompts_of_a_batch_must_have_one_length(family_config: Make) -> None:
    config = family_config("hunyuanvideo")
    pipeline = load(config)
    sparsify(pipeline, attention=AttentionConfig(p=1.0))
    with pytest.raises(ValueError, match="accepted: prompts of one length"):
        pipeline(["a red ball", "a very much longer prompt of a blue sky"], height=80, width=80, num_frames=5)
