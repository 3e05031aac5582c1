"""Tensors on their way from a GPU into host memory, beside the GPU's work."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Where each tensor begins: what any dtype may be viewed at.
ALIGNMENT = 16


class Staged:
    """Tensors that are being copied."""

    def __init__(self, tensors: dict[str, Tensor], sources: list[Tensor], arrived: Any) -> None:
        self._tensors, self._sources, self._arrived = tensors, sources, arrived

    def wait(self) -> dict[str, Tensor]:
        """Returns them in host memory, when they are there; callable from any thread."""
        if self._arrived is not None:
            self._arrived.synchronize()
        # Until now nobody else may have had their memory.
        self._sources.clear()
        return self._tensors


class Staging:
    """Host memory for one set of tensors at a time; page-locked, so that the GPU writes it by itself, and kept."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._stream: Any = None

    def copied(self, tensors: Mapping[str, Tensor]) -> Staged:
        """Starts the copies and returns; the host waits only where memory must be taken.

        What `wait` returned before is overwritten. Tensors on the CPU are taken as they are.

        Args:
            tensors: of any dtypes; nobody writes into them until `wait` has returned.
        """
        there = {name: x.detach().contiguous() for name, x in tensors.items()}
        moved = {name: x for name, x in there.items() if x.is_cuda}
        if not moved:
            return Staged(there, [], None)
        sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in moved.values()]
        if self._memory.numel() < sum(sizes):
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        device = next(iter(moved.values())).device
        self._stream = self._stream or torch.cuda.Stream(device)
        # Behind what makes them, beside what comes after.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        found = dict(there)
        with torch.cuda.stream(self._stream):
            for (name, x), part in zip(moved.items(), self._memory[: sum(sizes)].split(sizes), strict=True):
                found[name] = part[: x.nbytes].view(x.dtype).view(x.shape).copy_(x, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return Staged(found, list(moved.values()), arrived)
