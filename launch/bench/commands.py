"""The command lines of `semvid bench layer` and `semvid bench attention`."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from semvid.launch.bench import options as settings
from semvid.launch.bench.options import LayerOptions, SweepOptions
from semvid.runtime.jobs import job as jobs


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
    text = (
        "share of token pairs computed, mean over heads as uneven as recorded ones; one, or one a shape (default: 0.3)"
    )
    add("--density", nargs="+", type=float, metavar="X", default=list(default.densities), help=text)
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
        densities=tuple(args.density),
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
    from semvid.launch.bench.whole import layer

    report, lines = layer.run(options, args.out or jobs.default_folder("bench-layer"))
    print("\n".join(lines), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, allow_nan=False))
    return 0


def add_attention(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `attention` to what `bench` can measure."""
    parser = add_parser(
        "attention",
        help="the attention kernels over cluster counts and densities, beside dense ones",
        description="Check and time the attention kernels for every combination of cluster counts and densities.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_attention, parser=parser)
    add, default = parser.add_argument, SweepOptions(shapes=())
    text = f"{', '.join(settings.SHAPES)} (default: wan14b-720p on a GPU, toy on a CPU)"
    add("--shape", nargs="+", metavar="NAME", default=[], help=text)
    text = "whose kernels (default: auto, the fastest here, and triton)"
    add("--backends", nargs="+", metavar="NAME", default=list(default.backends), help=text)
    for side, counts in (("query", default.query_clusters), ("key", default.key_clusters)):
        text = f"numbers of {side} clusters (default: {' '.join(map(str, counts))})"
        add(f"--{side}-clusters", nargs="+", type=int, metavar="N", help=text)
    text = f"shares of token pairs computed (default: {' '.join(map(str, default.densities))})"
    add("--density", nargs="+", type=float, metavar="X", default=list(default.densities), help=text)
    text = f"to time beside ours (default: none): {', '.join(settings.SWEEP_PEERS)}"
    add("--peers", nargs="+", metavar="NAME", default=[], help=text)
    text = "timed calls at most, fewer of what takes long (default: %(default)s)"
    add("--repeats", type=int, metavar="N", default=default.repeats, help=text)
    add("--warmup", type=int, metavar="N", default=default.warmup, help="calls before those (default: %(default)s)")
    add("--device", choices=("auto", "cuda", "cpu"), default=default.device, help="default: auto")
    add("--seed", type=int, metavar="N", default=default.seed, help="of the inputs (default: %(default)s)")
    text = f"where sweep.json and its plot go (default: a new folder in {jobs.DEFAULT_ROOT}/)"
    add("--out", metavar="DIR", type=Path, help=text)
    add("--json", action="store_true", help="print one JSON object on stdout; the table goes to stderr")


def _attention(args: argparse.Namespace) -> int:
    from semvid.runtime.device import resolve_device

    device = resolve_device(args.device).type
    default = SweepOptions(shapes=())
    if device == "cpu":
        # The toy has 500 tokens.
        default = dataclasses.replace(default, query_clusters=(5, 9), key_clusters=(7, 20))
    options = SweepOptions(
        shapes=settings.words(args.shape) or (settings.DEFAULT_SHAPE[device],),
        backends=settings.words(args.backends),
        query_clusters=tuple(args.query_clusters or default.query_clusters),
        key_clusters=tuple(args.key_clusters or default.key_clusters),
        densities=tuple(args.density),
        peers=settings.words(args.peers),
        repeats=args.repeats,
        warmup=args.warmup,
        device=device,
        seed=args.seed,
    )
    settings.check_sweep(options)
    from semvid.launch.bench.kernels import sweep

    report, lines = sweep.run(options, args.out or jobs.default_folder("bench-attention"))
    print("\n".join(lines), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, allow_nan=False))
    failed = [r for s in report["shapes"] for c in s["cells"] for r in c["results"].values() if not r["passed"]]
    return 1 if failed else 0


def _world_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--gpus is {text!r}; accepted: whole numbers with commas between, such as 1,2,4") from None
