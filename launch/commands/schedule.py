"""`semvid schedule`: what every layer will do at every step of a job, as a picture. Loads no model."""

import argparse
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from semvid.runtime import settings
from semvid.runtime.attention.schedule import Decision, Dense, Refresh, plan
from semvid.runtime.config import Config
from semvid.runtime.models import folder as folders

# Letter, ANSI colour of the ground, colour in the PNG, meaning.
LOOKS = {
    "dense": ("D", 41, "#c0392b", "the model's own attention"),
    "seed": ("S", 43, "#d68910", "clusters from tokens"),
    "refresh": ("R", 42, "#27803f", "clusters again, from those before"),
    "reuse": (".", 44, "#2a6fbb", "labels and map of the last refresh"),
}


def add_schedule(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `schedule` to the commands."""
    parser = add_parser(
        "schedule",
        help="draw what every layer will do at every step",
        description="Draw what every layer will do at every step: layers down, steps across. Loads no model.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_schedule, parser=parser)
    add = parser.add_argument
    add("--config", metavar="FILE", type=Path, help="a TOML file: preset, [model], [video], [attention]; or a job.toml")
    presets = f"{', '.join(settings.presets())}, or a TOML file with [attention]"
    add("--preset", metavar="NAME", help=f"{presets} (default: that of --config, else {Config().preset})")
    add("--model", metavar="DIR", help="says how many layers (default: that of --config, else demo)")
    add("--steps", type=int, help="denoising steps (default: those of --config, else the checkpoint's)")
    text = "share of labels that every refresh is taken to change, for the policy drift (default: %(default)s)"
    add("--drift", type=float, default=0.0, metavar="X", help=text)
    add("--out", metavar="FILE", type=Path, help="a PNG too")
    add("--json", action="store_true", help="print one JSON object on stdout instead")


def picture(decisions: Sequence[Sequence[Decision]], *, coloured: bool) -> list[str]:
    """Returns the plan as lines: one a layer, one character a step; then the legend.

    Args:
        decisions: [layers][steps], by `plan`.
        coloured: with ANSI colours, for a terminal; plain letters otherwise.
    """
    steps = len(decisions[0])
    ruler = "".join(str(step).ljust(10) for step in range(0, steps, 10))[:steps]
    lines = [f"step      {ruler}"]
    for layer, row in enumerate(decisions):
        cells = "".join(_cell(kind(what), coloured=coloured) for what in row)
        lines.append(f"layer {layer:<3} {cells}")
    counts = Counter(kind(what) for row in decisions for what in row)
    lines += [f"{_cell(name, coloured=coloured)} {name:8} {counts[name]:6} calls   {LOOKS[name][3]}" for name in LOOKS]
    return lines


def kind(what: Decision) -> str:
    """Returns the name of a decision in `LOOKS`."""
    if isinstance(what, Dense):
        return "dense"
    if isinstance(what, Refresh):
        return "seed" if what.seeded else "refresh"
    return "reuse"


def draw(decisions: Sequence[Sequence[Decision]], title: str, path: Path) -> None:
    """Writes the plan as a PNG.

    Raises:
        ValueError: matplotlib is missing, or the file can't be written as a PNG.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--out is {str(path)!r}, but matplotlib is missing; accepted: pip install matplotlib")
    if path.suffix != ".png":
        raise ValueError(f"--out is {str(path)!r}; accepted: a file that ends in .png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(LOOKS)
    grid = [[names.index(kind(what)) for what in row] for row in decisions]
    figure = Figure(figsize=(3 + 0.16 * len(grid[0]), 1.4 + 0.16 * len(grid)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    colours = [LOOKS[name][2] for name in names]
    axes.imshow(grid, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5, aspect="auto")
    axes.set_xlabel("step")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=9)
    patches = [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    axes.legend(handles=patches, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(path, dpi=110)


def _cell(name: str, *, coloured: bool) -> str:
    letter, ground, *_ = LOOKS[name]
    return f"\x1b[{ground};30m{letter}\x1b[0m" if coloured else letter


def _schedule(args: argparse.Namespace) -> int:
    file = settings.read_toml(args.config, "--config") if args.config else {}
    table = file.get("model", {})
    path = args.model or (table.get("path") if isinstance(table, dict) else None) or "demo"
    where = folders.locate(str(path))
    geometry = folders.inspect(where)
    if not 0 <= args.drift <= 1:
        raise ValueError(f"--drift is {args.drift}; accepted: 0 .. 1")
    # A plan hangs on no prompt.
    video = {"prompt": "-"} | ({} if args.steps is None else {"steps": args.steps})
    config = settings.resolve(file, {"video": video}, checkpoint=folders.defaults(where), preset=args.preset)
    decisions = plan(config.attention, config.video.steps, geometry.layers, args.drift)
    policy = f"attention.refresh {config.attention.refresh}"
    title = f"{config.preset}: {config.video.steps} steps, {geometry.layers} layers, {policy}"
    if args.json:
        print(json.dumps({"preset": config.preset, "decisions": [[kind(what) for what in row] for row in decisions]}))
    else:
        print("\n".join([title, *picture(decisions, coloured=sys.stdout.isatty())]))
    if args.out is not None:
        draw(decisions, title, args.out)
    return 0
