"""The budget: which floor, or which p, a layer's heads get, so that a density is met.

With a tail it is the floor: every query cluster computes the same share of the key clusters. A share of the promised
error or mass asks how the promise is spread, and there centroids of peaked heads promise too much to too few. Without
a tail what is left out is lost, and p says how much that may be. Reads centroids and sizes, waits for nobody.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import BlockMap

# p = 1 - exp(-x): x is found in 0 .. X_MOST. The last interval is 0.1 % of it.
P_HALVINGS = 10
X_MOST = 12.0
# To 1/8192, the share of one of the most key clusters that a GPU takes.
FLOOR_HALVINGS = 13


class Rule(NamedTuple):
    """How key clusters are selected."""

    p: float
    floor: float
    density: float | None = None
    """Mean over the heads of a layer, stand-ins counted; with a tail the floor is found for it and stands alone, p and
    the floor above left out; without one p is found in place of that above."""
    head_floor: float = 0.0
    """Least density of a head, stand-ins counted; its floor is raised to it, without a tail its p."""
    tail: bool = False
    """Whether a key cluster that is not selected is computed as one column."""


class Sides(NamedTuple):
    """What the map of some heads is made from."""

    q_centroids: Tensor
    q_sizes: Tensor
    k_centroids: Tensor
    k_sizes: Tensor
    bias: Tensor | None
    """fp32 [heads, Ck], see `top_p_map`."""


def columns(block_map: BlockMap, k_sizes: Tensor, *, tail: bool) -> Tensor:
    """Returns the columns that each query cluster computes, int32 [H, Cq]: keys, and stand-ins with `tail`."""
    cost = k_sizes[:, None] - (k_sizes > 0).int()[:, None] if tail else k_sizes[:, None]
    keys = torch.where(block_map.selected, cost, 0).sum(-1, dtype=torch.int32)
    return keys + (k_sizes > 0).sum(-1, dtype=torch.int32)[:, None] if tail else keys


def density(block_map: BlockMap, sides: Sides, ops: Ops, *, tail: bool) -> Tensor:
    """Returns the share of token pairs that each head computes, fp32 [H], a stand-in counted as a token with `tail`."""
    share = ops.density(block_map, sides.q_sizes, sides.k_sizes)
    if not tail:
        return share
    occupied = sides.k_sizes > 0
    of_clusters = ops.density(block_map, sides.q_sizes, occupied.int())
    left_out = occupied.sum(-1) * (1 - of_clusters)
    return share + left_out / sides.k_sizes.sum(-1).clamp(min=1)


def find_map(sides: Sides, rule: Rule, ops: Ops, mean: Callable[[Tensor], Tensor]) -> BlockMap:
    """Returns the map of some heads of a layer.

    With a density one number is found by halving for all heads of the layer but those raised to their `head_floor`: the
    least that reaches it. With a tail that is the floor, p being 0; a density below what stand-ins cost gives the least
    floor, one key cluster for each query cluster. Without one it is p, at most 1 - 6·10⁻⁶: more would be spent on
    nothing. A density of 1 takes every key cluster. Nothing is kept from one refresh to the next. Where several ranks
    make the maps of a layer every one of them must enter.

    Args:
        sides: of these heads.
        rule: what to reach.
        ops: the backend.
        mean: takes the densities of these heads, fp32 [heads], and returns their mean over the heads of all ranks, the
            same bits on each.
    """
    goal = rule.density
    if goal is None and (rule.head_floor == 0 or rule.p >= 1):
        return _selected(sides, rule.p, rule.floor, ops)
    if goal is not None and goal >= 1:
        return _selected(sides, 1.0, 0.0, ops)
    H, device = sides.k_sizes.shape[0], sides.k_sizes.device
    found = _by_floor if rule.tail else _by_p

    def short(x: Tensor, of: Callable[[Tensor], Tensor], goal: float) -> Tensor:
        return of(density(found(x, sides, rule, ops), sides, ops, tail=rule.tail)) < goal

    least = torch.zeros(H, device=device)
    if rule.head_floor > 0:
        least = _halve(lambda x: short(x, lambda shares: shares, rule.head_floor), least, rule)
    if goal is not None:
        common = torch.zeros(1, device=device)
        common = _halve(lambda x: short(torch.maximum(x.expand(H), least), mean, goal), common, rule)
        least = torch.maximum(common.expand(H), least)
    return found(least, sides, rule, ops)


def _selected(sides: Sides, p: float | Tensor, floor: float | Tensor, ops: Ops) -> BlockMap:
    return ops.top_p_map(sides.q_centroids, sides.k_centroids, sides.k_sizes, p, floor, sides.bias)


def _by_floor(floor: Tensor, sides: Sides, rule: Rule, ops: Ops) -> BlockMap:
    """Returns the map of floors, fp32 [H]: alone with a density, else over p and floor of the rule."""
    if rule.density is not None:
        return _selected(sides, 0.0, floor, ops)
    return _selected(sides, rule.p, floor.clamp(min=rule.floor), ops)


def _by_p(x: Tensor, sides: Sides, rule: Rule, ops: Ops) -> BlockMap:
    """Returns the map of p = 1 - exp(-x), x fp32 [H]: no less than that of the rule unless there is a density."""
    p = -torch.expm1(-x)
    return _selected(sides, p if rule.density is not None else p.clamp(min=rule.p), rule.floor, ops)


def _halve(short: Callable[[Tensor], Tensor], low: Tensor, rule: Rule) -> Tensor:
    """Returns the smallest x > low of floors or of p, to the last interval, that is not `short`."""
    most, halvings = (1.0, FLOOR_HALVINGS) if rule.tail else (X_MOST, P_HALVINGS)
    high = torch.full_like(low, most)
    for _ in range(halvings):
        middle = (low + high) / 2
        less = short(middle)
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return high
