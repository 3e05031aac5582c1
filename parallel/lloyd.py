"""One of Lloyd's iterations over local tokens, and its launches recorded once and replayed.

With few tokens a rank, launching some forty kernels an iteration takes longer than what they compute (1 to 2 ms of the
host's time, 0.4 of an H200's with 12 heads of 16,380 tokens): replayed from a CUDA graph they are one launch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import Permutation
from semvid.parallel.collectives import joined, split

# Tokens of all xs that are copied to where the recorded launches read them. With three times as many the device is busy
# for as long as the host launches, and the copies would take memory worth having.
LIMIT_BYTES = 128 << 20
# So many iterations in a row, as in the first refresh, have no work beside them that would keep the device busy while
# the host launches, and the slowest rank's host is everyone's: more tokens are worth it, until a call has fewer.
MANY = 10
LIMIT_BYTES_OF_MANY = 512 << 20

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs what launches work, or not, and returns what launches the same work again."""


class Local(NamedTuple):
    """What one rank's tokens say of clusters."""

    labels: list[Tensor]
    orders: list[Permutation]
    sums: list[Tensor]
    """Sums and counts of the first x, then those of the next."""


def label(xs: Sequence[Tensor], centroids: Sequence[Tensor], ops: Ops) -> Local:
    """Returns the nearest centroids of the tokens, and the sums of each cluster's.

    Args:
        xs: [H, n, D] each.
        centroids: fp32 [H, C, D] each.
        ops: the backend.
    """
    labels = [ops.assign(x, c) for x, c in zip(xs, centroids, strict=True)]
    orders = [ops.group(of_x, c.shape[1]) for of_x, c in zip(labels, centroids, strict=True)]
    sums = [ops.sums_by_runs(x, order) for x, order in zip(xs, orders, strict=True)]
    return Local(labels, orders, [part for pair in sums for part in pair])


def updated(reduced: Sequence[Tensor], centroids: Sequence[Tensor], ops: Ops) -> list[Tensor]:
    """Returns new centroids from the sums and counts of each x over all ranks; an empty cluster keeps its centroid."""
    pairs = zip(reduced[0::2], reduced[1::2], centroids, strict=True)
    return [ops.centroids_of(sums, counts, before) for sums, counts, before in pairs]


class Recorded:
    """An iteration over tokens of certain shapes, at fixed places in memory."""

    def __init__(self, xs: Sequence[Tensor], starts: Sequence[Tensor], ops: Ops, record: Record) -> None:
        """Runs it once, so that everything is compiled, and records it."""
        self._ops = ops
        self._xs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
        self.centroids = [torch.empty_like(start) for start in starts]
        self.begin(xs, starts)
        self._found = label(self._xs, self.centroids, ops)
        self.buffer = joined(self._found.sums)
        self._update()
        self._replay_label, self._replay_update = record(self._label), record(self._update)

    def begin(self, xs: Sequence[Tensor], starts: Sequence[Tensor]) -> None:
        """Copies tokens and starting centroids to their places."""
        for place, given in zip([*self._xs, *self.centroids], [*xs, *starts], strict=True):
            place.copy_(given)

    def label(self) -> None:
        """Labels the tokens; `buffer`, fp32, has the sums and counts then, for an all-reduce in place."""
        self._replay_label()

    def update(self) -> None:
        """Makes new centroids from `buffer`."""
        self._replay_update()

    def found(self) -> Local:
        """Returns what the last `label` found; its sums (not labels, orders and counts) last until the next one."""
        labels, orders, sums = self._found
        counts = [part.clone() if i % 2 else part for i, part in enumerate(sums)]
        return Local(
            [x.clone() for x in labels], [Permutation(*(x.clone() for x in order)) for order in orders], counts
        )

    def _label(self) -> None:
        self._found = label(self._xs, self.centroids, self._ops)
        joined(self._found.sums, out=self.buffer)

    def _update(self) -> None:
        parts = split(self.buffer, self._found.sums)
        for sums, counts, place in zip(parts[0::2], parts[1::2], self.centroids, strict=True):
            self._ops.centroids_of(sums, counts, place, out=place)


class Recordings:
    """The recorded iterations of a job, one for each shape that came by."""

    def __init__(
        self,
        record: Record | None = None,
        limit_bytes: int = LIMIT_BYTES,
        limit_bytes_of_many: int = LIMIT_BYTES_OF_MANY,
    ) -> None:
        """Records by `record`, on any device; without one, as CUDA graphs, on GPUs alone."""
        self._record = record
        self._limit, self._limit_of_many = limit_bytes, limit_bytes_of_many
        self._known: dict[tuple[object, ...], Recorded] = {}

    def begun(self, xs: Sequence[Tensor], starts: Sequence[Tensor], ops: Ops, iterations: int) -> Recorded | None:
        """Returns the iteration over tokens of such shapes, begun; None where launching it anew is as well, or where
        somebody else is recording the call: graphs don't nest.
        """
        size = sum(x.numel() * x.element_size() for x in xs)
        key = (ops.name, *((x.shape, x.dtype, x.device, start.shape) for x, start in zip(xs, starts, strict=True)))
        if size == 0 or size > (self._limit_of_many if iterations >= MANY else self._limit):
            # Its tokens' memory is wanted elsewhere now.
            self._known.pop(key, None)
            return None
        if not (self._record or _can_record(xs[0])):
            return None
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Recorded(xs, starts, ops, self._record or _graph)
        known.begin(xs, starts)
        return known

    def clear(self) -> None:
        """Frees them."""
        self._known.clear()


def _can_record(x: Tensor) -> bool:
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def _graph(body: Callable[[], None]) -> Callable[[], None]:
    """Returns what replays the launches of `body` as a CUDA graph. Other threads may use the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        body()
    return graph.replay
