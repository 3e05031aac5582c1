"""The budget: which p a layer's heads get, so that a density is met. Reads centroids and sizes, waits for nobody."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import BlockMap

# p = 1 - exp(-x): x is halved so many times, from 0 .. X_MOST. The last interval is 0.1 % of it.
HALVINGS = 10
X_MOST = 12.0


class Rule(NamedTuple):
    """How key clusters are selected."""

    p: float
    floor: float
    density: float | None = None
    """Mean over the heads of a layer, stand-ins counted; p is found for it."""
    head_floor: float = 0.0
    """Least density of a head; its p is raised to it."""
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

    With a density, p is found by halving, the same for all heads of the layer but those raised to their floor, and at
    most 1 - 6·10⁻⁶: more would be spent on nothing. Nothing is kept from one refresh to the next. Where several ranks
    make the maps of a layer every one of them must enter.

    Args:
        sides: of these heads.
        rule: what to reach.
        ops: the backend.
        mean: takes the densities of these heads, fp32 [heads], and returns their mean over the heads of all ranks, the
            same bits on each.
    """

    def found(p: float | Tensor) -> BlockMap:
        return ops.top_p_map(sides.q_centroids, sides.k_centroids, sides.k_sizes, p, rule.floor, sides.bias)

    if rule.density is None and rule.head_floor == 0:
        return found(rule.p)
    H, device = sides.k_sizes.shape[0], sides.k_sizes.device

    def short(x: Tensor, of: Callable[[Tensor], Tensor], goal: float) -> Tensor:
        return of(density(found(-torch.expm1(-x)), sides, ops, tail=rule.tail)) < goal

    least = torch.zeros(H, device=device)
    if rule.head_floor > 0:
        least = _halve(lambda x: short(x, lambda shares: shares, rule.head_floor), least)
    if rule.density is None:
        p = torch.full((H,), rule.p, device=device)
        return found(torch.maximum(p, -torch.expm1(-least)) if rule.p < 1 else 1.0)
    goal = rule.density
    common = _halve(lambda x: short(torch.maximum(x.expand(H), least), mean, goal), torch.zeros(1, device=device))
    return found(-torch.expm1(-torch.maximum(common.expand(H), least)))


def _halve(short: Callable[[Tensor], Tensor], low: Tensor) -> Tensor:
    """Returns the smallest x > low, to the last interval, that is not `short`."""
    high = torch.full_like(low, X_MOST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        less = short(middle)
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return high
