"""Fixtures for every test. Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read by torch's OpenMP when it loads: waiting threads soon sleep, or tests beside other work take far longer.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# As the commands set it.
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from semvid.parallel.ranks import join
from semvid.runtime.config import Config
from semvid.runtime.settings import DEMO_MODEL, resolve

if TYPE_CHECKING:
    from semvid.runtime.models.published import Published

if not torch.cuda.is_available():
    # Read by triton at import, so before any test imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# 45 or 75 tokens: neither two nor three ranks share them alike.
SIZES: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {"height": 80, "width": 80, "frames": 9, "guidance": 3.0},
    "wan2.1-i2v-14b": {"height": 80, "width": 80, "frames": 9, "guidance": 3.0},
    "wan2.2-t2v-a14b": {"height": 80, "width": 80, "frames": 9, "guidance": 4.0, "guidance_2": 2.0},
    "wan2.2-ti2v-5b": {"height": 96, "width": 160, "frames": 9, "guidance": 3.0},
    "hunyuanvideo": {"height": 80, "width": 80, "frames": 9, "guidance": 6.0},
}
SETTINGS = {"query_clusters": 6, "key_clusters": 9, "first_iterations": 5, "dense_steps": 0.25}

torch.set_num_threads(min(2, torch.get_num_threads()))

# torch.device as a context notes at its first use what makes tensors: that must be before a test replaces torch.empty,
# or a model "on the meta device" would be made in memory.
with torch.device("meta"):
    torch.empty(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what needs more GPUs than there are, and what is slow unless it is asked for, and says so."""
    num_gpus = torch.cuda.device_count()
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow; run with pytest -m slow"))
        if "multigpu" in item.keywords and num_gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two or more NVIDIA GPUs; there are {num_gpus}"))
        elif "gpu" in item.keywords and num_gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; there is none"))


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU (in the interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a random 3-layer Wan transformer with the demo model's other parts."""
    from diffusers import WanTransformer3DModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("transformer", "semvid.toml"))
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "text_dim": 128}
    WanTransformer3DModel(**sizes).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def tiny_config(tiny_model: Path) -> Callable[..., Config]:
    """Makes configurations of a 120-token job with the tiny model, from the preset, [video] and [attention]."""

    def make(preset: str = "svg2", attention: dict[str, Any] | None = None, **video: Any) -> Config:
        size = {"height": 64, "width": 96, "frames": 17, "steps": 4, "guidance": 3.0, "prompt": "a red ball"}
        model = {"path": str(tiny_model), "dtype": "fp32"}
        return resolve(None, {"model": model, "video": size | video, "attention": attention or {}}, preset=preset)

    return make


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 80 × 80 pixels."""
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "gradient.png"
    Image.linear_gradient("L").resize((80, 80)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the tiny checkpoint of a published model, once."""
    from semvid.runtime.models import published

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            model = published.read(name)
            (_hunyuan if name == "hunyuanvideo" else _wan)(model).save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture
def family_config(family_model: Callable[[str], Path], image: Path) -> Callable[..., Config]:
    """Makes configurations of a short job with a tiny model, from its name, [attention] and [video]."""

    def make(name: str, attention: dict[str, Any] | None = None, **video: Any) -> Config:
        told = {"prompt": "a red ball", "steps": 4, **SIZES[name]}
        if name == "wan2.1-i2v-14b":
            told["image"] = str(image)
        model = {"path": str(family_model(name)), "dtype": "fp32", "device": "cpu"}
        options = {"model": model, "video": told | video, "attention": SETTINGS | (attention or {})}
        return resolve(None, options, preset="svg2")

    return make


def _wan(model: "Published") -> Any:
    """The demo model's text encoder and, where it fits, its VAE; a transformer with three layers."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    sizes = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "text_dim": 128}
    if model.family.image == "required":
        sizes |= {"image_dim": 16, "added_kv_proj_dim": 32}
    parts = {
        "tokenizer": transformers.AutoTokenizer.from_pretrained(DEMO_MODEL / "tokenizer"),
        "text_encoder": transformers.UMT5EncoderModel.from_pretrained(DEMO_MODEL / "text_encoder"),
        "scheduler": diffusers.UniPCMultistepScheduler.from_pretrained(DEMO_MODEL / "scheduler"),
        "vae": diffusers.AutoencoderKLWan.from_pretrained(DEMO_MODEL / "vae"),
    }
    if model.family.name == "wan2.2-ti2v":
        tiny = {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1}
        means = {"latents_mean": [0.1] * 48, "latents_std": [1.5] * 48}
        parts["vae"] = diffusers.AutoencoderKLWan(**{**model.vae, **tiny, **means})
        parts["expand_timesteps"] = True
    for name in model.family.transformers:
        parts[name] = diffusers.WanTransformer3DModel(**{**model.transformer, **sizes})
    if model.boundary_ratio is not None:
        parts["boundary_ratio"] = model.boundary_ratio
    if model.family.image == "required":
        config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision = transformers.CLIPVisionConfig(**config, image_size=28, patch_size=14)
        parts["image_encoder"] = transformers.CLIPVisionModel(vision)
        square = {"height": 28, "width": 28}
        parts["image_processor"] = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square)
    return getattr(diffusers, model.family.pipeline)(**parts)


def _hunyuan(model: "Published") -> Any:
    """A tokenizer of words, random encoders, two double and two single blocks."""
    import diffusers
    import tokenizers
    import transformers

    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "ball", "blue", "sky"])}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **special)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(**size, num_key_value_heads=1, vocab_size=1024, max_position_embeddings=512)
    clip = transformers.CLIPTextConfig(**size, vocab_size=1024, projection_dim=32, eos_token_id=1, bos_token_id=0)
    sizes = {
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "rope_axes_dim": [4, 6, 6],
        "text_embed_dim": 32,
        "pooled_projection_dim": 32,
    }
    tiny = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    return diffusers.HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.LlamaModel(llama),
        tokenizer_2=tokenizer,
        text_encoder_2=transformers.CLIPTextModel(clip),
        transformer=diffusers.HunyuanVideoTransformer3DModel(**{**model.transformer, **sizes}),
        vae=diffusers.AutoencoderKLHunyuanVideo(**{**model.vae, **tiny}),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., None]:
    """Returns what runs `work(rank, world, *args)` on `world` processes and raises any rank's error.

    `work` is a test module's own function; `connect` of semvid.parallel.ranks gives it its place on a mesh. The
    processes talk by gloo, with `nccl=True` by NCCL, a GPU each.
    """

    def run(world: int, work: Callable[..., None], *args: Any, nccl: bool = False) -> None:
        store = Path(tempfile.mkdtemp(dir=tmp_path)) / "store"
        # Children import test modules by their names, which pytest made from the folders above them, and get this
        # process's path.
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(Path(__file__).resolve().parents[1])
            mp.spawn(_rank, (world, store, work, args, nccl), nprocs=world)

    return run


def _rank(rank: int, world: int, store: Path, work: Callable[..., None], args: tuple[Any, ...], nccl: bool) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if nccl else torch.device("cpu")
    if nccl:
        torch.cuda.set_device(device)
    join(device, (rank, world, str(store)), seconds=300)
    try:
        work(rank, world, *args)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Lets torch compute with one thread, so that sums have one order in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and torch.empty_like return with NaN (integers with a wild value): unwritten shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = allocate(*args, **kwargs)
        if x.is_meta or x.is_complex() or x.dtype in (torch.bool, torch.uint8):
            return x
        return x.fill_(math.nan if x.is_floating_point() else -7777 if x.element_size() > 1 else -77)

    return poisoned
