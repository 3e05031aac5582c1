"""The block map of all heads: each rank makes its share of them; bits and counts are gathered."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import Clusters
from semvid.parallel.budget import Rule, Sides, columns, find_map
from semvid.parallel.collectives import Group, all_gather
from semvid.parallel.exchange import Counts
from semvid.parallel.phases import phase
from semvid.parallel.ranks import Ranks


class GlobalMap(NamedTuple):
    """What every rank knows of a layer's map."""

    bits: Tensor
    """uint8 [H, Cq, ⌈Ck / 8⌉]: eight key clusters a byte, the first in the lowest bit."""
    counts: Counts

    def density(self) -> Tensor:
        """Returns the share of token pairs that are computed, fp32 [H]; counted exactly."""
        queries, keys = self.counts.queries.sum(0), self.counts.keys.sum((0, 2))
        pairs = (queries.long() * self.counts.keys_computed).sum(1)
        return (pairs.double() / (queries.sum(1) * keys).clamp(min=1).double()).float()


def gather_map(
    queries: Clusters, keys: Clusters, rule: Rule, ops: Ops, ranks: Ranks, bias: Tensor | None = None
) -> GlobalMap:
    """Returns the map of all heads. Every rank of the sequence must enter; two all-gathers, no host synchronisation.

    Rank i makes the maps of heads i · s .. (i + 1) · s, s = ⌈H / P⌉; every rank then reads the same bits, so that no
    plan hangs on a float that two ranks computed for themselves. A rule with a density adds ten small all-gathers,
    with a tail thirteen.

    Args:
        queries: global centroids and sizes, local order.
        keys: likewise.
        rule: which key clusters are selected.
        ops: the backend.
        ranks: the mesh and this rank's place on it.
        bias: fp32 [H, Ck], see `top_p_map`.
    """
    H = keys.centroids.shape[0]
    group = ranks.sequence
    of_queries, of_keys = gather_counts(queries, keys, group)
    with phase("map"):
        own = own_heads(H, ranks, keys.sizes.device)
        block_map = find_map(sides_of(queries, keys, bias, own), rule, ops, mean_over(H, group))
        computed = columns(block_map, keys.sizes[own], tail=rule.tail)
        record = torch.cat([pack_bits(block_map.selected), computed[..., None].view(torch.uint8)], dim=-1)
    with phase("all-gather"):
        record = all_gather(record, group).flatten(0, 1)[:H]
    bits, computed = record.split([record.shape[-1] - 4, 4], dim=-1)
    return GlobalMap(
        bits,
        Counts(of_queries, of_keys, computed.clone(memory_format=torch.contiguous_format).view(torch.int32)[..., 0]),
    )


def gather_counts(queries: Clusters, keys: Clusters, group: Group) -> tuple[Tensor, Tensor]:
    """Returns each shard's tokens in each query and key cluster, int32 [P, H, C]; every rank of `group` must enter."""
    sides = [side.permutation.offsets.diff(dim=1) for side in (queries, keys)]
    with phase("all-gather"):
        counts = all_gather(torch.cat(sides, dim=1), group)
    of_queries, of_keys = counts.split([side.shape[1] for side in sides], dim=2)
    return of_queries, of_keys


def sides_of(queries: Clusters, keys: Clusters, bias: Tensor | None, heads: Tensor | slice = slice(None)) -> Sides:
    """Returns what the map of some heads, int64 [heads], is made from."""
    weights = None if bias is None else bias[heads]
    return Sides(queries.centroids[heads], queries.sizes[heads], keys.centroids[heads], keys.sizes[heads], weights)


def mean_over(H: int, group: Group) -> Callable[[Tensor], Tensor]:
    """Returns what averages the densities of `own_heads` of every rank over H heads, fp32 [1]."""
    return lambda shares: all_gather(shares.contiguous(), group).flatten()[:H].mean()[None]


def own_heads(H: int, ranks: Ranks, device: torch.device) -> Tensor:
    """Returns the heads whose maps this rank makes, int64 [⌈H / P⌉].

    Beyond the last head the first ones come again, so that all shares are equally large; what they give is dropped.
    """
    share = -(-H // ranks.mesh.sequence)
    return (ranks.shard * share + torch.arange(share, device=device)) % H


def pack_bits(selected: Tensor) -> Tensor:
    """Returns bool [..., C] as uint8 [..., ⌈C / 8⌉]: eight a byte, the first in the lowest bit."""
    padded = torch.nn.functional.pad(selected.view(torch.uint8), (0, -selected.shape[-1] % 8))
    bits: Tensor = padded.unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8, device=selected.device)
    return bits.sum(-1, dtype=torch.uint8)
