"""Global k-means over sequence shards: local labels and sums, one all-reduce, the same centroids on every rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import Clusters
from semvid.parallel.collectives import Group, all_reduce_sum
from semvid.parallel.phases import phase


def refine(
    xs: Sequence[Tensor], starts: Sequence[Tensor], iterations: int, ops: Ops, group: Group = None
) -> list[Clusters]:
    """Returns the clusters of each x after Lloyd's iterations from its starting centroids.

    Each iteration labels the local tokens, sums them per cluster, and all-reduces the sums and counts of all xs in
    one buffer. Labels and order belong to the last assignment; centroids and sizes are the means and counts of those
    labels over all ranks. An empty cluster keeps its centroid.

    Args:
        xs: local tokens, [H, n, D] each (queries and keys).
        starts: fp32 [H, C, D] each, the same on every rank.
        iterations: 1 or more.
        ops: the backend.
        group: the ranks that share the sequence; every one must enter.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; accepted: 1 or more")
    centroids, labels, orders, counts = list(starts), [], [], []
    for _ in range(iterations):
        with phase("cluster"):
            labels = [ops.assign(x, c) for x, c in zip(xs, centroids, strict=True)]
            orders = [ops.group(label, c.shape[1]) for label, c in zip(labels, centroids, strict=True)]
            sums = [ops.sums_by_runs(x, order) for x, order in zip(xs, orders, strict=True)]
        with phase("all-reduce"):
            reduced = all_reduce_sum([part for pair in sums for part in pair], group)
        with phase("cluster"):
            totals, counts = reduced[0::2], reduced[1::2]
            centroids = [_means(*parts) for parts in zip(totals, counts, centroids, strict=True)]
    return [Clusters(*parts) for parts in zip(labels, centroids, counts, orders, strict=True)]


def random_tokens(
    x: Tensor,
    C: int,
    key: Sequence[int],
    tokens: int,
    first: int = 0,
    group: Group = None,
    first_head: int = 0,
) -> Tensor:
    """Returns C different tokens of each head as starting centroids, fp32 [H, C, D], the same on every rank.

    Which tokens follows from `key`, the head and the token's place in the whole sequence alone: not from the
    number of ranks, the device or a generator's state. Every token gets a 63-bit hash; the C smallest win.

    Args:
        x: local tokens, [H, n, D].
        C: 1 .. tokens.
        key: whole numbers that name the draw (job seed, layer, branch, step, queries or keys).
        tokens: length of the whole sequence over all ranks.
        first: place of the first local token in the whole sequence.
        group: the ranks that share the sequence; every one must enter.
        first_head: the model's number of x's first head.
    """
    if not 1 <= C <= tokens:
        raise ValueError(f"C is {C}; accepted: 1 .. {tokens}, the tokens")
    H, n, D = x.shape
    heads = torch.arange(first_head, first_head + H, dtype=torch.int64, device=x.device)[:, None]
    hashes = heads.new_zeros(1)
    for part in key:
        hashes = _mix(hashes + part)
    hashes = _mix(_mix(hashes + heads) + torch.arange(tokens, dtype=torch.int64, device=x.device))
    chosen = hashes.bitwise_and_((1 << 63) - 1).topk(C, dim=-1, largest=False, sorted=True).indices - first
    here = (chosen >= 0) & (chosen < n)
    mine = torch.zeros(H, C, D, device=x.device)
    if n > 0:
        rows = torch.gather(x, 1, chosen.clamp(0, n - 1)[..., None].expand(H, C, D))
        mine = torch.where(here[..., None], rows.float(), 0.0)
    return all_reduce_sum([mine], group)[0]


def _means(sums: Tensor, counts: Tensor, previous: Tensor) -> Tensor:
    return torch.where((counts > 0)[..., None], sums / counts.clamp(min=1)[..., None], previous)


def _mix(z: Tensor) -> Tensor:
    """Returns splitmix64's finalizer of int64 `z` (Steele, Lea, Flood 2014), products modulo 2^64."""
    z = z + -7046029254386353131
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Returns z shifted right with zeros coming in; torch's own shift brings in the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
