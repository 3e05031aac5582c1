"""Which backend of the ops runs here.

"reference" runs anywhere, "triton" on a GPU (or, for tests, in its interpreter), "hopper" on a Hopper GPU; what hopper
has no kernel for, or none that the installed Triton can compile, triton does.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.layout import BlockMap, Permutation, Plan, Rows8, Shared, Way

_TRITON = ("kmeans", "permute", "top_p", "runs", "attention", "merge", "rotary", "routes", "fused", "fp8")
# Each backend's modules, an op is taken from the first that has it; the best backend comes last.
MODULES = {
    "reference": ("reference",),
    "triton": _TRITON,
    "hopper": ("hopper_assign", "hopper_attention", *_TRITON),
}
BACKENDS = ("auto", *MODULES)
OLDEST_GPU = (8, 0)
# The first release of Triton whose Gluon has what the Hopper kernels use.
OLDEST_GLUON = (3, 6)
# The first whose Gluon lacks something that a module needs: a view that begins at any row of shared memory.
GLUON_WITHOUT = {"hopper_attention": (3, 8)}


class Ops(NamedTuple):
    """One backend's ops; signatures as in `reference`."""

    name: str
    assign: Callable[[Tensor, Tensor], Tensor]
    cluster_sums: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    sums_by_runs: Callable[[Tensor, Permutation], tuple[Tensor, Tensor]]
    centroids_of: Callable[..., Tensor]
    group: Callable[[Tensor, int], Permutation]
    gather_rows: Callable[[Tensor, Tensor], Tensor]
    scatter_rows: Callable[..., Tensor]
    scatter_among: Callable[[Tensor, Way, Shared], None]
    gather_among: Callable[[Shared, Way, Tensor], None]
    top_p_map: Callable[..., BlockMap]
    density: Callable[[BlockMap, Tensor, Tensor], Tensor]
    plan: Callable[[Tensor, Tensor, BlockMap], Plan]
    attention: Callable[..., tuple[Tensor, Tensor]]
    merge: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    norm_rotary: Callable[[Tensor, Tensor, float, Tensor, Tensor, int], Tensor]
    add_gated: Callable[..., Tensor]
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    add_norm8: Callable[..., tuple[Tensor, Rows8]]
    quantize_rows: Callable[..., Rows8]
    linear8: Callable[[Rows8, Rows8, Tensor | None, torch.dtype], Tensor]
    source_rows: Callable[..., list[Tensor]]
    target_rows: Callable[[Tensor, Tensor, Tensor, int, int, int], tuple[Tensor, Tensor]]
    addresses: Callable[[Tensor, int, int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    unpack_map: Callable[[Tensor, Tensor, int], Tensor]


def missing(backend: str, device: torch.device) -> str | None:
    """Returns why `backend` cannot run on `device`, or None if it can.

    Raises:
        ValueError: no such backend.
    """
    if backend not in MODULES:
        raise ValueError(f"backend is {backend!r}; accepted: {', '.join(BACKENDS)}")
    if backend == "reference":
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if backend == "hopper":
        return _missing_hopper(device)
    if device.type != "cuda":
        return None if interpreted() else f"it needs an NVIDIA GPU, not {device}"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_GPU:
        return f"it needs compute capability 8.0 or newer, this GPU has {found[0]}.{found[1]}"
    return None


def select(backend: str, device: torch.device) -> Ops:
    """Returns the ops of `backend`; "auto" takes the fastest that runs on `device`.

    Raises:
        ValueError: no such backend, or it cannot run here (the message says why).
    """
    if backend == "auto":
        # The interpreter is for tests: on a CPU the reference is faster.
        usable = [name for name in MODULES if missing(name, device) is None]
        backend = usable[-1] if device.type == "cuda" else "reference"
    reason = missing(backend, device)
    if reason is not None:
        raise ValueError(f"backend is {backend!r}, which cannot run here: {reason}")
    modules = [importlib.import_module(f"semvid.kernels.{name}") for name in _modules(backend)]
    return Ops(backend, **{op: next(getattr(m, op) for m in modules if hasattr(m, op)) for op in Ops._fields[1:]})


def lacks(backend: str) -> str | None:
    """Returns what a backend that runs here leaves to another one, and why; None if nothing."""
    left = [name for name in MODULES[backend] if name not in _modules(backend)]
    if not left:
        return None
    import triton

    ops = ", ".join(name.removeprefix("hopper_") for name in left)
    newest = ".".join(map(str, min(GLUON_WITHOUT[name] for name in left)))
    found = f"found {triton.__version__} (pip install 'triton<{newest}')"
    return f"{ops} by triton: its own needs a triton older than {newest}, {found}"


def _modules(backend: str) -> list[str]:
    """Returns the modules of a backend that the installed Triton has what they need for."""
    if backend == "reference":
        return list(MODULES[backend])
    installed = _triton_version()
    return [name for name in MODULES[backend] if installed < GLUON_WITHOUT.get(name, (1 << 30, 0))]


def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _missing_hopper(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a Hopper GPU (compute capability 9.0), not {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it needs a Hopper GPU (compute capability 9.0), this GPU has {major}.{minor}"
    import triton

    if _triton_version() < OLDEST_GLUON:
        return f"it needs triton 3.6 or newer, found {triton.__version__} (pip install 'triton>=3.6')"
    try:
        # Gluon is experimental: a release may lack it or rename what the kernels use.
        for name in _modules("hopper"):
            importlib.import_module(f"semvid.kernels.{name}")
    except ImportError as error:
        return f"triton {triton.__version__} lacks the Gluon that it needs: {error}"
    return None


def interpreted() -> bool:
    """Returns whether Triton's kernels run in its interpreter, on the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)
