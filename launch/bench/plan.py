"""`semvid bench plan`: the balance and the bytes of run-time plans for recorded layers. Needs no torch."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semvid.launch import machine
from semvid.launch.bench.options import PlanOptions, check_plan
from semvid.parallel.balance import Ints, Piece, balance, contiguous, longest_first

# Query clusters are lognormal, as those of `bench kernels` are, and the same for every trace of a shape.
SIZE_SPREAD = 0.8
SEED = 0
# More would not fit into the planner's 64-bit sums of pairs.
MOST_TOKENS = 10_000_000
TIMED_CALLS = 5
FORM = '{"traces": [{"model", "layer", "tokens", "heads", "density"}, ...]}'


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What one layer's heads computed."""

    model: str
    layer: int
    tokens: int
    heads: int
    density: tuple[float, ...]
    """Of each head: the share of token pairs computed, 0 .. 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """How one trace fell on one number of ranks: the largest load over the mean, bytes beside plain Ulysses'."""

    model: str
    layer: int
    world_size: int
    imbalance: float
    imbalance_contiguous: float
    """Heads in order, as Ulysses places them."""
    imbalance_lpt: float
    """Whole heads, longest first."""
    traffic: float
    """Bytes received and returned by all ranks."""
    traffic_max: float
    """Bytes of the rank with most, as a part of plain Ulysses' mean."""

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values, to six digits after the point."""
        values = dataclasses.asdict(self).items()
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in values}


def run(options: PlanOptions) -> tuple[dict[str, Any], list[str]]:
    """Returns the report of `semvid bench plan`, with all plans under "plans", and its lines for a reader.

    Raises:
        ValueError: an option or the file of traces is not as accepted; before any plan is made.
    """
    check_plan(options)
    traces = read_traces(options.traces)
    fewest = min(trace.tokens for trace in traces)
    if options.query_clusters > fewest:
        accepted = f"1 .. {fewest}, the tokens of the shortest trace"
        raise ValueError(f"--query-clusters is {options.query_clusters}; accepted: {accepted}")
    plans: list[Planned] = []
    planner_ms: dict[str, float] = {}
    for size in options.world_sizes:
        timed = [plan_trace(trace, size, options) for trace in traces]
        plans += [planned for planned, _ in timed]
        planner_ms[str(size)] = round(statistics.median(ms for _, times in timed for ms in times), 3)
    report = {
        "bench": "plan",
        "device": f"CPU, {machine.usable_cores()} cores",
        "versions": machine.versions(),
        "commit": machine.commit(),
        "traces": options.traces.name,
        "query_clusters": options.query_clusters,
        "piece_cost": options.piece_cost,
        "seed": SEED,
        "planner_ms": planner_ms,
        "plans": [planned.as_json() for planned in plans],
    }
    return report, [*table(plans), "", *summary(plans, planner_ms)]


def read_traces(path: Path) -> list[Trace]:
    """Returns the traces of a JSON file.

    Raises:
        ValueError: it can't be read, or is not of the form FORM.
    """
    option = f"--traces is {str(path)!r}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{option}, which can't be read: {(error.strerror or str(error)).lower()}") from None
    except ValueError as error:
        raise ValueError(f"{option}, which is no valid JSON: {error}; accepted: {FORM}") from None
    traces = content.get("traces") if isinstance(content, dict) else None
    if not isinstance(traces, list) or not traces:
        raise ValueError(f'{option}, which has no list "traces" with something in it; accepted: {FORM}')
    return [_trace(entry, f"{option}, whose traces[{i}]") for i, entry in enumerate(traces)]


def plan_trace(trace: Trace, world_size: int, options: PlanOptions) -> tuple[Planned, list[float]]:
    """Returns how the planner and the two rules for whole heads share a trace, and the planner's times in ms."""
    rows = cluster_sizes(trace.heads, options.query_clusters, trace.tokens)
    keys = np.rint(np.array(trace.density) * trace.tokens).astype(np.int64)
    keys = np.repeat(keys[:, None], options.query_clusters, axis=1)
    plan, times = _timed(lambda: balance(rows, keys, world_size))
    check_cover(plan, trace)

    def imbalance(parts: Sequence[Sequence[Piece]]) -> float:
        return over_mean(loads(parts, trace, options.piece_cost))

    def whole(parts: list[list[int]]) -> list[list[Piece]]:
        return [[Piece(head, 0, trace.tokens) for head in part] for part in parts]

    work = (rows * keys).sum(1)
    moved = moved_rows(plan, trace.tokens)
    ulysses = 4 * trace.heads * trace.tokens
    planned = Planned(
        model=trace.model,
        layer=trace.layer,
        world_size=world_size,
        imbalance=imbalance(plan),
        imbalance_contiguous=imbalance(whole(contiguous(work, world_size))),
        imbalance_lpt=imbalance(whole(longest_first(work, world_size))),
        traffic=sum(moved) / ulysses,
        traffic_max=max(moved) * world_size / ulysses,
    )
    return planned, times


