"""`semvid bench e2e`: whole transformers of random weights, pass by pass, and what a video then takes."""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from semvid.kernels.dispatch import select
from semvid.launch import machine
from semvid.launch.bench.video_options import E2eOptions, check_e2e
from semvid.launch.bench.whole import e2e_rank
from semvid.launch.bench.whole.e2e_rank import FP8, OURS
from semvid.launch.bench.whole.layer import COLOURS, check_gpus
from semvid.launch.bench.whole.replay import SOURCE, trace_model
from semvid.launch.commands import estimate
from semvid.launch.commands.deployment import step_kinds
from semvid.launch.ranks import mesh_choice
from semvid.parallel import xdit
from semvid.parallel.mesh import Mesh, parse
from semvid.runtime.layers.fp8_linears import check_fp8
from semvid.runtime.models import predicted_memory, predicted_speed

RESULT, PLOT = "e2e.json", "e2e.png"
KINDS = ("first", "refresh", "reuse")


def run(options: E2eOptions, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the report of `semvid bench e2e` and its lines for a reader; every number of GPUs in its own processes.

    The JSON file grows: an interrupted run leaves what it had measured.

    Args:
        options: what.
        folder: made if it is not there.

    Raises:
        ValueError: an option is not accepted, or there are fewer GPUs; before any work.
    """
    check_e2e(options)
    deployment = options.deployment
    for world in options.gpus:
        mesh_choice.resolve_mesh(options.mesh, world, guided=deployment.guided)
    if options.device == "cuda":
        check_gpus(max(options.gpus), "--config toy")
    select(options.backend, torch.device(options.device))
    reason = xdit.missing() if options.usp else None
    if reason is not None:
        raise ValueError(f"--usp can't run here: {reason}")
    if options.fp8:
        check_fp8(torch.device(options.device), torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    video = deployment.config.video
    report: dict[str, Any] = {
        "bench": "e2e",
        **machine.surroundings(options.device),
        "deployment": deployment.name,
        "model": deployment.model.name,
        "size": [video.frames, video.height, video.width],
        "tokens": deployment.tokens,
        "preset": deployment.config.preset,
        "steps": step_kinds(deployment),
        "branches": deployment.branches,
        "weights": "random",
        "densities": {
            "source": SOURCE,
            "model": trace_model(deployment.model),
            "scale": options.density_scale,
            "mean": options.density,
        },
        "worlds": {},
    }
    for world in options.gpus:
        print(f"semvid: {deployment.name}: {world} ranks", file=sys.stderr, flush=True)
        found = _world(world, options)
        report["worlds"][str(world)] = found | _video(found, report)
        report["worlds"][str(world)]["predicted"] = _predicted(found, options)
        (folder / RESULT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    problem = plot(report, folder / PLOT)
    return report, [*lines(report), *([problem] if problem else []), "", f"results  {folder / RESULT}"]


def lines(report: Mapping[str, Any]) -> list[str]:
    """Returns the report for a reader: one line a number of GPUs and method, and where the time goes."""
    frames, height, width = report["size"]
    head = f"{report['model']}, {frames} x {height} x {width}, {report['tokens']} tokens, random weights"
    found = [f"device   {report['device']}, torch {report['versions']['torch']}, commit {report['commit']}", head]
    for world, at in report["worlds"].items():
        found.append(f"{world} x  mesh {at['mesh']}")
        if "rows" in at:
            found.append(f"     backend {at['backend']}, {at['layers']} layers, density {at['density']:.3f}")
        for row in at.get("rows", ()):
            parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["parts"].items())
            peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**30:.1f} GiB"
            spread = f"{row['fastest']:.3f} - {row['slowest']:.3f}"
            found.append(f"     {row['name']:<32} {row['seconds']:8.3f} s a pass ({spread}){peak}")
            if parts:
                found.append(f"          {parts}")
        for method, seconds in at.get("video_seconds", {}).items():
            gain = at["video_seconds"]["dense"] / seconds
            found.append(f"     {method:<32} {seconds:8.1f} s a video of the schedule ({gain:.2f} x dense)")
        if at.get("vae"):
            # On several GPUs a job shares the tiles; here one decodes them all.
            how = "in tiles, on one GPU" if at["vae"]["tiled"] else "whole"
            found.append(f"     decoding {how:<23} {at['vae']['seconds']:8.3f} s")
        found += [f"     encoder {row['encoder']:<24} {row['seconds']:8.3f} s" for row in at.get("text", ())]
    return found


def plot(report: Mapping[str, Any], path: Path) -> str | None:
    """Writes a PNG: seconds of a forward pass by kind and part, for each number of GPUs.

    Returns:
        Why there is none, with the command that brings what is missing; None if it was written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is missing (pip install matplotlib)"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars = [
        (f"{world} x {row['name'].removesuffix(' native')}", row["parts"] or {"all": row["seconds"]}, row["seconds"])
        for world, at in report["worlds"].items()
        for row in at.get("rows", ())
    ]
    names = list(dict.fromkeys(name for _, parts, _ in bars for name in parts))
    colours = dict(zip(names, COLOURS * 2, strict=False))
    figure = Figure(figsize=(max(5.0, 0.9 * len(bars)), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (_, parts, seconds) in enumerate(bars):
        bottom = 0.0
        for name, part in parts.items():
            axes.bar(place, part, bottom=bottom, color=colours[name])
            bottom += part
        axes.annotate(f"{seconds:.2f}", (place, seconds), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(bars)), [label for label, *_ in bars], rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("s of a forward pass")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(f"{report['deployment']}, {report['device']}, commit {report['commit']}", fontsize=9)
    figure.savefig(path, dpi=100)
    return None


def _world(world: int, options: E2eOptions) -> dict[str, Any]:
    """Returns what `world` ranks measured: rank 0's, with the largest peak of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(e2e_rank.run, (world, folder, options), nprocs=world, start_method="spawn")
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    found: dict[str, Any] = ranks[0]
    for place, row in enumerate(found.get("rows", ())):
        peaks = [rank["rows"][place]["peak_bytes"] or 0 for rank in ranks]
        row["peak_bytes"] = max(peaks) or None
        row["parts_of_ranks"] = [rank["rows"][place]["parts"] for rank in ranks]
    return found


def _video(found: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the seconds of a video of the preset's schedule and of dense steps alone, by what was measured."""
    if "rows" not in found:
        return {}
    seconds = {row["name"]: row["seconds"] for row in found["rows"]}
    counts, mesh = report["steps"], parse(found["mesh"], _ranks(found["mesh"]))
    passes = report["branches"] // mesh.cfg
    rest = (found.get("vae") or {}).get("seconds", 0.0) + sum(row["seconds"] for row in found.get("text", ()))
    steps = sum(counts.values())
    # The yardstick is another's dense pass, where there is one.
    others = [value for name, value in seconds.items() if name.startswith("dense") and not name.startswith(OURS)]
    dense = min(others or [seconds[OURS]])
    videos = {"dense": passes * steps * dense + rest}
    speedups: dict[str, float] = {}
    for suffix in (suffix for suffix in ("", FP8) if OURS + suffix in seconds):
        sparse = sum(counts[kind] * seconds[kind + suffix] for kind in KINDS)
        own = counts["dense"] * seconds[OURS + suffix] + sparse
        videos[f"{report['preset']}{suffix}"] = passes * own + rest
        speedups |= {kind + suffix: dense / seconds[kind + suffix] for kind in KINDS}
    return {"video_seconds": videos, "beside_steps_seconds": rest, "speedup_of_pass": speedups}


def _predicted(found: Mapping[str, Any], options: E2eOptions) -> dict[str, Any]:
    """Returns what `semvid estimate` says of the same, of all layers."""
    deployment, mesh = options.deployment, parse(found["mesh"], _ranks(found["mesh"]))
    config = deployment.config
    need = predicted_memory.predict(deployment.model, config.video, config.attention, mesh, guided=deployment.guided)
    seconds = predicted_speed.predict(
        deployment.model, config.video, config.attention, mesh, density=found.get("density", 0.3)
    )
    return {
        "phase_gib": {name: size / estimate.GIB for name, size in need.phases.items()},
        "pass_seconds": {name: getattr(seconds, name) for name in ("dense", *KINDS)},
    }


def _ranks(mesh: str) -> int:
    """Returns how many ranks a mesh's text has."""
    degrees: Sequence[int] = [int(part.split("=")[1]) for part in mesh.split(",")]
    return Mesh(cfg=degrees[0], ring=degrees[1], ulysses=degrees[2]).world_size
