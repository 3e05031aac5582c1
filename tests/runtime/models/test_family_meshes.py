"""Every model family on two and three gloo processes gives the latents of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from semvid.parallel import balance
from semvid.parallel.kmeans import Refined, refine_with
from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks, connect
from semvid.runtime.attention import refresh
from semvid.runtime.config import Config
from semvid.runtime.jobs import denoise
from semvid.runtime.models import install, load
from semvid.runtime.models.folder import locate
from tests.parallel.file_windows import windows_in

NAMES = ["wan2.1-i2v-14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b", "hunyuanvideo"]
REUSING = {"p": 0.6, "floor": 0.1, "refresh_every": 2}
# As the presets have it.
TAIL = {"p": 0.5, "floor": 0.0, "tail": "second", "selection": "error", "seeding": "spread", "share_branches": "yes"}
GROWING = TAIL | {"refresh": "growing", "refresh_every": 1, "refresh_most": 10}


class Replay:
    """Stands in for `refine_with`: keeps what one process finds, or gives a shard's part of it again."""

    def __init__(self) -> None:
        self.calls: list[Refined] = []
        self.played = 0
        self.session: Any = None
        self.replaying = False

    def __call__(
        self, xs: list[Tensor], starts: list[Tensor], iterations: int, ops: Any, group: Any, **riding: list[Tensor]
    ) -> Refined:
        if not self.replaying:
            self.calls.append(refine_with(xs, starts, iterations, ops, group, **riding))
            return self.calls[-1]
        whole, shard = self.calls[self.played], self.session.shard
        self.played += 1
        parts = []
        assert all(rider.shape[1] == shard.tokens for rider in riding["riders"])
        for side, x in zip(whole.clusters, xs, strict=True):
            labels = side.labels[:, shard.first : shard.first + shard.tokens]
            assert labels.shape[1] == x.shape[1], "the video tokens of the shard, without prompt and padding"
            parts.append(side._replace(labels=labels, permutation=ops.group(labels, side.centroids.shape[1])))
        return whole._replace(clusters=parts)


def latents(pipeline: Any, config: Config, ranks: Ranks, replay: Replay) -> tuple[Tensor, Any]:
    handle = install.sparsify(pipeline, attention=config.attention, seed=3, ranks=ranks)
    replay.session, replay.played = handle.session, 0
    refresh.refine_with = replay
    try:
        state = denoise.start(pipeline, config.video, ranks)
        for _ in denoise.steps(pipeline, state):
            pass
        assert torch.isfinite(state.latents).all()
        return state.latents, handle.density()
    finally:
        refresh.refine_with = refine_with
        handle.remove()


def _equals_one_process(
    rank: int, world: int, meshes: list[Mesh], configs: dict[str, Config], files: str | None = None
) -> None:
    balance.TILE_ROWS, balance.TILE_OVERHEAD_KEYS = 8, 2
    if files is not None:
        install.open_windows = windows_in(files)  # type: ignore[assignment]
    connected = [connect(mesh) for mesh in meshes]
    for name, config in configs.items():
        pipeline, replay = load.load_pipeline(locate(config.model.path), config.model), Replay()
        expected, density = latents(pipeline, config, Ranks(), replay)
        # Much of HunyuanVideo's tiny sequence is its prompt, which is always computed.
        assert density.sparse < (0.97 if "hunyuanvideo" in name else 0.9), name
        assert density.sparse_calls > 0
        assert density.dense_calls > 0
        replay.replaying = True
        for ranks in connected:
            found, shared = latents(pipeline, config, ranks, replay)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=f"{name} {ranks.mesh}")
            assert shared.sparse == pytest.approx(density.sparse, rel=1e-6)
            assert (shared.sparse_calls, shared.dense_calls) == (density.sparse_calls, density.dense_calls)


@pytest.mark.parametrize(
    ("world", "meshes"), [(2, [Mesh(ulysses=2), Mesh(ring=2)]), (3, [Mesh(ulysses=3), Mesh(ring=3)])]
)
def test_latents_are_those_of_one_process(
    world: int, meshes: list[Mesh], family_config: Callable[..., Config], spawn: Callable[..., None]
) -> None:
    spawn(world, _equals_one_process, meshes, {name: family_config(name, REUSING) for name in NAMES})


