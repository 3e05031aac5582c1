"""The command line of `semvid bench quality`."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from semvid.launch.bench.quality.methods import FAMILIES
from semvid.runtime.jobs import job as jobs

SETTINGS = """\
A settings file (--settings) measures settings of one's own beside the built-in methods:

  [methods.finer]            # a name, for --methods, the table and the plots
  base = "ours"              # what it begins from: ours (default), svg2, or a preset: balanced, quality, turbo
  family = "fine-keys"       # its curve in the plots: ours, svg2, own (default), or a new name
  key_clusters = 4000        # any option of [attention], over those of the base
  p = 0.8

The goals are read off each of these curves that has two points or more."""


def add_quality(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `quality` to what `bench` can measure."""
    parser = add_parser(
        "quality",
        help="how close each method comes to dense attention, at what density and in what time",
        description="Make videos of fixed prompts and seeds with every method and compare them with dense ones.",
        epilog=SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_quality, parser=parser)
    add = parser.add_argument
    add("--model", metavar="DIR", default="demo", help="a diffusers checkpoint folder (default: demo)")
    add("--size", metavar="FxHxW", default="33x160x288", help="frames, height, width (default: %(default)s)")
    add("--steps", type=int, metavar="N", default=30, help="denoising steps (default: %(default)s)")
    add("--prompts", type=int, metavar="N", default=2, help="how many, each with its own seed (default: %(default)s)")
    families = ", ".join(FAMILIES)
    add("--methods", nargs="+", metavar="NAME", default=[], help=f"names, or families: {families}, own (default: all)")
    text = "settings of your own beside the built-in methods: a TOML file of tables [methods.NAME], see below"
    add("--settings", metavar="FILE", type=Path, help=text)
    text = "compare the calls of every so-many-th step with exact attention (default: %(default)s)"
    add("--probe-every", type=int, metavar="N", default=4, help=text)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, the GPU if there is one")
    text = f"where quality.json and plots go, and what is there goes on (default: a new folder in {jobs.DEFAULT_ROOT}/)"
    add("--out", metavar="DIR", type=Path, help=text)
    add("--json", action="store_true", help="print one JSON object on stdout; the table goes to stderr")


def _quality(args: argparse.Namespace) -> int:
    from semvid.launch.bench.quality import run as quality

    options = quality.as_options(
        args.model,
        args.size,
        steps=args.steps,
        prompts=args.prompts,
        methods=tuple(word for part in args.methods for word in part.split(",") if word),
        probe_every=args.probe_every,
        device=args.device,
        settings=args.settings,
    )
    out = args.out or jobs.default_folder("bench-quality")
    report, lines = quality.run(options, out, lambda line: print(line, file=sys.stderr, flush=True))
    print("\n".join(lines), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, allow_nan=False))
    return 0
