"""What a job remembers from step to step: clusters, maps and exchanges, per (layer, branch).

Of every layer and branch: what is long to find and short to keep. Plans, made in no time from map and runs and longer
than both, are not kept, nor are orders: they follow from the labels.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.layout import Clusters, Permutation
from semvid.parallel.arrival import OnItsWay
from semvid.parallel.direct import Cut, DirectExchange
from semvid.parallel.exchange import Counts, Exchange
from semvid.runtime.attention.schedule import Refreshed

AnyExchange = Exchange | DirectExchange

# Labels below it are kept in 16 bits.
SHORT = 1 << 15


class Changed:
    """How many labels a refresh changed, on its way to the host; read a step later, when it has long arrived."""

    def __init__(self, count: Tensor, labels: int) -> None:
        """Starts the copy of `count`, int32 [1] and the same on every rank, of so many `labels` in all."""
        self.count = count
        self._labels = labels
        self._count = OnItsWay(count)

    def share(self) -> float:
        """Returns the share of labels that changed, 0 .. 1."""
        return int(self._count.wait()) / self._labels


class Memory(NamedTuple):
    """One layer's and branch's clusters, their order among them, and what follows from them."""

    queries: Clusters
    keys: Clusters
    density: Tensor
    """fp32 [H]: the share of token pairs that are computed, over all ranks."""
    bits: Tensor
    """uint8 [H, Cq, ⌈Ck / 8⌉]: the map of all heads, of video clusters: eight key clusters a byte, the first lowest."""
    exchange: AnyExchange | None = None
    """Which rows go where; None where the sequence is whole."""
    counts: Counts | None = None
    """What an exchange is planned from, where the memory comes from a checkpoint or was cut by the loads of the refresh
    before; else None."""
    log_n: Tensor | None = None
    """fp32 [H, Ck]: what stand-ins weigh, see `semvid.parallel.tail`; None without a tail."""
    step: int = 0
    """Of this refresh."""
    interval: int = 0
    """Steps since the refresh before it, as they were planned; 0: it was seeded."""
    drift: Changed | float | None = None
    """The share of labels that it changed, or what will tell it; None where nobody counts."""
    anchored: Permutation | None = None
    """The order of this rank's queries and anchors, see `semvid.parallel.anchors`; None without anchors. Empty where it
    is `short`."""
    ready: bool = True
    """Whether there is what a call needs beside orders. Not where the memory comes from a checkpoint or from another
    rank, and not where that of a whole sequence is `short`: it needs them in every call."""
    cut: Cut | None = None
    """How the exchange is to be cut, where the memory comes from a checkpoint of as many ranks; else None."""

    def refreshed(self) -> Refreshed:
        """Returns what the schedule reads; waits for a count that is on its way."""
        drift = self.drift.share() if isinstance(self.drift, Changed) else self.drift
        return Refreshed(self.step, self.interval, drift)

    def short(self) -> "Memory":
        """Returns what is kept of it: no order, and labels in 16 bits if they fit.

        At Wan 14B 720p that is 1.5 GiB of 2.8 for a branch; grouping the labels again takes 0.3 ms of a call's 69. An
        exchange has the orders in its lists; what else needs them takes them from
        `semvid.runtime.attention.refresh.with_orders`.
        """
        short = self._replace(queries=_short(self.queries), keys=_short(self.keys))
        if self.exchange is None:
            return short._replace(anchored=None, ready=False)
        return short._replace(anchored=None if self.anchored is None else no_order(self.queries.labels))


@dataclass(slots=True)
class Cache:
    """The memories of one job."""

    memories: dict[tuple[int, str], Memory] = field(default_factory=dict)
    dense: dict[tuple[object, ...], AnyExchange] = field(default_factory=dict)
    """Exchanges of dense calls, which hang on sizes alone."""

    def get(self, layer: int, branch: str) -> Memory | None:
        """Returns the memory of a layer and branch, None before its first refresh."""
        return self.memories.get((layer, branch))

    def put(self, layer: int, branch: str, memory: Memory) -> None:
        """Keeps what is `short` of `memory` in place of the one before."""
        self.memories[layer, branch] = memory.short()

    def reset(self) -> None:
        """Forgets everything: a new job begins."""
        self.memories.clear()
        self.dense.clear()


def no_order(labels: Tensor) -> Permutation:
    """Returns what stands in for the order of labels that is not kept."""
    none = labels.new_empty(0, 0, dtype=torch.int32)
    return Permutation(none, none)


def _short(side: Clusters) -> Clusters:
    """Returns clusters with short labels and without their order."""
    labels = side.labels.to(torch.int16) if side.centroids.shape[1] <= SHORT else side.labels
    return side._replace(labels=labels, permutation=no_order(labels))
