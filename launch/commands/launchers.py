"""Who starts the ranks of a job: this process, torchrun, or Ray on this machine or on a cluster."""

import argparse
import contextlib
import dataclasses
import os
import socket
import sys
from pathlib import Path

from semvid.launch import env, machine
from semvid.launch.control import cancel, request
from semvid.launch.control.request import Request
from semvid.runtime.config import Config
from semvid.runtime.jobs.job import Job
from semvid.runtime.models import folder as folders

CONNECT_S = 5.0
"""So long an address has to answer."""

NAMES = ("local", "torchrun", "ray")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says how many processes share a job, how, and who starts them."""
    add = parser.add_argument
    text = "processes that share the job, a GPU each; with --device cpu the cores (default: %(default)s)"
    add("--gpus", type=int, metavar="N", default=1, help=text)
    text = (
        "how they share it, such as cfg=2,ring=1,ulysses=2: branches of guidance, then the sequence (default: chosen)"
    )
    add("--mesh", metavar="AXES", help=text)
    text = "who starts them: this command, torchrun, or Ray (default: ray for several GPUs or if RAY_ADDRESS is set)"
    add("--launcher", choices=NAMES, help=text)
    add("--nodes", type=int, metavar="N", help="with Ray: hosts, with equally many GPUs each (default: as few as do)")
    text = (
        "of a Ray cluster: auto, HOST:6379 or ray://HOST:10001 (default: RAY_ADDRESS, else one of this machine alone)"
    )
    add("--address", metavar="WHERE", help=text)


def chosen(args: argparse.Namespace) -> str:
    """Returns the launcher of a command line.

    Raises:
        ValueError: options that only Ray takes are given with another launcher, or SEMVID_FAULT is none.
    """
    env.fault_text()
    for_ray = [name for name in ("address", "nodes") if getattr(args, name) is not None]
    if for_ray and args.launcher not in (None, "ray"):
        raise ValueError(f"--{for_ray[0]} is for --launcher ray; --launcher is {args.launcher!r}")
    # RAY_ADDRESS is set in a job of `ray job submit`, whose own process may have no GPU.
    return str(args.launcher or ("ray" if for_ray or args.gpus > 1 or env.ray_address() else "local"))


def is_elsewhere(args: argparse.Namespace) -> bool:
    """Returns whether a command line means a cluster, whose GPUs can't be seen from here."""
    if not hasattr(args, "launcher"):
        return False
    named = args.address is not None or env.ray_address() is not None
    return hasattr(args, "prompts") or (named and chosen(args) == "ray")


def asked(args: argparse.Namespace, config: Config) -> Request:
    """Returns what a command line asks of a cluster.

    Raises:
        ValueError: no cluster can realise it.
    """
    from semvid.launch.ranks.mesh_choice import resolve_mesh

    wanted = Request(
        gpus=args.gpus,
        nodes=args.nodes,
        mesh=args.mesh,
        on_gpu=request.on_gpu(config),
        threads=args.threads,
        faults=env.fault_text(),
    )
    request.check(wanted)
    check_sharing(config, args.gpus)
    if args.mesh is not None:
        resolve_mesh(args.mesh, args.gpus, guided=folders.is_guided(config))
    return wanted


def check_one_host(args: argparse.Namespace) -> None:
    """Raises ValueError if several hosts are asked for where there is no cluster, but this machine."""
    if args.nodes is not None and args.nodes > 1:
        raise ValueError(f"--nodes is {args.nodes}, but without --address there is this machine alone; accepted: 1")


def check_address(address: str) -> None:
    """Raises ValueError if nothing listens where a cluster is said to be: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ValueError(f"--address is {address!r}, where nothing listens: {reason}") from None


def check_sharing(config: Config, gpus: int) -> None:
    """Raises ValueError if a job's weights shall be shared among one GPU."""
    if config.job.share_weights and gpus == 1:
        raise ValueError("job.share_weights is True, but one GPU has nobody to share with; accepted: --gpus 2 or more")


def torchrun(job: Job, args: argparse.Namespace) -> int:
    """Becomes torchrun with as many workers on this machine; does not return.

    torchrun starts all again where one dies, and the job goes on from its last checkpoint.
    """
    restarts = str(job.config.job.failures - 1)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus)]
    words += ["--max-restarts", restarts, "-m", "semvid.launch.ranks.worker", "--job", str(job.folder)]
    words += [] if args.mesh is None else ["--mesh", args.mesh]
    words += ["--json"] if args.json else []
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *words])


def ray_here(job: Job, wanted: Request, as_json: bool) -> int:
    """Runs a job on a Ray of this machine that is started for it and ended with it; returns the exit code."""
    from semvid.launch.control import lease
    from semvid.launch.control.status import Follower
    from semvid.launch.ranks import ray_cluster
    from semvid.launch.ranks.attempts import supervise
    from semvid.launch.report import Bar
    from semvid.runtime.device import resolve_device

    wanted = dataclasses.replace(wanted, on_gpu=resolve_device(job.config.model.device).type == "cuda")
    with lease.hold(job.folder), contextlib.ExitStack() as stack:
        cancel.forget(job.folder)
        job.log("begin", launcher="ray", gpus=wanted.gpus)
        stack.enter_context(ray_cluster.connected(None, max(wanted.gpus, machine.usable_cores())))
        told = stack.enter_context(env.told_to_stop())
        bar = stack.enter_context(Bar())
        follower = Follower(job, bar, bar.say)
        code = supervise(job, lambda: ray_cluster.live(job, wanted, told, follower.look), bar.say)
        follower.look()
    return ended(job, code, as_json)


def ended(job: Job, code: int, as_json: bool) -> int:
    """Says how a job has ended that other processes ran, and returns the exit code."""
    from semvid.launch.ranks.attempts import last_stop
    from semvid.launch.report import tell

    if job.state == "done":
        tell(job, as_json)
        return 0
    last = last_stop(job)
    if job.state == "interrupted":
        print(f"semvid: told to stop; it goes on with: semvid resume {job.folder}", file=sys.stderr)
    elif job.state == "cancelled":
        print("semvid: cancelled", file=sys.stderr)
    elif last:
        rank = "" if last.get("rank") is None else f"rank {last['rank']}: "
        print(f"semvid: {rank}{last.get('reason', job.state)}; see {Path(job.folder) / 'logs'}", file=sys.stderr)
    return code
