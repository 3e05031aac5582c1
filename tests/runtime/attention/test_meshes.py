"""The whole denoising loop on every mesh of up to four gloo processes, against one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from semvid.parallel import balance
from semvid.parallel.kmeans import Refined, refine_with
from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks, connect
from semvid.runtime.attention import refresh
from semvid.runtime.attention.density import Density
from semvid.runtime.config import Config
from semvid.runtime.jobs import denoise
from semvid.runtime.models import install, load
from semvid.runtime.models.folder import locate

# 175 tokens on two heads: neither divides by two, three or four ranks alike.
SIZE = {"height": 80, "width": 112, "frames": 17, "steps": 4}
TAIL = {"tail": "second", "selection": "error", "floor": 0.0}
SHARED = {"seeding": "spread", "refresh": "drift", "refresh_every": 1, "drift": 0.3, "share_branches": "yes"}
SETTINGS = {"dense_steps": 0.25, "query_clusters": 6, "key_clusters": 9, "first_iterations": 5, "refresh_every": 2}


class Recorder:
    """Stands in for `refine_with`: keeps what one process finds, call by call, or gives a shard's part of it again."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Refined]] = []
        self.played: dict[str, int] = {}
        self.session: Any = None
        self.replaying = False

    def __call__(
        self, xs: list[Tensor], starts: list[Tensor], iterations: int, ops: Any, group: Any, **riding: list[Tensor]
    ) -> Refined:
        branch, shard = self.session.here().branch, self.session.shard
        if not self.replaying:
            found = refine_with(xs, starts, iterations, ops, group, **riding)
            self.calls.append((branch, found))
            return found
        place = self.played.get(branch, 0)
        self.played[branch] = place + 1
        whole = [found for name, found in self.calls if name == branch][place]
        parts = []
        for side in whole.clusters:
            labels = side.labels if shard is None else side.labels[:, shard.first : shard.first + shard.tokens]
            parts.append(side._replace(labels=labels, permutation=ops.group(labels, side.centroids.shape[1])))
        return whole._replace(clusters=parts)


def latents(
    pipeline: Any, config: Config, ranks: Ranks, recorder: Recorder, noise: float = 0.0
) -> tuple[Tensor, Density]:
    """Runs the job's loop, from its first latents times 1 + noise, and returns its latents and density."""
    handle = install.sparsify(pipeline, attention=config.attention, seed=3, ranks=ranks)
    recorder.session = handle.session
    refresh.refine_with = recorder
    try:
        state = denoise.start(pipeline, config.video, ranks)
        shake = torch.randn(state.latents.shape, generator=torch.Generator().manual_seed(1))
        state.latents *= 1 + noise * shake.to(state.latents.device)
        for _ in denoise.steps(pipeline, state):
            pass
        assert torch.isfinite(state.latents).all()
        return state.latents, handle.density()
    finally:
        refresh.refine_with = refine_with
        handle.remove()


def _meshes(rank: int, world: int, meshes: list[Mesh], configs: dict[str, Config]) -> None:
    balance.TILE_ROWS, balance.TILE_OVERHEAD_KEYS = 8, 2
    pipeline = load.load_pipeline(locate(configs["exact"].model.path), configs["exact"].model)
    alone, yardsticks, recorders = {}, {}, {}
    for name, config in configs.items():
        recorders[name] = Recorder()
        alone[name] = latents(pipeline, config, Ranks(), recorders[name])
        # What one process makes of latents that differ by about one unit in the last place.
        shaken = latents(pipeline, config, Ranks(), Recorder(), noise=2.0**-23)[0]
        yardsticks[name] = float((shaken - alone[name][0]).abs().max())
    for mesh in meshes:
        ranks = connect(mesh)
        for name, config in configs.items():
            recorders[name].replaying = True
            recorder = recorders[name] if "replayed" in name else Recorder()
            found, density = latents(pipeline, config, ranks, recorder)
            whole, whole_density = alone[name]
            label = f"{mesh} {name} rank {rank}"
            assert (density.sparse_calls, density.dense_calls) == (
                whole_density.sparse_calls,
                whole_density.dense_calls,
            )
            # Clustered freely, near-ties may fall the other way; the yardstick has them too.
            error = float((found - whole).abs().max())
            assert error <= 8 * yardsticks[name], f"{label}: {error}, one ulp makes {yardsticks[name]}"
            if "free" not in name:
                assert density.sparse == pytest.approx(whole_density.sparse, rel=1e-6), label
                assert (whole_density.sparse < 0.9) == ("replayed" in name), label
            recorder.played.clear()


def _configs(tiny_config: Callable[..., Config]) -> dict[str, Config]:
    return {
        "exact": tiny_config(attention=SETTINGS | {"p": 1.0}, **SIZE),
        "replayed": tiny_config(attention=SETTINGS | {"p": 0.7, "floor": 0.1}, **SIZE),
        "free": tiny_config(attention=SETTINGS | {"p": 0.7, "floor": 0.1}, **SIZE),
        "tail replayed": tiny_config(attention=SETTINGS | TAIL | {"p": 0.5}, **SIZE),
        "tail free": tiny_config(attention=SETTINGS | TAIL | SHARED | {"density": 0.5}, **SIZE),
        "anchors replayed": tiny_config(attention=SETTINGS | TAIL | {"p": 0.5, "anchors": "yes"}, **SIZE),
        "anchors free": tiny_config(attention=SETTINGS | TAIL | SHARED | {"density": 0.6, "anchors": "yes"}, **SIZE),
    }


@pytest.mark.parametrize(
    ("world", "meshes"),
    [
        (2, [Mesh(ulysses=2), Mesh(ring=2), Mesh(cfg=2)]),
        (3, [Mesh(ulysses=3), Mesh(ring=3)]),
        (4, [Mesh(ring=2, ulysses=2), Mesh(cfg=2, ulysses=2), Mesh(cfg=2, ring=2), Mesh(ulysses=4)]),
    ],
)
def test_latents_are_those_of_one_process(
    world: int, meshes: list[Mesh], tiny_config: Callable[..., Config], spawn: Callable[..., None]
) -> None:
    spawn(world, _meshes, meshes, _configs(tiny_config))


@pytest.mark.multigpu
def test_latents_are_those_of_one_process_over_nccl(
    tiny_config: Callable[..., Config], spawn: Callable[..., None]
) -> None:
    world = torch.cuda.device_count()
    meshes = [Mesh(ulysses=world), Mesh(ring=world)]
    if world % 2 == 0:
        meshes.append(Mesh(cfg=2, ulysses=world // 2))
    spawn(world, _meshes, meshes, _configs(tiny_config), nccl=True)
