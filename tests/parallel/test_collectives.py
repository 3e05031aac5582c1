"""Tensors of the first rank on every rank."""

from collections.abc import Callable

import torch

from semvid.parallel.collectives import from_first
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
