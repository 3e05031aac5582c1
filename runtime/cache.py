"""What a job remembers from step to step: clusters, plans and exchanges, per (layer, branch)."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from semvid.kernels.layout import Clusters, Plan
from semvid.parallel.exchange import Counts, Exchange
from semvid.parallel.maps import pack_bits


class Memory(NamedTuple):
    """One layer's and branch's clusters, their order among them, and what follows from them."""

    queries: Clusters
    keys: Clusters
    density: Tensor
    """fp32 [H]: the share of token pairs that are computed, over all ranks."""
    plans: list[Plan]
    """What this rank computes: one plan where it has the whole sequence, else one for each hop of the exchange. None
    yet where the memory comes from a checkpoint."""
    exchange: Exchange | None = None
    """Which rows go where; None where the sequence is whole."""
    bits: Tensor | None = None
    """uint8 [H, Cq, ⌈Ck / 8⌉]: the map of all heads; None where the plan has it."""
    counts: Counts | None = None
    """What an exchange is planned from, where the memory comes from a checkpoint."""

    def map_bits(self) -> Tensor:
        """Returns the map of all heads, uint8 [H, Cq, ⌈Ck / 8⌉]: eight key clusters a byte, the first lowest."""
        return pack_bits(self.plans[0].block_map.selected) if self.bits is None else self.bits


@dataclass(slots=True)
class Cache:
    """The memories of one job."""

    memories: dict[tuple[int, str], Memory] = field(default_factory=dict)
    dense: dict[tuple[object, ...], Exchange] = field(default_factory=dict)
    """Exchanges of dense calls, which hang on sizes alone."""

    def get(self, layer: int, branch: str) -> Memory | None:
        """Returns the memory of a layer and branch, None before its first refresh."""
        return self.memories.get((layer, branch))

    def put(self, layer: int, branch: str, memory: Memory) -> None:
        """Keeps `memory` in place of the one before."""
        self.memories[layer, branch] = memory

    def reset(self) -> None:
        """Forgets everything: a new job begins."""
        self.memories.clear()
        self.dense.clear()
