"""What a job remembers from step to step: clusters and plans, per (layer, branch)."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from semvid.kernels.layout import Clusters, Plan


class Memory(NamedTuple):
    """One layer's and branch's clusters, their order among them, and what follows from them."""

    queries: Clusters
    keys: Clusters
    plan: Plan
    density: Tensor
    """fp32 [H]: the share of token pairs that the plan computes."""


@dataclass(slots=True)
class Cache:
    """The memories of one job."""

    memories: dict[tuple[int, str], Memory] = field(default_factory=dict)

    def get(self, layer: int, branch: str) -> Memory | None:
        """Returns the memory of a layer and branch, None before its first refresh."""
        return self.memories.get((layer, branch))

    def put(self, layer: int, branch: str, memory: Memory) -> None:
        """Keeps `memory` in place of the one before."""
        self.memories[layer, branch] = memory

    def reset(self) -> None:
        """Forgets everything: a new job begins."""
        self.memories.clear()
