"""What a benchmark found: rows, what follows from comparing them, the table, the plot."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semvid.launch.bench.kernels.checks import Check
from semvid.launch.bench.timing import Extra, Times

# The yardstick is the first of these that ran.
DENSE = ("sdpa-cudnn", "fa3", "sdpa-flash")
ATTENTION = "attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One op or peer, measured or not."""

    name: str
    peer: str | None = None
    """Name of the peer; None for our own ops and calls."""
    version: str = ""
    problem: str | None = None
    """Why there are no times."""
    beside: str | None = None
    dense: bool = False
    useful_flops: int | None = None
    executed_flops: int | None = None
    moved_bytes: int | None = None
    check: Check | None = None
    times: Times | None = None
    extra: Extra | None = None
    """What a whole call takes beside attention, from pairs."""

    def tflops(self, flops: int | None) -> float | None:
        """Returns `flops` over the median time, in TFLOP/s."""
        return None if flops is None or self.times is None else flops / self.times.median_ms / 1e9

    def gb_s(self) -> float | None:
        """Returns the bytes that must move over the median time, in GB/s."""
        moved = self.moved_bytes
        return None if moved is None or self.times is None else moved / self.times.median_ms / 1e6


def compared(rows: Sequence[Row], copy_gb_s: float) -> list[dict[str, Any]]:
    """Returns the rows as JSON values, each with its rates beside the dense peers, the copy, and our own op."""
    timed = {row.name: row for row in rows if row.times is not None}
    dense = {row.name: row.tflops(row.useful_flops) for row in timed.values() if row.dense}
    found = []
    for row in rows:
        rate, bandwidth, ours = row.tflops(row.useful_flops), row.gb_s(), timed.get(row.beside or "")
        walks_pairs = ATTENTION in (row.name, row.beside)
        found.append(
            {
                "name": row.name,
                "peer": row.peer,
                "version": row.version,
                "problem": row.problem,
                "check": None if row.check is None else _check_json(row.check),
                **(row.times._asdict() if row.times is not None else dict.fromkeys(Times._fields)),
                "beside_attention": None if row.extra is None else row.extra._asdict(),
                "useful_tflops": rate,
                "executed_tflops": row.tflops(row.executed_flops),
                "of_dense": {name: rate / full for name, full in dense.items() if rate and full} if walks_pairs else {},
                "gb_s": bandwidth,
                "of_copy": None if bandwidth is None else bandwidth / copy_gb_s,
                "beside": row.beside,
                "times_ours": row.times.median_ms / ours.times.median_ms
                if row.times is not None and ours is not None and ours.times is not None
                else None,
            }
        )
    return found


def yardstick(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the name of the dense peer that attention is compared with, None if none ran."""
    timed = {row["name"] for row in rows if row["median_ms"] is not None}
    return next((name for name in DENSE if name in timed), None)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the numbers that goals are set in; None where a part was not measured."""
    by_name = {row["name"]: row for row in rows}

    def value(name: str, key: str) -> float | None:
        found: float | None = by_name.get(name, {}).get(key)
        return found

    def less(name: str) -> float | None:
        whole, attention = value(name, "median_ms"), value(ATTENTION, "median_ms")
        return None if whole is None or attention is None else whole - attention

    return {
        "attention_of_dense": by_name.get(ATTENTION, {}).get("of_dense", {}),
        "refresh_beside_attention_ms": less("refresh"),
        "reuse_beside_attention_ms": less("reuse"),
        # Those two are differences of medians; these are medians of differences, with their spread.
        "refresh_beside_attention": by_name.get("refresh", {}).get("beside_attention"),
        "reuse_beside_attention": by_name.get("reuse", {}).get("beside_attention"),
        "flash_kmeans_over_ours": {side: value(f"flash-kmeans iteration {side}", "times_ours") for side in "qk"},
        "permute_of_copy": value("permute all", "of_copy"),
        "map_ms": value("top_p_map", "median_ms"),
    }


COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("", lambda row: row["name"]),
    ("ms", lambda row: _number(row["median_ms"])),
    ("20-80 %", lambda row: "" if row["ms_20"] is None else f"{_number(row['ms_20'])} - {_number(row['ms_80'])}"),
    ("TFLOP/s", lambda row: _number(row["useful_tflops"])),
    ("executed", lambda row: _number(row["executed_tflops"])),
    ("of dense", lambda row: _number(next((row["of_dense"][name] for name in DENSE if name in row["of_dense"]), None))),
    ("GB/s", lambda row: _number(row["gb_s"])),
    ("of copy", lambda row: _number(row["of_copy"])),
    ("MiB", lambda row: "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"),
    ("host ms", lambda row: "waits" if row["waits"] else _number(row["host_ms"])),
    ("x ours", lambda row: _number(row["times_ours"])),
    ("check", lambda row: check_text(**row["check"]) if row["check"] else ""),
)


