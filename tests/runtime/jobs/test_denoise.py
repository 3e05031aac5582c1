"""The denoising loop on two ranks, one for each branch, gives what it gives on one."""

from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks, connect
from semvid.runtime import load_pipeline, sparsify
from semvid.runtime.config import ModelConfig, VideoConfig
from semvid.runtime.jobs import denoise

VIDEO = VideoConfig(prompt="a red ball", height=64, width=96, frames=17, steps=3, guidance=3.0, seed=7)
PRESETS = ("dense", "svg2")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(pipeline: Any, preset: str, ranks: Ranks) -> dict[str, Any]:
    """Two jobs, one after the other: what the second gave, counted after each step, and remembered clusters of."""
    handle = sparsify(pipeline, preset, ranks=ranks)
    for _ in range(2):
        state = denoise.start(pipeline, VIDEO, ranks)
        densities = [astuple(handle.density()) for _ in denoise.steps(pipeline, state)]
        branches = {branch for _, branch in handle.session.cache.memories}
        denoise.finish(pipeline)
    handle.remove()
    return {"latents": state.latents, "densities": densities, "branches": branches}


def _branch(rank: int, world: int, model: Path, folder: Path) -> None:
    pipeline, ranks = load(model), connect(Mesh(cfg=world))
    for preset in PRESETS:
        torch.save(run(pipeline, preset, ranks), folder / f"{preset}-{rank}.pt")


def load(model: Path) -> Any:
    return load_pipeline(model, ModelConfig(device="cpu", dtype="fp32"))


@pytest.mark.usefixtures("_one_thread")
def test_branches_on_two_ranks_give_the_latents_and_densities_of_one(
    spawn: Callable[..., None], tiny_model: Path, tmp_path: Path
) -> None:
    spawn(2, _branch, tiny_model, tmp_path)
    pipeline = load(tiny_model)
    for preset in PRESETS:
        alone = run(pipeline, preset, Ranks())
        for rank in range(2):
            found = torch.load(tmp_path / f"{preset}-{rank}.pt")
            assert torch.equal(found["latents"], alone["latents"])
            assert found["branches"] == ({("cond", "uncond")[rank]} if preset == "svg2" else set())
            for mine, one in zip(found["densities"], alone["densities"], strict=True):
                assert mine == pytest.approx(one, rel=1e-12)
        # 3 steps of 3 layers, of which svg2 leaves the first dense; two branches.
        assert alone["densities"][-1][1:] == {"dense": (0, 18), "svg2": (12, 6)}[preset]


def test_one_branch_on_two_ranks_is_refused(tiny_model: Path) -> None:
    video = VideoConfig(prompt="a red ball", guidance=1.0)
    with pytest.raises(ValueError, match="without guidance there is one branch and cfg must be 1"):
        denoise.start(load(tiny_model), video, Ranks(Mesh(cfg=2)))
