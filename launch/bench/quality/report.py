"""What `semvid bench quality` has found: means over prompts, the goals, lines of text."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

CLUSTERING = ("seed", "cluster", "all-reduce")
SVG2 = "svg2-p0.9"
Row = dict[str, Any]
# Families whose methods are no points of one curve, and svg2, which the others are compared with.
NO_CURVE = ("noise", "svg2", "without", "clusters", "interval", "schedule", "blocks", "oracle", "presets")
# Columns of the goals: density at svg2's PSNR, PSNR and output error at its density, clustering time; all of svg2's.
GOALS = (
    ("density_of_svg2s", "{:.3f} x"),
    ("psnr_over_svg2s", "{:+.2f} dB"),
    ("error_of_svg2s", "{:.3f} x"),
    ("clustering_of_svg2s", "{:.3f} x"),
)


def is_curve(family: str) -> bool:
    """Returns whether the methods of a family are points of one curve."""
    return family == "svg2" or family not in NO_CURVE


def run_line(found: Mapping[str, Any]) -> str:
    """Returns one run in one line."""
    if "psnr" not in found:
        return f"prompt {found['prompt']}  {found['method']:30} {found['seconds']:8.2f} s"
    row = _row([found])
    return f"prompt {found['prompt']}  {_line(row)}"


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the means over prompts of each method that ran for every prompt, and the goals."""
    by_method: dict[str, list[Any]] = {}
    for found in report["runs"]:
        if "psnr" in found:
            by_method.setdefault(found["method"], []).append(found)
    rows = [_row(runs) for runs in by_method.values()]
    dense = [found["seconds"] for found in report["runs"] if found["method"] == "dense"]
    found = {family: goals(rows, family) for family in dict.fromkeys(row["family"] for row in rows)}
    return {
        "dense_seconds": _mean(dense),
        "methods": rows,
        "goals": {family: values for family, values in found.items() if family not in NO_CURVE and values},
        "oracle_gap": _gap(report),
    }


def goals(rows: Sequence[Row], family: str = "ours") -> dict[str, float | None]:
    """Returns how a family compares with svg2, read off its front by interpolation; None where it has no point.

    Densities count stand-ins as tokens and average over sparse calls.
    """
    svg2 = next((row for row in rows if row["method"] == SVG2), None)
    # A video that is the dense one, bit for bit, has no PSNR.
    front = _front([row for row in rows if row["family"] == family and row["psnr"] is not None])
    if svg2 is None or len(front) < 2 or svg2["psnr"] is None:
        return {}
    density = _read(front, "psnr", svg2["psnr"], "density")
    psnr = _read(front, "density", svg2["density"], "psnr")
    error = _read(front, "density", svg2["density"], "error")
    clustering = _mean([row["clustering_ms"] for row in front])
    return {
        "svg2_psnr": svg2["psnr"],
        "svg2_density": svg2["density"],
        "density_at_svg2s_psnr": density,
        "density_of_svg2s": None if density is None else density / svg2["density"],
        "least_density": front[0]["density"],
        "psnr_of_least_density": front[0]["psnr"],
        "clustering_of_svg2s": clustering / svg2["clustering_ms"] if svg2["clustering_ms"] else None,
        "psnr_over_svg2s": None if psnr is None else psnr - svg2["psnr"],
        "error_of_svg2s": None if error is None or not svg2["error"] else error / svg2["error"],
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """Returns the summary as lines of text."""
    found = report["summary"]
    head = (
        f"{'method':30} {'density':>8} {'all':>6} {'PSNR':>7} {'SSIM':>7} {'latents':>8} {'recall':>7} {'error':>7} "
        f"{'cluster':>9} {'total':>8}"
    )
    title = f"{report['model']}, {report['size']} ({report['tokens']} tokens), {report['steps']} steps, "
    title += f"{report['device']}; dense {found['dense_seconds']:.2f} s"
    text = [title, head, *(_line(row) for row in sorted(found["methods"], key=_place))]
    if found["goals"]:
        text.append(f"{'against svg2-p0.9':30} {'density':>11} {'PSNR':>11} {'error':>11} {'cluster':>11}")
    for family, values in found["goals"].items():
        text.append(f"{family:30} " + " ".join(_goal(values[name], form) for name, form in GOALS))
    for rule, ratios in found["oracle_gap"].items():
        parts = ", ".join(f"{value:.3f} x at recall {recall}" for recall, value in ratios.items() if value is not None)
        text.append(f"density over the oracle's, {rule:10} {parts}")
    return text


def _place(row: Row) -> tuple[str, float]:
    return row["family"], float(row["density"])


def _goal(value: float | None, form: str) -> str:
    """Returns a cell of the goals' table; "-" beyond what was run."""
    return f"{'-' if value is None else form.format(value):>11}"


def _front(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that no other is as good as in density and in PSNR, the least dense first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["density"], -row["psnr"])):
        if not front or row["psnr"] > front[-1]["psnr"]:
            front.append(row)
    return front


def _row(runs: Sequence[Mapping[str, Any]]) -> Row:
    """Returns the means of one method's runs."""
    calls = [call for found in runs for call in found["calls"]]
    psnr = [found["psnr"] for found in runs if found["psnr"] is not None]
    row: Row = {name: runs[0][name] for name in ("method", "family", "attention")}
    for name in ("density", "density_all_calls", "ssim", "latent_error", "seconds"):
        row[name] = _mean([found[name] for found in runs])
    row["psnr"] = _mean(psnr) if psnr else None
    row["recall"] = _mean([call["recall"] for call in calls]) if calls else None
    row["error"] = _mean([call["error"] for call in calls]) if calls else None
    of_layers = {layer: [call["error"] for call in calls if call["layer"] == layer] for layer in _layers(calls)}
    row["error_by_layer"] = {str(layer): _mean(errors) for layer, errors in of_layers.items()}
    row["clustering_ms"] = _mean([sum(found["phase_ms"].get(name, 0.0) for name in CLUSTERING) for found in runs])
    row["phase_ms"] = {
        name: _mean([found["phase_ms"].get(name, 0.0) for found in runs]) for name in runs[0]["phase_ms"]
    }
    row["prompts"] = len(runs)
    return row


def _layers(calls: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({call["layer"] for call in calls})


def _line(row: Row) -> str:
    def cell(name: str, form: str, width: int) -> str:
        return f"{'-' if row[name] is None else format(row[name], form):>{width}}"

    return (
        f"{row['method']:30} {cell('density', '.4f', 8)} {cell('density_all_calls', '.3f', 6)} "
        f"{cell('psnr', '.2f', 7)} {cell('ssim', '.4f', 7)} {cell('latent_error', '.4f', 8)} "
        f"{cell('recall', '.3f', 7)} {cell('error', '.4f', 7)} {row['clustering_ms']:6.0f} ms {row['seconds']:6.2f} s"
    )


def _gap(report: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Returns the mean over probed calls of how many times the oracle's density each rule needs."""
    gaps = [call["gap"] for found in report["runs"] for call in found.get("calls", []) if "gap" in call]
    if not gaps:
        return {}
    return {
        rule: {recall: _mean_of_some([gap[rule][recall] for gap in gaps]) for recall in of_rule}
        for rule, of_rule in gaps[0].items()
    }


def _mean_of_some(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return _mean(there) if there else None


def _read(front: Sequence[Row], along: str, at: float, what: str) -> float | None:
    """Returns `what` where `along` is `at`, between two points of a front; None beyond its ends."""
    points = sorted((float(row[along]), float(row[what])) for row in front if row[along] is not None)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / max(x1 - x0, 1e-12)
    return None


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
