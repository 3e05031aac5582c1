"""Tensors on their way from a GPU into host memory, beside the GPU's work."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Where each tensor begins: what any dtype may be viewed at.
ALIGNMENT = 16


class Staged:
    """Tensors as they are now, copied by whoever asks for them."""

    def __init__(self, copy: Callable[[], dict[str, Tensor]]) -> None:
        self._copy = copy

    def wait(self) -> dict[str, Tensor]:
        """Copies them and returns them in host memory; once, from any thread."""
        return self._copy()


class Staging:
    """Host memory for one set of tensors at a time; page-locked, so that the GPU writes it by itself, and kept."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._stream: Any = None

    def copied(self, tensors: Mapping[str, Tensor]) -> Staged:
        """Returns what copies tensors as they are at this point of the current stream; waits for nothing.

        What was returned before is overwritten. Tensors on the CPU are taken as they are.

        Args:
            tensors: of any dtypes, all on one GPU or on the CPU; nobody writes into them until `wait` has returned.
        """
        there = {name: x.detach().contiguous() for name, x in tensors.items()}
        devices = [x.device for x in there.values() if x.is_cuda]
        if not devices:
            return Staged(lambda: there)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(devices[0]))
        return Staged(lambda: self._copied(there, devices[0], ready))

    def _copied(self, there: dict[str, Tensor], device: torch.device, ready: Any) -> dict[str, Tensor]:
        """Returns `there` in host memory, and lets go of what was on the device, where `ready` has been recorded."""
        moved = {name: x for name, x in there.items() if x.is_cuda}
        sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in moved.values()]
        # In this thread another device may be the current one.
        with torch.cuda.device(device):
            if self._memory.numel() < sum(sizes):
                # Locking pages takes a second a gigabyte: of the one who waits, not of the one who computes.
                self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
            self._stream = self._stream or torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                for (name, x), part in zip(moved.items(), self._memory[: sum(sizes)].split(sizes), strict=True):
                    there[name] = part[: x.nbytes].view(x.dtype).view(x.shape).copy_(x, non_blocking=True)
            # Until now nobody else may have the memory of what is copied.
            self._stream.synchronize()
        return there
