"""Global k-means over sequence shards: local labels and sums, one all-reduce, the same centroids on every rank."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import Clusters
from semvid.parallel.collectives import Group, all_reduce_in_place, all_reduce_sum
from semvid.parallel.lloyd import Local, Recordings, label, updated
from semvid.parallel.phases import phase


class Refined(NamedTuple):
    """What `refine_with` found."""

    clusters: list[Clusters]
    sums: list[Tensor]
    """Of each rider, fp32 [H, C, E], over all ranks."""
    changed: Tensor | None
    """int32 [1]: labels of all xs that differ from those before, over heads and ranks; None if none were given."""


def refine(
    xs: Sequence[Tensor], starts: Sequence[Tensor], iterations: int, ops: Ops, group: Group = None
) -> list[Clusters]:
    """Returns the clusters of each x after Lloyd's iterations from its starting centroids; see `refine_with`."""
    return refine_with(xs, starts, iterations, ops, group).clusters


def refine_with(
    xs: Sequence[Tensor],
    starts: Sequence[Tensor],
    iterations: int,
    ops: Ops,
    group: Group = None,
    *,
    riders: Sequence[Tensor] = (),
    before: Sequence[Tensor] = (),
    recordings: Recordings | None = None,
) -> Refined:
    """Returns the clusters of each x after Lloyd's iterations from its starting centroids, and what rode along.

    Each iteration labels the local tokens, sums them per cluster, and all-reduces the sums and counts of all xs in
    one buffer. Labels and order belong to the last assignment; centroids and sizes are the means and counts of those
    labels over all ranks. An empty cluster keeps its centroid. In the last iteration's buffer ride the sums of other
    rows by the same labels, and how many labels have changed.

    Args:
        xs: local tokens, [H, n, D] each (queries and keys).
        starts: fp32 [H, C, D] each, the same on every rank.
        iterations: 1 or more.
        ops: the backend.
        group: the ranks that share the sequence; every one must enter.
        riders: local rows, [H, n, E] each, summed by the labels of the last x (values by those of keys).
        before: int32 labels [H, n] of each x of an earlier step, or nothing.
        recordings: of the job, to replay launches where they take longer than the work; the result is the same.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; accepted: 1 or more")
    centroids, found = _iterated(xs, starts, iterations, ops, group, recordings)
    with phase("cluster"):
        ridden = [ops.sums_by_runs(rider, found.orders[-1])[0] for rider in riders]
        changed = [_num_changed(found.labels, before)] if before else []
    with phase("all-reduce"):
        reduced = all_reduce_sum([*found.sums, *ridden, *changed], group)
    with phase("cluster"):
        centroids = updated(reduced[: 2 * len(xs)], centroids, ops)
    counts = reduced[1 : 2 * len(xs) : 2]
    clusters = [Clusters(*parts) for parts in zip(found.labels, centroids, counts, found.orders, strict=True)]
    rest = reduced[2 * len(xs) :]
    return Refined(clusters, rest[: len(riders)], rest[-1] if before else None)


def means_of(xs: Sequence[Tensor], clusters: Clusters, ops: Ops, group: Group = None) -> list[Tensor]:
    """Returns the mean of each x over clusters that are kept, fp32 [H, C, E]; 0 where a cluster is empty.

    Args:
        xs: local rows, [H, n, E] each, in the order of `clusters`.
        clusters: of an earlier step; runs of their order beyond them (a prompt's) are left out.
        ops: the backend.
        group: the ranks that share the sequence; every one must enter, for one all-reduce.
    """
    with phase("means"):
        C = clusters.sizes.shape[1]
        sums = [ops.sums_by_runs(x, clusters.permutation)[0][:, :C] for x in xs]
    with phase("all-reduce"):
        reduced = all_reduce_sum(sums, group)
    with phase("means"):
        return [over(x, clusters.sizes) for x in reduced]


def over(sums: Tensor, sizes: Tensor) -> Tensor:
    """Returns sums [H, C, E] over sizes [H, C]: means, 0 where a cluster is empty."""
    return sums / sizes.clamp(min=1)[..., None]


def _iterated(
    xs: Sequence[Tensor],
    starts: Sequence[Tensor],
    iterations: int,
    ops: Ops,
    group: Group,
    recordings: Recordings | None,
) -> tuple[list[Tensor], Local]:
    """Returns the centroids before the last of so many iterations, and what this rank's tokens say in the last."""
    with phase("cluster"):
        recorded = None if recordings is None else recordings.begun(xs, starts, ops, iterations)
    if recorded is not None:
        for _ in range(iterations - 1):
            with phase("cluster"):
                recorded.label()
            with phase("all-reduce"):
                all_reduce_in_place(recorded.buffer, group)
            with phase("cluster"):
                recorded.update()
        with phase("cluster"):
            recorded.label()
            return recorded.centroids, recorded.found()
    centroids = list(starts)
    for _ in range(iterations - 1):
        with phase("cluster"):
            found = label(xs, centroids, ops)
        with phase("all-reduce"):
            reduced = all_reduce_sum(found.sums, group)
        with phase("cluster"):
            centroids = updated(reduced, centroids, ops)
    with phase("cluster"):
        return centroids, label(xs, centroids, ops)


def _num_changed(labels: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    pairs = zip(labels, before, strict=True)
    return torch.stack([(new != old).sum() for new, old in pairs]).sum(dtype=torch.int32)[None]
