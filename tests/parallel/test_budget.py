"""The budget: a density that is met, floors of heads, and what stand-ins count for."""

import pytest
import torch
from torch import Tensor

from semvid.kernels.dispatch import select
from semvid.kernels.layout import BlockMap
from semvid.parallel.budget import Rule, Sides, columns, density, find_map
from semvid.parallel.maps import mean_over

OPS = select("reference", torch.device("cpu"))


def sides(H: int = 4, Cq: int = 12, Ck: int = 200, bias: bool = False) -> Sides:
    """Centroids of peaked and of flat heads, with uneven sizes, some of them empty."""
    generator = torch.Generator().manual_seed(0)
    sharp = torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None, None]
    q, k = (torch.randn(H, C, 16, generator=generator) for C in (Cq, Ck))
    sizes = [(40 * torch.rand(H, C, generator=generator)).int() for C in (Cq, Ck)]
    return Sides(q * sharp, sizes[0], k, sizes[1], torch.randn(H, Ck, generator=generator) if bias else None)


def shares(x: Sides, rule: Rule) -> Tensor:
    return density(find_map(x, rule, OPS, mean_over(4, None)), x, OPS, tail=rule.tail)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("goal", [0.15, 0.3, 0.7])
def test_the_density_asked_for_is_met(goal: float, tail: bool, bias: bool) -> None:
    x = sides(bias=bias)
    found = shares(x, Rule(0.9, 0.0, density=goal, tail=tail))
    assert float(found.mean()) == pytest.approx(goal, rel=0.03)
    # One p for all heads: the flat ones compute more.
    assert float(found[0]) > float(found[3])


def test_no_head_computes_less_than_its_floor() -> None:
    x = sides()
    free = shares(x, Rule(0.9, 0.0, density=0.2))
    held = shares(x, Rule(0.9, 0.0, density=0.2, head_floor=0.15))
    assert float(free.min()) < 0.1
    assert float(held.min()) >= 0.15
    assert float(held.mean()) == pytest.approx(0.2, rel=0.03)


def test_a_floor_of_heads_raises_a_fixed_p_where_it_must() -> None:
    x = sides()
    plain, held = shares(x, Rule(0.5, 0.0)), shares(x, Rule(0.5, 0.0, head_floor=0.12))
    assert float(held.min()) >= 0.12
    assert torch.equal(held[plain > 0.13], plain[plain > 0.13])
    assert shares(x, Rule(1.0, 0.0, head_floor=0.5)).tolist() == [1.0] * 4


def test_a_stand_in_counts_as_one_column() -> None:
    x = sides()
    block_map = BlockMap(
        (torch.rand(4, 12, 200, generator=torch.Generator().manual_seed(1)) < 0.3) & (x.k_sizes > 0)[:, None]
    )
    for tail in (False, True):
        expected = torch.zeros(4, 12, dtype=torch.int64)
        for h in range(4):
            for i in range(12):
                on = block_map.selected[h, i]
                expected[h, i] = x.k_sizes[h][on].sum() + (tail and int(((x.k_sizes[h] > 0) & ~on).sum()))
        found = columns(block_map, x.k_sizes, tail=tail)
        assert torch.equal(found.long(), expected)
        pairs = (expected * x.q_sizes).sum(1) / (x.q_sizes.sum(1) * x.k_sizes.sum(1))
        torch.testing.assert_close(density(block_map, x, OPS, tail=tail).double(), pairs.double(), rtol=1e-5, atol=0)
