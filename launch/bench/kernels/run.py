"""`semvid bench kernels`: checks each op, then times it, with its peers in the same run, and says how they compare."""

import contextlib
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.dispatch import Ops, select
from semvid.launch import machine
from semvid.launch.bench import options as settings
from semvid.launch.bench import timing, workload
from semvid.launch.bench.kernels import peers
from semvid.launch.bench.kernels import report as tables
from semvid.launch.bench.kernels.case import Case
from semvid.launch.bench.kernels.cases import Cases
from semvid.launch.bench.kernels.checks import poisoned_memory
from semvid.launch.bench.kernels.report import Row
from semvid.launch.bench.options import Options, Shape
from semvid.launch.bench.timing import Extra, copy_gb_s, time_call, time_extra
from semvid.runtime.device import resolve_device
from semvid.runtime.jobs.job import DEFAULT_ROOT

RESULT = "bench.json"


def run(options: Options, folder: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Returns the report of `semvid bench kernels`, and its lines for a reader; writes both and a plot a shape.

    The JSON file is there from the first op on and grows: an interrupted run leaves what it had measured.

    Args:
        options: what to measure.
        folder: where; None makes a new one under semvid-jobs.

    Raises:
        ValueError: an option is outside what is accepted, or can't run here; before any work.
    """
    settings.check(options)
    device = resolve_device(options.device)
    shapes = settings.shapes_on(options, device.type)
    asked = settings.peers_on(options, device.type)
    ops = select(options.backend, device)
    folder = _new_folder(folder)
    report: dict[str, Any] = {
        "bench": "kernels",
        "state": "running",
        **machine.surroundings(device.type),
        "clock": timing.CLOCK_NOTE[device.type],
        "l2": timing.L2_NOTE[device.type],
        "repeats_at_most": options.repeats,
        "warmup": options.warmup,
        "seed": options.seed,
        "folder": str(folder),
        "failed": [],
        "shapes": [],
    }
    with _written(folder, report):
        for shape in shapes:
            _measure_shape(shape, options, ops, device, asked, report, folder)
    lines = _heading(report)
    for found in report["shapes"]:
        problem = tables.plot(report, found, folder / f"{found['shape']}.png")
        lines += ["", *tables.table(found), *([problem] if problem else [])]
    if report["failed"]:
        lines += ["", f"FAILED   {', '.join(report['failed'])}"]
    return report, [*lines, "", f"results  {folder / RESULT}"]


def _measure_shape(
    shape: Shape,
    options: Options,
    ops: Ops,
    device: torch.device,
    asked: dict[str, str | None],
    report: dict[str, Any],
    folder: Path,
) -> None:
    """Measures one shape and adds it to the report."""
    _say(f"{shape.name}: making inputs on {report['device']}")
    config = settings.attention_config(options, shape)
    try:
        ours = Cases(workload.make(shape, config, options.density, options.seed, device), ops)
    except torch.OutOfMemoryError:
        raise ValueError(f"--shape is {shape.name!r}, which does not fit into this GPU's free memory") from None
    found = _describe(ours)
    report["shapes"].append(found)
    rows: list[Row] = []
    for row in _rows(ours, options, asked):
        rows.append(row)
        if row.peer is None and row.problem is not None:
            report["failed"].append(f"{shape.name}: {row.name}")
        found["rows"] = tables.compared(rows, found["copy_gb_s"])
        found["dense_backend"] = tables.yardstick(found["rows"])
        found["summary"] = tables.summary(found["rows"])
        _write(folder, report)


def _rows(ours: Cases, options: Options, asked: dict[str, str | None]) -> Iterator[Row]:
    """Yields a row for each of our ops, then for each case of each peer, as they are measured."""
    for name, make in ours.sources().items():
        yield measure(name, make, ours, options)
    for peer, reason in asked.items():
        if reason is not None:
            _say(f"  {peer}: {reason}")
            yield Row(name=peer, peer=peer, problem=reason)
            continue
        # It may compile for a minute or two.
        _say(f"  {peer}: starting")
        cases = peers.cases(peer, ours)
        # A generator that raised is at its end: the rest of this peer is left out.
        with contextlib.suppress(StopIteration):
            while True:
                yield measure(peer, cases.__next__, ours, options, peer=peer)
        # What this peer held must not count as the next one's.
        del cases
        gc.collect()
        torch.cuda.empty_cache()


def measure(name: str, make: Callable[[], Case], ours: Cases, options: Options, *, peer: str | None = None) -> Row:
    """Returns the row of one case: checked first, and timed only if the check passes. What it raises is its problem.

    Args:
        name: of the row, if `make` fails.
        make: returns the case.
        ours: whose workload it is.
        options: warm-up and repeats.
        peer: whose the case is; None: ours, whose memory is poisoned while it is checked.

    Raises:
        StopIteration: `make` has no case left.
    """
    line = f"  {name}: "
    try:
        case = make()
        name, line = case.name, ""
        _say(f"  {name:24}", end="")
        with contextlib.nullcontext() if peer else poisoned_memory():
            result = case.call()
        check = case.check(result)
        # Kept longer, it would be in the memory that the timed calls find.
        del result
        times, extra, problem = None, None, None
        if check.passed:
            times = time_call(case.call, ours.work.q.device, warmup=options.warmup, repeats=options.repeats)
            extra = _extra(case, ours, options)
            _say(f"{times.median_ms:.3f} ms ({times.ms_20:.3f} - {times.ms_80:.3f}, {times.repeats} x)")
        else:
            problem = f"its check failed: {tables.check_text(*check, check.passed)}"
            _say(problem)
    except StopIteration:
        raise
    except Exception as error:  # noqa: BLE001 - one case's failure is one line; the others are still measured
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        _say(line + problem)
        return Row(name=name, peer=peer, version=peers.version(peer) if peer else "", problem=problem)
    return Row(
        name=name,
        peer=peer,
        version=peers.version(peer) if peer else ours.ops.name,
        problem=problem,
        beside=case.beside,
        dense=case.dense,
        useful_flops=case.useful_flops,
        executed_flops=case.executed_flops,
        moved_bytes=case.moved_bytes,
        check=check,
        times=times,
        extra=extra,
    )


def _extra(case: Case, ours: Cases, options: Options) -> Extra | None:
    """Returns what a whole call takes beside its part; None for a case that has none."""
    if case.part is None:
        return None
    return time_extra(case.call, case.part, ours.work.q.device, warmup=options.warmup, repeats=options.repeats)


def _describe(ours: Cases) -> dict[str, Any]:
    """Returns what was measured: the shape, how uneven its clusters and heads are, and the machine's copy bandwidth."""
    w = ours.work
    densities = reference.density(w.block_map, w.queries.sizes, w.keys.sizes)
    return {
        "shape": w.shape.name,
        "heads": w.shape.heads,
        "head_dim": w.shape.head_dim,
        "tokens": w.shape.tokens,
        "dtype": "bf16",
        "query_clusters": w.config.query_clusters,
        "key_clusters": w.config.key_clusters,
        "query_sizes": _three(w.queries.sizes),
        "key_sizes": _three(w.keys.sizes),
        "density": densities.double().mean().item(),
        "head_densities": [round(x, 4) for x in densities.tolist()],
        "computed_pairs": ours.pairs,
        "backend": ours.ops.name,
        "copy_gb_s": copy_gb_s(w.q.device),
    }


def _three(sizes: Tensor) -> list[int]:
    """Returns the smallest, the median and the largest size."""
    return [int(x) for x in (sizes.min(), sizes.median(), sizes.max())]


def _heading(report: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {report['versions'][name] or 'missing'}" for name in ("semvid", "torch", "triton"))
    rows = [row for shape in report["shapes"] for row in shape["rows"] if row["peer"] and row["version"]]
    named = sorted({row["version"] for row in rows if row["median_ms"] is not None})
    return [
        f"device   {report['device']}",
        f"version  {versions}, commit {report['commit']}",
        f"peers    {'; '.join(named) or 'none timed'}",
        f"clock    {report['clock']}; L2 {report['l2']}",
    ]


def _new_folder(folder: Path | None) -> Path:
    """Returns the folder of the results, made.

    Raises:
        ValueError: it holds results already, or can't be written.
    """
    folder = folder or DEFAULT_ROOT / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    if (folder / RESULT).exists():
        raise ValueError(f"--out is {str(folder)!r}, which already holds a {RESULT}; accepted: a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"--out is {str(folder)!r}, which can't be written: {reason}") from None
    return folder


@contextlib.contextmanager
def _written(folder: Path, report: dict[str, Any]) -> Iterator[None]:
    """Writes the report at the end, with how it ended: done, failed or interrupted."""
    try:
        yield
        report["state"] = "failed" if report["failed"] else "done"
    except KeyboardInterrupt:
        report["state"] = "interrupted"
        raise
    except BaseException:
        report["state"] = "failed"
        raise
    finally:
        _write(folder, report)


def _write(folder: Path, report: Mapping[str, Any]) -> None:
    part = folder / f".{RESULT}.part"
    part.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(folder / RESULT)


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
