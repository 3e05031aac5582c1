"""Where a call is and where its time goes: named phases, timed on the device while somebody records, else free.

Collectives are told as well: between two phases they say which rank has come to a meeting and which has not.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

_recorder: "Recorder | None" = None
_listener: Callable[[str], None] | None = None
_counter: Callable[[], None] | None = None


class Recorder:
    """Collects the spans of phases between `recording`'s beginning and end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []

    def mark(self, on_host: bool) -> Any:
        """Returns a point in the device's or in the host's time."""
        if on_host or self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, begin: Any, end: Any) -> None:
        """Adds a span between two marks."""
        self._spans.append((name, begin, end))

    def milliseconds(self) -> dict[str, float]:
        """Returns the time of each phase, in ms, in the order in which they first began; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total: dict[str, float] = {}
        for name, begin, end in self._spans:
            took = 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)
            total[name] = total.get(name, 0.0) + took
        return total

    def take(self) -> dict[str, float]:
        """Returns what `milliseconds` does, and begins anew."""
        found = self.milliseconds()
        self._spans.clear()
        return found


@contextlib.contextmanager
def recording(device: torch.device) -> Iterator[Recorder]:
    """Records the phases of what runs inside, on this process's device."""
    global _recorder
    before, _recorder = _recorder, Recorder(device)
    try:
        yield _recorder
    finally:
        _recorder = before


@contextlib.contextmanager
def telling(listener: Callable[[str], None]) -> Iterator[None]:
    """Calls `listener` with the name of each phase that begins inside."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@contextlib.contextmanager
def counting(counter: Callable[[], None]) -> Iterator[None]:
    """Calls `counter` before each collective that this process enters inside."""
    global _counter
    before, _counter = _counter, counter
    try:
        yield
    finally:
        _counter = before


def enter() -> None:
    """Tells whoever counts that this rank enters a collective: from here it may wait for the others."""
    if _counter is not None:
        _counter()


@contextlib.contextmanager
def phase(name: str, *, on_host: bool = False) -> Iterator[None]:
    """Names what runs inside, for whoever records or listens.

    Args:
        name: spans of one name are added up.
        on_host: the host's time is meant; otherwise what the current stream did, waiting for a collective included.
    """
    if _listener is not None:
        _listener(name)
    recorder = _recorder
    if recorder is None:
        yield
        return
    begin = recorder.mark(on_host)
    yield
    recorder.add(name, begin, recorder.mark(on_host))
