"""How much of attention is computed: the share of token pairs, counted over calls and ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from semvid.parallel.collectives import Group, all_gather


@dataclass(frozen=True, slots=True)
class Density:
    """Share of token pairs computed, and the self-attention calls it is the mean of."""

    sparse: float
    """Mean over the sparse calls; 1 if there were none."""
    sparse_calls: int
    dense_calls: int

    @property
    def calls(self) -> int:
        """All self-attention calls."""
        return self.sparse_calls + self.dense_calls

    @property
    def overall(self) -> float:
        """Mean over all self-attention calls, dense ones counting 1."""
        return (self.sparse * self.sparse_calls + self.dense_calls) / self.calls if self.calls else 1.0

    def minus(self, before: "Density") -> "Density":
        """Returns what was added since `before`."""
        calls = self.sparse_calls - before.sparse_calls
        added = self.sparse * self.sparse_calls - before.sparse * before.sparse_calls
        return Density(added / calls if calls else 1.0, calls, self.dense_calls - before.dense_calls)


@dataclass(slots=True)
class DensityMeter:
    """Counts calls; the densities stay on the device until they are asked for."""

    total: Tensor | None = None
    sparse_calls: int = 0
    dense_calls: int = 0

    def count_dense(self) -> None:
        """Counts a dense self-attention call."""
        self.dense_calls += 1

    def count_sparse(self, density: Tensor) -> None:
        """Counts a sparse self-attention call of density fp32 [H]; does not wait for the device."""
        mean = density.double().mean()
        self.total = mean if self.total is None else self.total + mean
        self.sparse_calls += 1

    def read(self, group: Group = None, device: torch.device | None = None) -> Density:
        """Returns the densities so far, the same on every rank; waits for the device.

        Args:
            group: the ranks that ran other calls, one for each branch; every one must enter. Those that share a
                sequence count the same calls alike, so they are left out.
            device: one that `group` exchanges tensors on.
        """
        mine = torch.tensor([0, self.sparse_calls, self.dense_calls], dtype=torch.float64, device=device)
        if self.total is not None:
            mine[0] = self.total
        total, sparse_calls, dense_calls = all_gather(mine, group).sum(0).tolist()
        return Density(total / sparse_calls if sparse_calls else 1.0, int(sparse_calls), int(dense_calls))

    def resume(self, density: Density) -> None:
        """Counts on from the calls of an earlier run."""
        self.total = torch.tensor(density.sparse * density.sparse_calls, dtype=torch.float64)
        self.sparse_calls, self.dense_calls = density.sparse_calls, density.dense_calls

    def reset(self) -> None:
        """Forgets all calls."""
        self.total, self.sparse_calls, self.dense_calls = None, 0, 0
