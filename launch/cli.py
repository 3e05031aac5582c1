"""The command line: what `semvid --help` lists. What is wrong is said first, in one line."""

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from semvid.launch import env, errors, machine
from semvid.launch.bench import commands as bench_commands
from semvid.launch.bench import options as bench_options
from semvid.launch.bench import video_commands
from semvid.launch.bench.quality import command as quality_command
from semvid.launch.commands import launchers, queue, schedule
from semvid.launch.commands.estimate import add_estimate
from semvid.launch.commands.job_options import (
    JSON_HELP,
    add_job_options,
    add_run_options,
    check_device,
    choices,
    config_of,
    presets_text,
    replaced,
)
from semvid.parallel.mesh import Mesh
from semvid.runtime.config import AttentionConfig, Config, ModelConfig
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job
from semvid.runtime.models import folder as folders


class Parser(argparse.ArgumentParser):
    """argparse with every error in one line, the nearest known option named, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the message in one line and exits with 2."""
        message = message.removeprefix("argument ")
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        """Exits if there are words that no option took."""
        if not unknown:
            return
        word = unknown[0].split("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(word, known, n=1)
        if not word.startswith("-"):
            prompt = any(action.dest == "prompt" for action in self._actions)
            text = "; a prompt of several words stands in quotes"
            self.error(f"unknown word {word!r}" + (f" after the prompt{text}" if prompt else ""))
        self.error(f"unknown option {word!r}" + (f"; did you mean {near[0]}?" if near else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 (a check failed), 2 (bad input), 130 or 143 (stopped)."""
    return errors.exit_code("semvid", lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    chosen: Parser = args.parser
    chosen.refuse_unknown(unknown)
    command: Callable[[argparse.Namespace], int] | None = args.run
    if command is None:
        chosen.print_help()
        return 2
    args.threads = env.threads()
    # Before anything imports torch.
    env.prepare(max(1, getattr(args, "gpus", 1) or 1))
    return command(args)


def _parser() -> Parser:
    about = "Video from diffusion transformers with semantic sparse attention."
    parser = Parser("semvid", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"semvid {machine.versions()['semvid']}")
    parser.set_defaults(run=None, parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    run = commands.add_parser("run", help="make a video", allow_abbrev=False, description="Make a video.")
    add_run_options(run)
    launchers.add_options(run)
    run.set_defaults(run=_run, parser=run)
    resume = commands.add_parser(
        "resume",
        help="go on with a job that was stopped",
        description="Go on with a job that was stopped, from its newest checkpoint, on any number of GPUs.",
        allow_abbrev=False,
    )
    resume.add_argument("job", metavar="ID|DIR", help="a job of --root, or any job folder")
    resume.add_argument("--root", type=Path, metavar="DIR", default=jobs.DEFAULT_ROOT, help="default: %(default)s")
    resume.add_argument("--json", action="store_true", help=JSON_HELP)
    launchers.add_options(resume)
    resume.set_defaults(run=_resume, parser=resume)
    compare = commands.add_parser(
        "compare",
        help="make a video with two presets and measure how alike they are",
        description="Make a video with two presets from the same seed; PSNR, SSIM, latent error, density, times.",
        allow_abbrev=False,
    )
    add_job_options(compare)
    compare.add_argument(
        "--preset", metavar="A", default=Config().preset, help=f"judged: {presets_text()} (default: %(default)s)"
    )
    compare.add_argument(
        "--against", metavar="B", default="dense", help=f"the yardstick: {presets_text()} (default: %(default)s)"
    )
    compare.set_defaults(run=_compare, parser=compare)
    queue.add(commands, add_run_options, replaced)
    add_estimate(commands.add_parser)
    _add_bench(commands)
    schedule.add_schedule(commands.add_parser)
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine can run and what is missing",
        description="Say what this machine can run, what is missing and the command that brings it.",
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead")
    doctor.set_defaults(run=_doctor, parser=doctor)
    return parser


def _add_bench(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Adds `bench` and what it can measure."""
    about = "Measure this machine."
    bench = commands.add_parser("bench", help="measure this machine", description=about, allow_abbrev=False)
    bench.set_defaults(run=None, parser=bench)
    what = bench.add_subparsers(metavar="WHAT", parser_class=Parser)
    bench_commands.add_layer(what.add_parser)
    bench_commands.add_attention(what.add_parser)
    quality_command.add_quality(what.add_parser)
    video_commands.add_e2e(what.add_parser)
    video_commands.add_throughput(what.add_parser)
    video_commands.add_checkpoint(what.add_parser)
    _add_bench_plan(what)
    kernels = what.add_parser(
        "kernels",
        help="each op and the whole attention call, checked, then timed, beside the peers that are installed",
        description="Check each op of the attention call, then time it, beside the peers that are installed.",
        allow_abbrev=False,
    )
    kernels.set_defaults(run=_bench_kernels, parser=kernels)
    add, default = kernels.add_argument, bench_options.Options()
    shapes, peers = ", ".join(bench_options.SHAPES), ", ".join(bench_options.PEERS)
    here = "wan14b-720p on a GPU, toy on a CPU"
    add("--shape", nargs="+", metavar="NAME", default=[], help=f"{shapes} (default: {here})")
    backends = choices(AttentionConfig, "backend")
    add("--backend", choices=backends, default=default.backend, help="whose ops (default: auto, the fastest here)")
    text = "share of token pairs computed, mean over heads as uneven as recorded ones (default: %(default)s)"
    add("--density", type=float, metavar="X", default=default.density, help=text)
    add("--query-clusters", type=int, metavar="N", help="default: the svg2 preset's for so many tokens")
    add("--key-clusters", type=int, metavar="N", help="default: likewise")
    text = "timed calls at most, fewer of what takes long (default: %(default)s)"
    add("--repeats", type=int, metavar="N", default=default.repeats, help=text)
    add("--warmup", type=int, metavar="N", default=default.warmup, help="calls before those (default: %(default)s)")
    text = f"all, none, or names (default: all, which leaves flex out): {peers}"
    add("--peers", nargs="+", metavar="NAME", default=list(default.peers), help=text)
    add("--device", choices=choices(ModelConfig, "device"), default=default.device, help="default: auto")
    add("--seed", type=int, metavar="N", default=default.seed, help="of the inputs (default: %(default)s)")
    text = f"where bench.json and the plots go (default: a new folder in {jobs.DEFAULT_ROOT}/)"
    add("--out", metavar="DIR", type=Path, help=text)
    add("--json", action="store_true", help="print one JSON object on stdout; the table goes to stderr")


def _add_bench_plan(what: "argparse._SubParsersAction[Parser]") -> None:
    """Adds `bench plan`."""
    plan = what.add_parser(
        "plan",
        help="how evenly, and with how many bytes, the planner shares recorded layers between GPUs; needs no GPU",
        description="Plan recorded layers for several numbers of GPUs: balance, bytes, time. The last line is JSON.",
        allow_abbrev=False,
    )
    plan.set_defaults(run=_bench_plan, parser=plan)
    add, default = plan.add_argument, bench_options.PlanOptions()
    text = "JSON of densities by head (default: those that semvid carries)"
    add("--traces", type=Path, metavar="FILE", default=default.traces, help=text)
    sizes = ",".join(map(str, default.world_sizes))
    add("--world-sizes", nargs="+", metavar="N", default=[sizes], help=f"numbers of GPUs (default: {sizes})")
    text = "of each head, uneven (default: %(default)s)"
    add("--query-clusters", type=int, metavar="N", default=default.query_clusters, help=text)
    text = "token pairs that a head, or a part of one, counts for beside its own (default: %(default)s)"
    add("--piece-cost", type=int, metavar="N", default=default.piece_cost, help=text)
    add("--json", action="store_true", help="print only the JSON list on stdout; the table goes to stderr")


def _run(args: argparse.Namespace) -> int:
    config = config_of(args, args.preset)
    start = _starter(args, config)
    return start(jobs.create(args.out or jobs.default_folder(config.video.prompt), config))


def _resume(args: argparse.Namespace) -> int:
    job = queue.resume(args.job, args.root)
    if job.done:
        raise ValueError(f"{args.job!r} holds a job that is done; its video is {job.video}")
    folders.check(job.config, folders.inspect(folders.locate(job.config.model.path)))
    check_device(job.config, args)
    return _starter(args, job.config)(job)


def _starter(args: argparse.Namespace, config: Config) -> Callable[[Job], int]:
    """Returns what runs a job by the launcher of a command line and returns the exit code; refuses what can't be."""
    launcher = launchers.chosen(args)
    if launcher == "ray":
        wanted = launchers.asked(args, config)
        address = args.address or env.ray_address()
        if address is None:
            launchers.check_one_host(args)
            _mesh(args, config)
            return lambda job: launchers.ray_here(job, wanted, args.json)
        launchers.check_address(address)
        return lambda job: queue.run(job, wanted, address, args.json)
    mesh = _mesh(args, config)
    if launcher == "torchrun":
        return lambda job: launchers.torchrun(job, args)
    return lambda job: _start(job, mesh, args.json)


def _start(job: Job, mesh: Mesh, as_json: bool) -> int:
    """Runs a job here, or in as many processes as its mesh has ranks, and returns the exit code."""
    from semvid.launch.ranks import worker

    if mesh.world_size == 1:
        return worker.alone(job.folder, as_json)
    from semvid.launch.ranks import local

    return local.recover(job, mesh.world_size, worker.take_part, job.folder, str(mesh), as_json)


def _mesh(args: argparse.Namespace, config: Config) -> Mesh:
    """Returns the mesh of --gpus and --mesh; raises ValueError if this machine can't realise it."""
    from semvid.launch.ranks.mesh_choice import resolve_mesh

    _check_gpus(args.gpus, config.model.device)
    launchers.check_sharing(config, args.gpus)
    return resolve_mesh(args.mesh, args.gpus, guided=folders.is_guided(config))


def _check_gpus(gpus: int, device: str) -> None:
    """Raises ValueError if there are fewer than `gpus` GPUs. Any number of processes shares a CPU."""
    if gpus < 1:
        raise ValueError(f"--gpus is {gpus}; accepted: 1 or more")
    if gpus == 1 or device == "cpu":
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        cpu = "--gpus 1, or --device cpu for as many processes"
        raise ValueError(f"--gpus is {gpus}, but there is no usable NVIDIA GPU; accepted: {cpu}")
    if gpus > found:
        there, accepted = ("is 1 GPU", "1") if found == 1 else (f"are {found} GPUs", f"1 .. {found}")
        raise ValueError(f"--gpus is {gpus}, but there {there}; accepted: {accepted}")


def _compare(args: argparse.Namespace) -> int:
    presets = {"preset": args.preset, "against": args.against}
    config = {side: config_of(args, name, f"--{side}") for side, name in presets.items()}
    # FP8 is what is judged, never the yardstick.
    exact = dataclasses.replace(config["against"].model, linear="same")
    config["against"] = dataclasses.replace(config["against"], model=exact)
    folder = args.out or jobs.default_folder(config["preset"].video.prompt)
    for side in presets:
        launchers.check_sharing(config[side], 1)
        jobs.check_out(folder / side)
    from semvid.launch.commands.compare import compare, table

    report = compare(folder, config)
    print("\n".join(table(report)), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, allow_nan=False))
    return 0


def _bench_kernels(args: argparse.Namespace) -> int:
    options = bench_options.Options(
        shapes=bench_options.words(args.shape),
        backend=args.backend,
        density=args.density,
        query_clusters=args.query_clusters,
        key_clusters=args.key_clusters,
        repeats=args.repeats,
        warmup=args.warmup,
        peers=bench_options.words(args.peers),
        device=args.device,
        seed=args.seed,
    )
    # Before torch is imported.
    bench_options.check(options)
    from semvid.launch.bench.kernels import run as kernels

    report, lines = kernels.run(options, args.out)
    print("\n".join(lines), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, allow_nan=False))
    return 1 if report["failed"] else 0


def _bench_plan(args: argparse.Namespace) -> int:
    options = bench_options.PlanOptions(
        traces=args.traces,
        world_sizes=bench_options.world_sizes(args.world_sizes),
        query_clusters=args.query_clusters,
        piece_cost=args.piece_cost,
    )
    from semvid.launch.bench import plan

    report, lines = plan.run(options)
    print("\n".join(lines), file=sys.stderr if args.json else sys.stdout)
    print(json.dumps(report["plans"], allow_nan=False))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from semvid.launch.commands.doctor import examine, lines

    found: dict[str, Any] = examine()
    print(json.dumps(found) if args.json else "\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
