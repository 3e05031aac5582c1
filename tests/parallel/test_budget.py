"""The budget: a density that is met, floors of heads, and what stand-ins count for."""

import pytest
import torch
from torch import Tensor

from semvid.kernels.dispatch import select
from semvid.kernels.layout import BlockMap
from semvid.parallel.budget import Rule, Sides, columns, density, find_map
from semvid.parallel.maps import mean_over

OPS = select("reference", torch.device("cpu"))


def sides(H: int = 4, Cq: int = 12, Ck: int = 400, bias: bool = False) -> Sides:
    """Centroids of peaked and of flat heads, with uneven sizes, some of them empty."""
    generator = torch.Generator().manual_seed(0)
    sharp = torch.tensor([0.5, 1.0, 2.0, 4.0])[:H, None, None]
    q, k = (torch.randn(H, C, 16, generator=generator) for C in (Cq, Ck))
    sizes = [(40 * torch.rand(H, C, generator=generator)).int() for C in (Cq, Ck)]
    return Sides(q * sharp, sizes[0], k, sizes[1], torch.randn(H, Ck, generator=generator) if bias else None)


def found_map(x: Sides, rule: Rule) -> BlockMap:
    return find_map(x, rule, OPS, mean_over(x.k_sizes.shape[0], None))


def shares(x: Sides, rule: Rule) -> Tensor:
    return density(found_map(x, rule), x, OPS, tail=rule.tail)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("goal", [0.15, 0.3, 0.7])
def test_the_density_asked_for_is_met_by_one_p(goal: float, bias: bool) -> None:
    x = sides(bias=bias)
    found = shares(x, Rule(0.9, 0.0, density=goal))
    assert float(found.mean()) == pytest.approx(goal, rel=0.03)
    # The flat heads compute more.
    assert float(found[0]) > float(found[3])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("goal", [0.1, 0.15, 0.3, 0.7])
def test_with_a_tail_the_density_asked_for_is_met_by_one_floor(goal: float, bias: bool) -> None:
    x = sides(bias=bias)
    # Neither p nor floor of the rule holds.
    rule = Rule(0.9, 0.5, density=goal, tail=True)
    assert goal <= float(shares(x, rule).mean()) < 1.03 * goal
    counts = found_map(x, rule).selected.sum(-1)
    assert torch.equal(counts, counts[:1, :1].expand(4, 12))


@pytest.mark.parametrize("bias", [False, True])
def test_with_a_tail_a_peaked_head_is_not_starved_for_a_flat_one(bias: bool) -> None:
    x = sides(2, bias=bias)
    x = x._replace(q_centroids=x.q_centroids * torch.tensor([0.2, 20.0])[:, None, None])
    flat, peaked = shares(x, Rule(0.9, 0.0, density=0.3, tail=True)).tolist()
    assert peaked >= 0.15
    assert flat >= 0.15


@pytest.mark.parametrize("tail", [False, True])
def test_no_head_computes_less_than_its_floor(tail: bool) -> None:
    x = sides()
    # With a tail heads differ little.
    least = 0.2 if tail else 0.15
    free = shares(x, Rule(0.9, 0.0, density=0.2, tail=tail))
    held = shares(x, Rule(0.9, 0.0, density=0.2, head_floor=least, tail=tail))
    assert float(free.min()) < least
    assert float(held.min()) >= least
    assert float(held.mean()) == pytest.approx(0.2, rel=0.03)


def test_a_floor_of_heads_raises_a_fixed_p_where_it_must() -> None:
    x = sides()
    plain, held = shares(x, Rule(0.5, 0.0)), shares(x, Rule(0.5, 0.0, head_floor=0.12))
    assert float(held.min()) >= 0.12
    assert torch.equal(held[plain > 0.13], plain[plain > 0.13])
    assert shares(x, Rule(1.0, 0.0, head_floor=0.5)).tolist() == [1.0] * 4


def test_with_a_tail_a_floor_of_heads_raises_the_floor_and_not_p() -> None:
    x = sides()
    plain, held = (found_map(x, Rule(0.5, 0.02, head_floor=least, tail=True)) for least in (0.0, 0.2))
    before, after = (density(each, x, OPS, tail=True) for each in (plain, held))
    short = before < 0.2
    assert 0 < int(short.sum()) < 4
    assert torch.equal(held.selected[~short], plain.selected[~short])
    assert float(after.min()) >= 0.2
    assert float(after[short].max()) < 1.03 * 0.2
    # p still takes what it took; beside it every query cluster has the same least.
    assert bool((held.selected >= plain.selected).all())
    counts = held.selected.sum(-1)
    least = counts.amin(1, keepdim=True)
    assert torch.equal(counts[short], torch.maximum(least, plain.selected.sum(-1))[short])


@pytest.mark.parametrize("tail", [False, True])
def test_a_density_of_one_selects_everything(tail: bool) -> None:
    x = sides()
    # Leaving a key to itself costs as much as computing it.
    x.k_sizes[:, 3] = 1
    found = found_map(x, Rule(0.5, 0.1, density=1.0, tail=tail)).selected
    assert torch.equal(found, (x.k_sizes > 0)[:, None].expand(4, 12, 400))


def test_a_density_below_that_of_stand_ins_gives_the_least_floor() -> None:
    x = sides()
    cost = (x.k_sizes > 0).sum(-1) / x.k_sizes.sum(-1)
    found = found_map(x, Rule(0.9, 0.3, density=0.5 * float(cost.mean()), tail=True))
    assert torch.equal(found.selected.sum(-1), torch.ones(4, 12, dtype=torch.int64))


def test_a_stand_in_counts_as_one_column() -> None:
    x = sides()
    block_map = BlockMap(
        (torch.rand(4, 12, 400, generator=torch.Generator().manual_seed(1)) < 0.3) & (x.k_sizes > 0)[:, None]
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