@pytest.mark.parametrize(
    ("world", "meshes"), [(2, [Mesh(ulysses=2), Mesh(ring=2)]), (3, [Mesh(ulysses=3), Mesh(ring=3)])]
)
def test_latents_with_a_tail_are_those_of_one_process(
    world: int, meshes: list[Mesh], family_config: Callable[..., Config], spawn: Callable[..., None]
) -> None:
    made = {
        "hunyuanvideo": family_config("hunyuanvideo", TAIL | {"refresh_every": 2}),
        "hunyuanvideo, a density": family_config("hunyuanvideo", GROWING | {"density": 0.6}),
        # Two transformers, each with branches that share.
        "wan2.2-t2v-a14b": family_config("wan2.2-t2v-a14b", GROWING, boundary=0.5),
    }
    spawn(world, _equals_one_process, meshes, made)


@pytest.mark.parametrize(("world", "meshes"), [(2, [Mesh(ulysses=2)]), (3, [Mesh(ulysses=3)])])
def test_latents_through_windows_are_those_of_one_process(
    world: int, meshes: list[Mesh], family_config: Callable[..., Config], tmp_path: Path, spawn: Callable[..., None]
) -> None:
    made = {
        "hunyuanvideo": family_config("hunyuanvideo", REUSING),
        "hunyuanvideo, a tail": family_config("hunyuanvideo", TAIL | {"refresh_every": 2}),
        "wan2.2-t2v-a14b": family_config("wan2.2-t2v-a14b", GROWING, boundary=0.5),
    }
    spawn(world, _equals_one_process, meshes, made, str(tmp_path))


def _with_a_branch_each(rank: int, world: int, config: Config, files: str | None = None) -> None:
    pipeline, replay = load.load_pipeline(locate(config.model.path), config.model), Replay()
    ranks = connect(Mesh(cfg=2, ulysses=world // 2))
    if files is not None:
        install.open_windows = windows_in(files)  # type: ignore[assignment]
    expected, density = latents(pipeline, config, Ranks(), replay)
    assert len(replay.calls) > 0
    # Where tokens are shared too, near-ties of sums in another order may fall the other way.
    replay.replaying = ranks.mesh.sequence > 1
    found, shared = latents(pipeline, config, ranks, replay)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert shared.sparse == pytest.approx(density.sparse, rel=1e-6)


def test_branches_of_two_transformers_share_clusters_across_ranks(
    family_config: Callable[..., Config], spawn: Callable[..., None]
) -> None:
    spawn(2, _with_a_branch_each, family_config("wan2.2-t2v-a14b", GROWING, boundary=0.5, steps=6))


def test_branches_apart_share_clusters_through_windows(
    family_config: Callable[..., Config], tmp_path: Path, spawn: Callable[..., None]
) -> None:
    config = family_config("wan2.2-t2v-a14b", GROWING, boundary=0.5, steps=6)
    spawn(4, _with_a_branch_each, config, str(tmp_path))


def _with_shared_weights(rank: int, world: int, config: Config) -> None:
    ranks, path = connect(Mesh(cfg=2)), locate(config.model.path)
    expected, _ = latents(load.load_pipeline(path, config.model), config, ranks, Replay())
    # Of several ranks the first alone encodes.
    pipeline = load.load_pipeline(path, config.model, encoders="none" if rank else "host", share=True)
    assert (pipeline.text_encoder is None) == (rank > 0)
    found, _ = latents(pipeline, config, ranks, Replay())
    assert torch.equal(found, expected)
    held = sum(x.to_local().numel() for x in pipeline.transformer.blocks.parameters())
    assert held < 0.6 * sum(x.numel() for x in pipeline.transformer.blocks.parameters())


def test_shared_weights_and_one_encoder_give_the_same_latents(
    family_config: Callable[..., Config], spawn: Callable[..., None]
) -> None:
    spawn(2, _with_shared_weights, family_config("wan2.1-i2v-14b", REUSING))