def table(shape: Mapping[str, Any]) -> list[str]:
    """Returns one shape's results as lines of text."""
    dense = yardstick(shape["rows"])
    low, high = min(shape["head_densities"]), max(shape["head_densities"])
    lines = [
        f"{shape['shape']}: {shape['heads']} heads x {shape['tokens']} tokens x {shape['head_dim']}, "
        f"{shape['query_clusters']} query and {shape['key_clusters']} key clusters of {_sizes(shape)} tokens, "
        f"density {shape['density']:.3f} ({low:.2f} .. {high:.2f} a head), backend {shape['backend']}",
        f"copy {shape['copy_gb_s']:.0f} GB/s; of dense: beside {dense or 'nothing, no dense peer ran'}",
    ]
    cells = [[title for title, _ in COLUMNS]]
    # A row without times has one cell, and its reason stands below the table.
    cells += [[cell(row) for _, cell in COLUMNS] for row in shape["rows"] if row["problem"] is None]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        # Names to the left, numbers to the right, the check's text to the left.
        numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]).rstrip())
    lines += [f"{row['name']}: not timed: {row['problem']}" for row in shape["rows"] if row["problem"] is not None]
    return lines + summary_lines(shape["summary"])


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns the summary as lines of text; what was not measured is left out."""
    lines = [f"attention runs at {part:.2f} of {name}'s rate" for name, part in found["attention_of_dense"].items()]
    for key, call in (("refresh_beside_attention", "refresh (2 iterations)"), ("reuse_beside_attention", "reuse")):
        if found[key] is not None:
            text = "{} takes {median_ms:.2f} ms ({ms_20:.2f} - {ms_80:.2f}, {pairs} pairs) beside attention"
            lines.append(text.format(call, **found[key]))
    if found["permute_of_copy"] is not None:
        lines.append(f"orders, gathers and scatter move their bytes at {found['permute_of_copy']:.2f} of copy")
    for side, times in found["flash_kmeans_over_ours"].items():
        if times is not None:
            lines.append(f"a k-means iteration on {side} takes flash-kmeans {times:.2f} x as long")
    return lines


def check_text(what: str, error: float | None, bound: float, passed: bool) -> str:
    """Returns a check in words; an error of None was not finite."""
    found = "not finite" if error is None or not math.isfinite(error) else f"{error:.1e}"
    return f"{what}: {found} {'<=' if passed else 'EXCEEDS'} {bound:.1e}"


def plot(report: Mapping[str, Any], shape: Mapping[str, Any], path: Path) -> str | None:
    """Writes a PNG of one shape: ms of every row, TFLOP/s of attention and its peers.

    Returns:
        Why there is none, with the command that brings what is missing; None if it was written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is missing (pip install matplotlib)"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in shape["rows"] if row["median_ms"] is not None]
    rates = [row for row in rows if row["name"] == ATTENTION or (row["beside"] == ATTENTION and row["useful_tflops"])]
    figure = Figure(figsize=(13, 1.6 + 0.27 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _bars(left, rows, "median_ms", "ms (median; whiskers 20-80 %)", spread=True)
    left.set_xscale("log")
    if rates:
        _bars(right, rates, "useful_tflops", "useful TFLOP/s of attention (per computed pair)")
    torch_version = report["versions"]["torch"]
    figure.suptitle(
        f"{shape['shape']}, density {shape['density']:.2f}, {report['device']}, torch {torch_version}, "
        f"{shape['backend']}, commit {report['commit']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    return None


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, title: str, *, spread: bool = False) -> None:
    values = [row[key] for row in rows]
    colours = ["#8a8f98" if row["peer"] else "#2a6fbb" for row in rows]
    whiskers = None
    if spread:
        whiskers = [[row[key] - row["ms_20"] for row in rows], [row["ms_80"] - row[key] for row in rows]]
    places = list(range(len(rows)))
    axes.barh(places, values, xerr=whiskers, color=colours, error_kw={"elinewidth": 1})
    axes.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(title)
    ends = [row["ms_80"] for row in rows] if spread else values
    for place, value, end in zip(places, values, ends, strict=True):
        axes.annotate(f" {_number(value)}", (end, place), va="center", fontsize=7)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _check_json(check: Check) -> dict[str, Any]:
    error = check.error if math.isfinite(check.error) else None
    return {"what": check.what, "error": error, "bound": check.bound, "passed": check.passed}


def _sizes(shape: Mapping[str, Any]) -> str:
    """Returns the smallest, median and largest cluster size of both sides."""
    return " and ".join("{} / {} / {}".format(*shape[side]) for side in ("query_sizes", "key_sizes"))


def _number(value: float | None) -> str:
    """Returns three digits of a number, or as many as stand before its point."""
    if value is None:
        return ""
    if 0 < value < 1e-3:
        return f"{value:.1e}"
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(digits, 0)}f}"
