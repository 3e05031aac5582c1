"""The plots of `semvid bench quality`: fidelity against density and against time, a curve a family."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semvid.launch.bench.quality.report import is_curve

COLOURS = {"svg2": "#c0392b", "ours": "#2a6fbb", "blocks": "#8a8f98", "oracle": "#27803f", "presets": "#d68910"}
# (file, horizontal, its title, vertical, its title)
PLOTS = (
    ("psnr-density.png", "density", "density over sparse calls, stand-ins counted", "psnr", "PSNR to dense, dB"),
    ("error-density.png", "density", "density over sparse calls, stand-ins counted", "error", "output error a call"),
    ("psnr-time.png", "seconds", "seconds of denoising", "psnr", "PSNR to dense, dB"),
)


def plots(report: Mapping[str, Any], out: Path) -> str | None:
    """Writes the plots into `out`.

    Returns:
        Why there are none, with the command that brings what is missing; None if they were written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no plots: matplotlib is missing (pip install matplotlib)"
    for name, *axes in PLOTS:
        _plot(report, out / name, *axes)
    return None


def _plot(report: Mapping[str, Any], path: Path, x: str, x_title: str, y: str, y_title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    by_family: dict[str, list[Any]] = {}
    for row in report["summary"]["methods"]:
        if row[x] is not None and row[y] is not None and row["family"] != "noise":
            by_family.setdefault(row["family"], []).append(row)
    for family, rows in by_family.items():
        rows.sort(key=lambda row: row[x])
        line = "-" if is_curve(family) else ""
        axes.plot(
            [r[x] for r in rows], [r[y] for r in rows], line, marker="o", ms=4, color=COLOURS.get(family), label=family
        )
        for row in rows if family != "ours" else []:
            axes.annotate(row["method"], (row[x], row[y]), fontsize=5, xytext=(3, 2), textcoords="offset points")
    noise = [row[y] for row in report["summary"]["methods"] if row["family"] == "noise" and row[y]]
    if noise and y == "psnr":
        axes.axhline(noise[0], color="black", lw=0.8, ls=":", label="dense, another backend")
    if y == "error":
        axes.set_yscale("log")
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.3)
    if by_family:
        axes.legend(fontsize=7)
    figure.suptitle(f"{report['model']}, {report['size']}, {report['steps']} steps, {report['device']}", fontsize=10)
    figure.savefig(path, dpi=120)