def cluster_sizes(heads: int, clusters: int, tokens: int) -> Ints:
    """Returns query rows of each cluster, int64 [heads, clusters]: lognormal, each head's sum is `tokens`."""
    generator = np.random.default_rng(SEED)
    weights = np.exp(SIZE_SPREAD * generator.standard_normal((heads, clusters)))
    return generator.multinomial(tokens, weights / weights.sum(1, keepdims=True)).astype(np.int64)


def loads(parts: Iterable[Iterable[Piece]], trace: Trace, piece_cost: int) -> list[float]:
    """Returns the token pairs that each part computes, counted from its pieces alone: density x tokens a query row.

    Args:
        parts: the plan.
        trace: whose heads.
        piece_cost: pairs that each piece counts for beside its own.
    """
    return [sum(trace.density[head] * trace.tokens * (last - first) + piece_cost for head, first, last in part)
            for part in parts]  # fmt: skip


def moved_rows(parts: Iterable[Iterable[Piece]], tokens: int) -> list[int]:
    """Returns the rows each part moves: all keys and values of each head it holds, its queries, and its output."""
    return [sum(2 * tokens + 2 * (last - first) for _, first, last in part) for part in parts]


def check_cover(parts: Iterable[Iterable[Piece]], trace: Trace) -> None:
    """Raises AssertionError unless every query row of every head is in exactly one piece."""
    reached = [0] * trace.heads
    for head, first, last in sorted(piece for part in parts for piece in part):
        assert first == reached[head] < last, f"head {head}: rows {first} .. {last} follow {reached[head]}"
        reached[head] = last
    assert reached == [trace.tokens] * trace.heads, f"rows planned of each head: {reached}"


def over_mean(values: Sequence[float]) -> float:
    """Returns the largest value over the mean; 1 if all are 0."""
    total = sum(values)
    return max(values) * len(values) / total if total > 0 else 1.0


def table(plans: Iterable[Planned]) -> list[str]:
    """Returns a line for each plan, under a heading."""
    heading = ["model", "layer", "ranks", "imbalance", "contiguous", "longest first", "bytes", "largest rank's"]
    rows = [[p.model, str(p.layer), str(p.world_size), *_figures([p], max)] for p in plans]
    return _aligned([heading, *rows])


def summary(plans: Sequence[Planned], planner_ms: Mapping[str, float]) -> list[str]:
    """Returns a line for each number of ranks: the mean and the worst over the traces, the planner's time."""
    heading = ["ranks", "over traces", "imbalance", "contiguous", "longest first", "bytes", "largest rank's"]
    rows = [[*heading, "planner, ms"]]
    for size, ms in planner_ms.items():
        mine = [planned for planned in plans if planned.world_size == int(size)]
        rows.append([size, "mean", *_figures(mine, statistics.fmean), f"{ms:.2f}"])
        rows.append(["", "worst", *_figures(mine, max), ""])
    return _aligned(rows)


def _figures(plans: Sequence[Planned], over: Callable[[Iterable[float]], float]) -> list[str]:
    names = ("imbalance", "imbalance_contiguous", "imbalance_lpt", "traffic", "traffic_max")
    return [f"{over([getattr(planned, name) for planned in plans]):.3f}" for name in names]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    return lines


def _timed(plan: Callable[[], list[list[Piece]]]) -> tuple[list[list[Piece]], list[float]]:
    """Returns what `plan` returns, and the ms of some calls."""
    times = []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        result = plan()
        times.append(1e3 * (time.perf_counter() - start))
    return result, times


def _trace(entry: object, name: str) -> Trace:
    """Returns one checked trace; raises ValueError with `name` before what is wrong."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is {_short(entry)}; accepted: {FORM}")
    keys = [field.name for field in dataclasses.fields(Trace)]
    for key in keys:
        if key not in entry:
            raise ValueError(f"{name} has no {key!r}; accepted: {FORM}")
    if not isinstance(entry["model"], str):
        raise ValueError(f"{name} has model {_short(entry['model'])}; accepted: a text")
    for key, least, most in (("layer", 0, None), ("tokens", 1, MOST_TOKENS), ("heads", 1, None)):
        _require_whole(entry[key], f"{name} has {key} {_short(entry[key])}", least, most)
    density, heads = entry["density"], entry["heads"]
    if not isinstance(density, list) or len(density) != heads:
        found = f"{len(density)} numbers" if isinstance(density, list) else _short(density)
        raise ValueError(f"{name} has density {found} and heads {heads}; accepted: a number for each head")
    for head, value in enumerate(density):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise ValueError(f"{name} has density[{head}] {_short(value)}; accepted: 0 .. 1")
    return Trace(**{key: entry[key] for key in keys} | {"density": tuple(map(float, density))})


def _require_whole(value: Any, name: str, least: int, most: int | None) -> None:
    """Raises ValueError unless `value` is a whole number `least` .. `most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        accepted = f"{least} or more" if most is None else f"{least} .. {most}"
        raise ValueError(f"{name}; accepted: a whole number, {accepted}")


def _short(value: object) -> str:
    """Returns a JSON value as text of one line, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
