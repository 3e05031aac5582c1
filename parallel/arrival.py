"""A tensor on its way from the device to the host, which goes on meanwhile."""

from typing import Any

import torch
from torch import Tensor


class OnItsWay:
    """One copy, begun when it is made; on a CPU there is nothing to copy."""

    def __init__(self, x: Tensor) -> None:
        """Starts the copy of x, behind what makes it."""
        self._there = x
        self._arrived: Any = None
        if x.is_cuda:
            self._there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(x.device))

    def wait(self) -> Tensor:
        """Returns it in host memory; waits for the device where it has not come yet."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._there
