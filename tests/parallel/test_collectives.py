"""Tensors of the first rank on every rank, and of every rank on the first."""

from collections.abc import Callable

import pytest
import torch

from semvid.parallel.collectives import all_gather, from_first, to_first
from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks, connect

CPU = torch.device("cpu")


def tensors() -> dict[str, torch.Tensor]:
    return {"rows": torch.arange(6.0).view(2, 3).T, "mask": torch.tensor([True, False]), "none": torch.empty(0, 4)}


def _everywhere(rank: int, world: int) -> None:
    ranks = connect(Mesh(cfg=2, ulysses=world // 2))
    found = from_first(tensors() if rank == 0 else None, (ranks.sequence, ranks.cfg), CPU)
    assert found.keys() == tensors().keys()
    for name, x in tensors().items():
        assert torch.equal(found[name], x)
        assert found[name].dtype == x.dtype
    assert from_first({} if rank == 0 else None, (ranks.sequence, ranks.cfg), CPU) == {}


def test_every_rank_of_both_branches_gets_what_the_first_has(spawn: Callable[..., None]) -> None:
    spawn(4, _everywhere)


def test_a_rank_alone_keeps_what_it_has() -> None:
    ranks, mine = Ranks(), tensors()
    assert from_first(mine, (ranks.sequence, ranks.cfg), CPU)["rows"] is mine["rows"]


def _at_the_first(rank: int, world: int) -> None:
    ranks = connect(Mesh(cfg=2, ulysses=world // 2))
    counts = [2, 0, 3, 1]
    made = [[torch.randn(number + 1, 2, place + 1) for place in range(counts[number])] for number in range(world)]
    found = to_first(made[rank], counts, torch.empty(1, 1, 1), ranks.world)
    assert len(found) == (world if rank == 0 else 0)
    for mine, theirs in zip(made, found, strict=False):
        assert [x.shape for x in theirs] == [x.shape for x in mine]
    if rank == 0:
        assert found[0][1] is made[0][1]
    # Of no rank but the first, and of none at all.
    first = to_first(made[0] if rank == 0 else [], [2, 0, 0, 0], torch.empty(1, 1, 1), ranks.world)
    assert [len(part) for part in first] == ([2, 0, 0, 0] if rank == 0 else [])
    numbers = to_first([torch.full((2, 3), float(rank))] * 2, [2] * world, torch.empty(1, 1), ranks.world)
    assert all((x == number).all() for number, part in enumerate(numbers) for x in part)


def test_the_first_rank_gets_what_every_rank_has(spawn: Callable[..., None]) -> None:
    spawn(4, _at_the_first)


def test_a_rank_alone_has_all_there_is() -> None:
    x = torch.ones(2)
    assert to_first([x], [1], x, Ranks().world)[0][0] is x


def test_what_only_gpus_would_refuse_is_refused_everywhere() -> None:
    with pytest.raises(TypeError, match="x is torch.int16, which NCCL can't gather"):
        all_gather(torch.zeros(3, dtype=torch.int16), None)
