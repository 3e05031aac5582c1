"""The command line of `semvid bench layer`."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from semvid.launch.bench import options as settings
from semvid.launch.bench.options import LayerOptions
from semvid.runtime import job as jobs


def add_layer(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `layer` to what `bench` can measure."""
    parser = add_parser(
        "layer",
        help="one attention layer and its block on several GPUs, phase by phase, beside other placements and dense",
        description="Check and time one attention layer, and the block around it, on several GPUs.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_layer, parser=parser)
    add, default = parser.add_argument, LayerOptions(shapes=())
    add(
        "--gpus",
        dest="world_sizes",
        metavar="N,N",
        default="1,2",
        help="world sizes, one after the other (default: %(default)s)",
    )
    shapes = ", ".join(settings.SHAPES)
    add("--shape", nargs="+", metavar="NAME", default=[], help=f"{shapes} (default: wan14b-720p; toy on a CPU)")
    text = "share of token pairs computed, mean over heads as uneven as recorded ones (default: %(default)s)"
    add("--density", type=float, metavar="X", default=default.density, help=text)
    add("--backend", default=default.backend, help="whose ops (default: auto, the fastest here)")
    add("--device", choices=("cuda", "cpu"), default=default.device, help="cpu: gloo processes (default: %(default)s)")
    add("--repeats", type=int, metavar="N", default=default.repeats, help="timed calls (default: %(default)s)")
    add("--warmup", type=int, metavar="N", default=default.warmup, help="calls before those (default: %(default)s)")
    add("--no-block", action="store_true", help="leave the transformer blocks out")
    text = "exchange by collectives alone, also where GPUs reach each other's memory"
    add("--collective", action="store_true", help=text)
    add("--usp", action="store_true", help="time xfuser's dense USP too (pip install 'semvid[xdit]')")
    add("--seed", type=int, metavar="N", default=default.seed, help="of the inputs (default: %(default)s)")
    text = f"where layer.json and its plot go (default: a new folder in {jobs.DEFAULT_ROOT}/)"
    add("--out", metavar="DIR", type=Path, help=text)
    add("--json", action="store_true", help="print one JSON object on stdout; the table goes to stderr")


def _layer(args: argparse.Namespace) -> int:
    options = LayerOptions(
        shapes=settings.words(args.shape) or (settings.DEFAULT_SHAPE[args.device],),
        gpus=_world_sizes(args.world_sizes),
        backend=args.backend,
        density=args.density,
        repeats=args.repeats,
        warmup=args.warmup,
        device=args.device,
        block=not args.no_block,
        windows=not args.collective,
        usp=args.usp,
        seed=args.seed,
    )
    # Before torch is imported.
    settings.check_layer(options)
    from semvid.launch.bench import layer

    report, lines = layer.run(options, args.out or jobs.default_folder("bench-layer"))
    print("\n".join(lines), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, allow_nan=False))
    return 0


def _world_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--gpus is {text!r}; accepted: whole numbers with commas between, such as 1,2,4") from None
