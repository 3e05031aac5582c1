"""The command lines of `semvid bench e2e`, `bench throughput` and `bench checkpoint`."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from semvid.launch.bench import video_options
from semvid.launch.bench.options import words
from semvid.launch.bench.video_options import PARTS, E2eOptions, ThroughputOptions
from semvid.launch.commands import deployment as deployments
from semvid.runtime import settings
from semvid.runtime.jobs import job as jobs
from semvid.runtime.models import published

AddParser = Callable[..., argparse.ArgumentParser]


def add_e2e(add_parser: AddParser) -> None:
    """Adds `e2e` to what `bench` can measure."""
    parser = add_parser(
        "e2e",
        help="whole models of random weights: seconds a pass by kind, beside diffusers' dense; VAE, text, memory",
        description="Time forward passes of a whole model with random weights and recorded densities, by kind.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_e2e, parser=parser)
    add, names = parser.add_argument, ", ".join(settings.deployments())
    add("--config", metavar="NAME|FILE", type=Path, required=True, help=f"a deployment: {names}; on a CPU a toy")
    add("--preset", metavar="NAME", help="whose schedule a video is computed from (default: the deployment's)")
    text = "numbers of GPUs, one after the other (default: the deployment's)"
    add("--gpus", dest="world_sizes", metavar="N,N", help=text)
    add("--mesh", metavar="AXES", help="how they share it; for one number of GPUs (default: chosen)")
    add("--layers", type=int, metavar="N", help="of the transformer, to take less time (default: all)")
    add("--density", type=float, metavar="X", help="scale densities to this mean (default: as recorded)")
    text = "of all recorded densities, as another preset's are to svg2's (default: 1)"
    add("--density-scale", type=float, metavar="X", default=1.0, help=text)
    add("--repeats", type=int, metavar="N", default=2, help="timed passes of each kind (default: %(default)s)")
    text = f"what is measured, of {', '.join(PARTS)} (default: all)"
    add("--parts", nargs="+", metavar="PART", default=list(PARTS), help=text)
    add("--fp8", action="store_true", help="time it with FP8 linear layers too")
    add("--usp", action="store_true", help="time xfuser's dense USP too (pip install 'semvid[xdit]')")
    add("--backend", default="auto", help="whose ops (default: auto, the fastest here)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: gloo processes (default: %(default)s)")
    add("--seed", type=int, metavar="N", default=0, help="of weights and inputs (default: %(default)s)")
    add("--out", metavar="DIR", type=Path, help=f"where e2e.json goes (default: a new folder in {jobs.DEFAULT_ROOT}/)")
    add("--json", action="store_true", help="print one JSON object on stdout; the table goes to stderr")


def add_throughput(add_parser: AddParser) -> None:
    """Adds `throughput` to what `bench` can measure."""
    parser = add_parser(
        "throughput",
        help="the same jobs with one GPU each, with two, with all: videos an hour, GPU-seconds a video, time to finish",
        description="Run several jobs on the GPUs of this machine in groups of every size.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_throughput, parser=parser)
    add, default = parser.add_argument, ThroughputOptions()
    add("prompt", nargs="?", metavar="PROMPT", help="of every job; seeds are 0, 1, … (default: the checkpoint's)")
    add("--jobs", type=int, metavar="J", default=default.jobs, help="default: %(default)s")
    add("--gpus", type=int, metavar="G", default=default.gpus, help="in all (default: %(default)s)")
    text = "GPUs a job, one value a case (default: 1, 2, 4, … of those that divide --gpus)"
    add("--groups", metavar="N,N", default="", help=text)
    add("--model", metavar="DIR", help="as for run; so are the next ones")
    add("--config", metavar="NAME|FILE")
    add("--preset", metavar="NAME")
    for name in ("steps", "height", "width", "frames"):
        add(f"--{name}", type=int, metavar="N")
    add("--device", choices=("cuda", "cpu"), default=default.device, help="default: %(default)s")
    add("--out", metavar="DIR", type=Path, help=f"the jobs' folder (default: a new one in {jobs.DEFAULT_ROOT}/)")
    add("--json", action="store_true", help="print one JSON object on stdout; the table goes to stderr")


def add_checkpoint(add_parser: AddParser) -> None:
    """Adds `checkpoint` to what `bench` can do."""
    parser = add_parser(
        "checkpoint",
        help="write a published model with random weights as a diffusers checkpoint, for jobs without its own",
        description="Write a checkpoint of full size with random weights; what it makes is noise.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_checkpoint, parser=parser)
    parser.add_argument("--model", metavar="NAME", required=True, help=", ".join(published.names()))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where it is made (default: cuda)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder")


def _checkpoint(args: argparse.Namespace) -> int:
    model = published.read(args.model)
    if args.out.exists():
        raise ValueError(f"--out is {str(args.out)!r}, which exists; accepted: a new folder")
    import torch

    from semvid.runtime.device import resolve_device

    device = resolve_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    published.build_pipeline(model, device, dtype).save_pretrained(args.out, max_shard_size="5GB")
    size = sum(path.stat().st_size for path in args.out.rglob("*.safetensors"))
    print(f"checkpoint  {args.out} ({size / 2**30:.1f} GiB, random weights)")
    return 0


def _e2e(args: argparse.Namespace) -> int:
    deployment = deployments.read(args.config, args.preset)
    options = E2eOptions(
        deployment=deployment,
        gpus=(deployment.gpus,) if args.world_sizes is None else _numbers("--gpus", args.world_sizes),
        mesh=args.mesh,
        layers=args.layers,
        density=args.density,
        density_scale=args.density_scale,
        repeats=args.repeats,
        parts=words(args.parts),
        fp8=args.fp8,
        usp=args.usp,
        backend=args.backend,
        device=args.device,
        seed=args.seed,
    )
    # Before torch is imported.
    video_options.check_e2e(options)
    from semvid.launch.bench.whole import e2e

    report, lines = e2e.run(options, args.out or jobs.default_folder(f"bench-e2e-{deployment.name}"))
    return _print(report, lines, args.json)


def _throughput(args: argparse.Namespace) -> int:
    groups = () if not args.groups else _numbers("--groups", args.groups)
    options = ThroughputOptions(jobs=args.jobs, gpus=args.gpus, groups=groups, device=args.device)
    video_options.check_throughput(options)
    given = [] if args.prompt is None else [args.prompt]
    for name in ("model", "config", "preset", "steps", "height", "width", "frames"):
        if getattr(args, name) is not None:
            given += [f"--{name}", str(getattr(args, name))]
    from semvid.launch.bench.whole import throughput

    report, lines = throughput.run(options, given, args.out or jobs.default_folder("bench-throughput"))
    return _print(report, lines, args.json)


def _print(report: Mapping[str, Any], lines: Sequence[str], as_json: bool) -> int:
    print("\n".join(lines), file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(report, allow_nan=False))
    return 0


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} is {text!r}; accepted: whole numbers with commas between, such as 1,2,4") from None
