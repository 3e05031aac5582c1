"""Which backend of the ops runs here: "reference" anywhere, "triton" where a GPU (or its interpreter) is there."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.layout import BlockMap, Permutation, Plan

BACKENDS = ("auto", "reference")


class Ops(NamedTuple):
    """One backend's ops; signatures as in `reference`."""

    name: str
    assign: Callable[[Tensor, Tensor], Tensor]
    cluster_sums: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    group: Callable[[Tensor, int], Permutation]
    gather_rows: Callable[[Tensor, Tensor], Tensor]
    scatter_rows: Callable[[Tensor, Tensor], Tensor]
    top_p_map: Callable[[Tensor, Tensor, Tensor, float, float], BlockMap]
    density: Callable[[BlockMap, Tensor, Tensor], Tensor]
    plan: Callable[[Tensor, Tensor, BlockMap], Plan]
    attention: Callable[..., tuple[Tensor, Tensor]]
    merge: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _collect(name: str, *modules: ModuleType) -> Ops:
    """Returns the ops of a backend, each from the first module that has it."""
    found = {op: next(getattr(m, op) for m in modules if hasattr(m, op)) for op in Ops._fields[1:]}
    return Ops(name, **found)


def missing(backend: str, device: torch.device) -> str | None:
    """Returns why `backend` cannot run on `device`, or None if it can."""
    if backend == "reference":
        return None
    raise ValueError(f"backend is {backend!r}; accepted: {', '.join(BACKENDS)}")


def select(backend: str, device: torch.device) -> Ops:
    """Returns the ops of `backend`; "auto" takes the fastest that runs on `device`.

    Raises:
        ValueError: no such backend, or it cannot run here (the message says why).
    """
    if backend == "auto":
        backend = next(name for name in BACKENDS[:0:-1] if missing(name, device) is None)
    reason = missing(backend, device)
    if reason is not None:
        raise ValueError(f"backend is {backend!r}, which cannot run on {device}: {reason}")
    return _collect("reference", reference)
