"""Fixtures for every test. Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from semvid.runtime.config import DEMO_MODEL, Config, resolve

if not torch.cuda.is_available():
    # Read by triton at import, so before any test imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, torch.get_num_threads()))


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
