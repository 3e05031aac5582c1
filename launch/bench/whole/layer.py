"""`semvid bench layer`: one attention layer, and the block around it, on 1, 2, 4, … GPUs, phase by phase."""

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from semvid.kernels.dispatch import select
from semvid.launch import machine
from semvid.launch.bench.options import SHAPES, LayerOptions
from semvid.launch.bench.whole import layer_rank
from semvid.parallel import xdit

RESULT, PLOT = "layer.json", "layer.png"
POLL_S = 0.2
# Which cases the plot shows; the host's time stands inside a phase of the device.
DRAWN = ("refresh", "reuse", "refresh, contiguous", "refresh, ring")
HIDDEN = ("plan on host",)
COLOURS = [
    "#4c78a8",
    "#9ecae9",
    "#f2cf5b",
    "#b79a20",
    "#e45756",
    "#54a24b",
    "#88d27a",
    "#bab0ac",
    "#b279a2",
    "#ff9da6",
    "#6b4c3b",
]


def run(options: LayerOptions, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the report of `semvid bench layer` and its lines for a reader; every world size in processes of its own.

    The JSON file grows: an interrupted run leaves what it had measured. Processes measure shape after shape: starting
    them takes longer than measuring.

    Args:
        options: checked.
        folder: made if it is not there.

    Raises:
        ValueError: there are fewer GPUs, or the backend can't run here; before any work.
    """
    if options.device == "cuda":
        check_gpus(max(options.gpus), "--shape toy")
    select(options.backend, torch.device(options.device))
    reason = xdit.missing() if options.usp else None
    if reason is not None:
        raise ValueError(f"--usp can't run here: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"bench": "layer", **machine.surroundings(options.device), "shapes": []}
    for name in options.shapes:
        shape = SHAPES[name]
        sizes = {"heads": shape.heads, "tokens": shape.tokens, "head_dim": shape.head_dim}
        report["shapes"].append({"shape": name, **sizes, "worlds": {}})
    for world in options.gpus:
        for place, found in _measured(world, options):
            shape_report = report["shapes"][place]
            shape_report["worlds"][str(world)] = found
            shape_report["scaling"] = _scaling(shape_report["worlds"])
            (folder / RESULT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    problem = plot(report, folder / PLOT)
    return report, [*_lines(report), *([problem] if problem else []), "", f"results  {folder / RESULT}"]


def plot(report: Mapping[str, Any], path: Path) -> str | None:
    """Writes a PNG: where the time of a call goes, phase by phase, on each number of GPUs.

    Returns:
        Why there is none, with the command that brings what is missing; None if it was written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is missing (pip install matplotlib)"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shapes = report["shapes"]
    figure = Figure(figsize=(max(6.0, 4.4 * len(shapes)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(1, len(shapes), squeeze=False)[0]
    bars = [[(f"{world} x {row['name']}", row) for world, found in shape["worlds"].items() for row in found["rows"]
             if row["name"] in DRAWN] for shape in shapes]  # fmt: skip
    names = dict.fromkeys(name for drawn in bars for _, row in drawn for name in row["phases_ms"] if name not in HIDDEN)
    colours = dict(zip(names, COLOURS * 2, strict=False))
    for axes, shape, drawn in zip(plots, shapes, bars, strict=True):
        for place, (_, row) in enumerate(drawn):
            bottom = 0.0
            for name, ms in row["phases_ms"].items():
                if name not in HIDDEN:
                    axes.bar(place, ms, bottom=bottom, color=colours[name])
                    bottom += ms
            axes.annotate(f"{row['median_ms']:.1f}", (place, bottom), ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(drawn)), [label for label, _ in drawn], rotation=30, ha="right", fontsize=8)
        axes.set_title(shape["shape"], fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    plots[0].set_ylabel("ms of a call on rank 0 (number: median of the slowest rank)", fontsize=8)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    columns = 5 if len(shapes) == 1 else 8
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.suptitle(f"{report['device']}, torch {report['versions']['torch']}, commit {report['commit']}", fontsize=9)
    figure.savefig(path, dpi=90)
    return None


def check_gpus(most: int, toy: str) -> None:
    """Raises ValueError if there are fewer than `most` GPUs; `toy` is what a CPU could run instead."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if most > found:
        accepted = f"1 .. {found}" if found else f"--device cpu with {toy}"
        raise ValueError(f"--gpus is {most}, but there are {found} usable GPUs; accepted: {accepted}")


def _measured(world: int, options: LayerOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the place of each shape with what `world` ranks measured, as soon as all of them have."""
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(
            layer_rank.run, (world, folder, options), nprocs=world, join=False, start_method="spawn"
        )
        assert context is not None, "they are not joined"
        place, ended = 0, False
        while place < len(options.shapes):
            files = [Path(folder) / layer_rank.RESULT.format(place=place, rank=rank) for rank in range(world)]
            if all(file.exists() for file in files):
                yield place, _together([json.loads(file.read_text()) for file in files])
                place += 1
            else:
                assert not ended, "who ends well has written all"
                ended = context.join(timeout=POLL_S)
        while not ended:
            ended = context.join(timeout=POLL_S)


def _together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns rank 0's rows, with every rank's phases and bytes beside."""
    found, world = ranks[0], len(ranks)
    for place, row in enumerate(found["rows"]):
        mine = [rank["rows"][place] for rank in ranks]
        row["error"] = max((other["error"] for other in mine if other["error"] is not None), default=None)
        row["phases_ms_of_ranks"] = [other["phases_ms"] for other in mine]
        row["sent_bytes_of_ranks"] = [other["sent_bytes"] for other in mine]
        attend = [other["phases_ms"].get("attend", 0.0) for other in mine]
        row["attend_imbalance"] = max(attend) * world / sum(attend) if world > 1 and sum(attend) else None
    return found


def _scaling(worlds: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns by world size how many times faster than on one GPU each case is; other placements against "refresh"."""
    if "1" not in worlds:
        return {}
    alone = {row["name"]: row["median_ms"] for row in worlds["1"]["rows"]}
    return {
        world: {row["name"]: alone[_basis(row["name"], alone)] / row["median_ms"] for row in found["rows"]}
        for world, found in worlds.items()
        if world != "1"
    }


def _basis(name: str, alone: Mapping[str, float]) -> str:
    """Returns the case on one GPU that `name` is held against."""
    return name if name in alone else name.split(",")[0]


def _lines(report: Mapping[str, Any]) -> list[str]:
    lines = [f"device   {report['device']}, torch {report['versions']['torch']}, commit {report['commit']}"]
    for shape in report["shapes"]:
        first = next(iter(shape["worlds"].values()))
        lines += [
            "",
            f"{shape['shape']}: {shape['heads']} heads x {shape['tokens']} tokens x {shape['head_dim']}, "
            f"{first['query_clusters']} query and {first['key_clusters']} key clusters, "
            f"density {first['density']:.3f}, backend {first['backend']}",
        ]
        for world, found in shape["worlds"].items():
            for row in found["rows"]:
                lines += _row_lines(world, row, shape.get("scaling", {}))
    return lines


def _row_lines(world: str, row: Mapping[str, Any], scaling: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    text = f"{world} x  {row['name']:<24} {row['median_ms']:8.2f} ms ({row['ms_20']:.2f} - {row['ms_80']:.2f})"
    if world in scaling:
        text += f", {scaling[world][row['name']]:.2f} x one GPU"
    if row["attend_imbalance"] is not None:
        text += f", attend max/mean {row['attend_imbalance']:.3f}"
    if row["planned_imbalance"] is not None:
        text += f" (planned {row['planned_imbalance']:.3f})"
    phases = ", ".join(f"{name} {ms:.2f}" for name, ms in row["phases_ms"].items())
    return [text, f"        {phases}"] if phases else [text]
