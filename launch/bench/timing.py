"""How long a call takes: CUDA events on a GPU, the wall clock on a CPU; and what memory and copying cost there."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# At least so many timed calls, and beyond them no more than fit into so many seconds.
LEAST_REPEATS, SECONDS = 5, 3.0
# Read before each timed call on a GPU: more than the L2 cache of any (60 MB of an H200, 126 MB of a B200).
FLUSH_BYTES = 512 << 20
# The device pauses by counting its own cycles; clocks are some 2 GHz.
CYCLES_PER_S, LONGEST_PAUSE_S = 2e9, 0.02
L2_NOTE = {"cuda": "evicted before each timed call by reading 512 MiB", "cpu": "left as it is"}
CLOCK_NOTE = {
    "cuda": "CUDA events; a call that does not wait is queued behind a pause, so that host_ms is not in its time",
    "cpu": "wall clock",
}


class Times(NamedTuple):
    """Of one call, repeated."""

    median_ms: float
    ms_20: float
    """20th percentile."""
    ms_80: float
    repeats: int
    host_ms: float | None = None
    """How long the host was busy with one call. This and the next two: None on a CPU."""
    waits: bool | None = None
    """Whether the host waited for the device within the call (or was busy for 10 ms)."""
    peak_bytes: int | None = None
    """GPU memory at its highest during a call, less what was there before: outputs and scratch."""


class Extra(NamedTuple):
    """What a whole call takes longer than a part of it, from pairs of the two timed one after the other."""

    median_ms: float
    """Of the pairs' differences, as are the next two."""
    ms_20: float
    ms_80: float
    pairs: int


def time_call(call: Callable[[], Any], device: torch.device, *, warmup: int, repeats: int) -> Times:
    """Returns the times of `call`, which must have run once before: compilation is not warm-up.

    Args:
        call: what; its result is dropped.
        device: where it computes.
        warmup: calls before the timed ones.
        repeats: at most so many timed calls; fewer if they would take more than SECONDS, never below LEAST_REPEATS.
    """
    count = _fitting([call], device, warmup, repeats)
    if device.type == "cpu":
        return Times(*_spread(_wall_ms([call], count)[0]), count)
    peak = _peak_bytes(call, device)
    host_s, waits = _host_s(call, device)
    [ms] = _device_ms([call], device, count, _pause_s(host_s, waits))
    return Times(*_spread(ms), count, host_s * 1e3, waits, peak)


def time_extra(
    whole: Callable[[], Any], part: Callable[[], Any], device: torch.device, *, warmup: int, repeats: int
) -> Extra:
    """Returns what `whole` takes longer than `part`: they take turns, so that both find the same clocks and heat.

    Args:
        whole: what; like `part` it must have run once before.
        part: what it is measured against.
        device: where they compute.
        warmup: pairs before the timed ones.
        repeats: at most so many timed pairs; as for `time_call`.
    """
    count = _fitting([whole, part], device, warmup, repeats)
    if device.type == "cpu":
        both = _wall_ms([whole, part], count)
    else:
        host_s, waits = zip(_host_s(whole, device), _host_s(part, device), strict=True)
        # The same pause before both: the device cools meanwhile.
        both = _device_ms([whole, part], device, count, _pause_s(max(host_s), any(waits)))
    return Extra(*_spread([a - b for a, b in zip(*both, strict=True)]), count)


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value below which `share` (0 .. 1) of the values lie, between neighbours linearly."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    below = int(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (place - below)


def copy_gb_s(device: torch.device) -> float:
    """Returns the copy bandwidth within the device's memory, bytes read and written, in GB/s."""
    size = 1 << (30 if device.type == "cuda" else 24)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = time_call(lambda: target.copy_(source), device, warmup=3, repeats=20)
    return 2 * size / times.median_ms / 1e6


def _spread(ms: Sequence[float]) -> tuple[float, float, float]:
    return percentile(ms, 0.5), percentile(ms, 0.2), percentile(ms, 0.8)


def _fitting(calls: list[Callable[[], Any]], device: torch.device, warmup: int, repeats: int) -> int:
    """Warms up and returns how many of each call fit into SECONDS a call, LEAST_REPEATS .. repeats."""
    for call in calls * warmup:
        call()
    _wait(device)
    begin = time.perf_counter()
    for call in calls:
        call()
    _wait(device)
    once_s = max((time.perf_counter() - begin) / len(calls), 1e-9)
    return min(repeats, max(LEAST_REPEATS, int(SECONDS / once_s)))


def _pause_s(host_s: float, waits: bool) -> float:
    """Returns how long the device pauses while the host queues a call; a call that waits would only begin later."""
    return 0.0 if waits else 1.5 * host_s + 1e-4


def _host_s(call: Callable[[], Any], device: torch.device) -> tuple[float, bool]:
    """Returns the host's seconds of one call, and whether it waits: whether a paused device holds the host up."""
    _wait(device)
    _pause(LONGEST_PAUSE_S)
    begin = time.perf_counter()
    call()
    host_s = time.perf_counter() - begin
    _wait(device)
    if host_s < LONGEST_PAUSE_S / 2:
        return host_s, False
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin, True


def _device_ms(calls: list[Callable[[], Any]], device: torch.device, repeats: int, pause_s: float) -> list[list[float]]:
    """Returns the ms of each call, `repeats` a call; the calls take turns."""
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    _wait(device)
    for call, measured in zip(calls * repeats, events * repeats, strict=True):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Reading leaves no dirty line behind, whose eviction would be charged to the call.
        flush.max()
        if pause_s > 0:
            # Meanwhile the host queues the whole call: what is timed is the device's work.
            _pause(pause_s)
        else:
            _wait(device)
        begin.record()
        call()
        end.record()
        measured.append((begin, end))
    _wait(device)
    return [[begin.elapsed_time(end) for begin, end in of_call] for of_call in events]


def _wall_ms(calls: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Returns the ms of each call, `repeats` a call; the calls take turns."""
    ms: list[list[float]] = [[] for _ in calls]
    for call, measured in zip(calls * repeats, ms * repeats, strict=True):
        begin = time.perf_counter()
        call()
        measured.append((time.perf_counter() - begin) * 1e3)
    return ms


def _peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    _wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    # Kept until the peak is read, so that outputs count.
    result = call()
    _wait(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _pause(seconds: float) -> None:
    torch.cuda._sleep(int(seconds * CYCLES_PER_S))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
