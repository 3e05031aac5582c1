"""A case: one thing that a benchmark checks and then times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from semvid.launch.bench.kernels.checks import Check


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing to check and to time."""

    name: str
    call: Callable[[], Any]
    check: Callable[[Any], Check]
    """Of what `call` returned."""
    useful_flops: int | None = None
    executed_flops: int | None = None
    """With padding; None where it can't be counted."""
    moved_bytes: int | None = None
    """What must be read and written at least; None where memory is not what bounds it."""
    beside: str | None = None
    """Which of our ops a peer stands beside."""
    dense: bool = False
    """Whether it computes all pairs."""
    part: Callable[[], Any] | None = None
    """Of a whole call, what is timed alternately with it: what the rest costs is the difference."""
