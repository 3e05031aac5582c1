"""`semvid submit | jobs | logs | cancel`, and `run` and `resume` on a cluster: the queue as a person uses it."""

import argparse
import json
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semvid.launch import env, errors
from semvid.launch.commands import launchers
from semvid.launch.control import cancel, lease, status
from semvid.launch.control.request import Request
from semvid.runtime.config import Config
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import ENDS, Job

FOLLOW_S = 0.5
WAKE_S = 15.0

Maker = Callable[[argparse.Namespace, dict[str, Any]], Config]
"""Returns the configuration of a command line, with some options of [video] replaced."""


def add(commands: Any, add_job_options: Callable[[Any], None], make: Maker) -> None:
    """Adds the commands to a parser's."""
    submit = _command(commands, "submit", "put one or many jobs into the queue of a Ray cluster")
    add_job_options(submit)
    text = "a job a line, or TOML with [[video]] tables that each replace options; instead of PROMPT"
    submit.add_argument("--prompts", type=Path, metavar="FILE", help=text)
    launchers.add_options(submit)
    _add_root(submit)
    submit.set_defaults(run=lambda args: _submit(args, make), parser=submit)
    listing = _command(commands, "jobs", "list jobs: state, step, time left, density, GPUs")
    _add_root(listing)
    listing.add_argument("--json", action="store_true", help="print one JSON list instead")
    listing.set_defaults(run=_jobs, parser=listing)
    logs = _command(commands, "logs", "print what the ranks of a job have printed")
    logs.add_argument("id", metavar="ID", help="as `semvid jobs` lists it")
    logs.add_argument("--rank", type=int, metavar="N", default=0, help="whose (default: %(default)s)")
    _add_root(logs)
    logs.set_defaults(run=_logs, parser=logs)
    ending = _command(commands, "cancel", "end a job that waits or runs")
    ending.add_argument("id", metavar="ID", help="as `semvid jobs` lists it")
    _add_root(ending)
    ending.set_defaults(run=_cancel, parser=ending)


def run(job: Job, wanted: Request, address: str, as_json: bool) -> int:
    """Runs a job on a cluster through the queue of its folder, follows it, and returns the exit code.

    If this command dies the job goes on; Ctrl-C cancels it.

    Raises:
        HeldError: somebody runs it already, whom Ctrl-C here would end.
    """
    lease.check_free(job.folder)
    from semvid.launch.queue import queue
    from semvid.launch.ranks import ray_cluster
    from semvid.launch.report import Bar

    with ray_cluster.connected(address, 0), Bar() as bar:
        follower = status.Follower(job, bar, bar.say)
        queue.submit_again(job, wanted)
        try:
            _wait(job, follower)
        except KeyboardInterrupt:
            cancel.ask(job.folder)
            _wait(job, follower)
            raise
    codes = {"done": 0, "interrupted": errors.STOPPED, "cancelled": 130}
    return launchers.ended(job, codes.get(job.state, 1), as_json)


def resume(text: str, root: Path) -> Job:
    """Returns the job that `semvid resume` names: a folder, or the name of one in `root`.

    Raises:
        ValueError: there is none.
    """
    path = Path(text)
    return jobs.load(path if (path / "job.toml").exists() or len(path.parts) != 1 else jobs.locate(root, text))


def _wait(job: Job, follower: status.Follower) -> None:
    """Shows a job of the queue until it has ended; wakes its supervisor now and then, which may have died for good."""
    from semvid.launch.queue import ray_actor

    woken_at = -WAKE_S
    while job.state not in ENDS:
        if time.monotonic() - woken_at > WAKE_S:
            ray_actor.wake(job.folder.parent)
            woken_at = time.monotonic()
        follower.look()
        time.sleep(FOLLOW_S)
    follower.look()


def _submit(args: argparse.Namespace, make: Maker) -> int:
    if args.out is not None:
        raise ValueError(
            f"--out is {str(args.out)!r}; accepted: nothing, as jobs of a queue are named by time in --root"
        )
    given = [{}] if args.prompts is None else _prompts(args)
    configs = [make(args, one) for one in given]
    # All ask for the same; that it can be is a matter of each.
    (wanted, *_) = [launchers.asked(args, config) for config in configs]
    address = args.address or env.ray_address() or "auto"
    launchers.check_address(address)
    from semvid.launch.queue import queue, ray_actor
    from semvid.launch.ranks import ray_cluster

    with ray_cluster.connected(address, 0):
        made = queue.submit(args.root, configs, wanted)
        ray_actor.wake(args.root)
    lines = [json.dumps([job.folder.name for job in made])] if args.json else [job.folder.name for job in made]
    print("\n".join(lines))
    return 0


def _prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the options of [video] of each job in a file.

    Raises:
        ValueError: it can't be read, or holds something else, or there is a PROMPT too.
    """
    path = args.prompts
    if args.prompt is not None:
        raise ValueError(f"--prompts is {str(path)!r}, but there is a PROMPT too; accepted: one of them")
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = tomllib.loads(text) if path.suffix == ".toml" else None
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts is {str(path)!r}, which can't be read: {error}") from None
    if table is None:
        found = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    else:
        found = table.get("video", [])
        if set(table) - {"video"} or not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise ValueError(f"--prompts is {str(path)!r}; accepted: [[video]] tables alone")
    if not found:
        raise ValueError(f"--prompts is {str(path)!r}, which holds no prompt; accepted: one a line, or [[video]]")
    return found


def _jobs(args: argparse.Namespace) -> int:
    if args.root != jobs.DEFAULT_ROOT and not args.root.is_dir():
        raise ValueError(f"--root is {str(args.root)!r}, which is no folder")
    rows = [status.status(job) for job in status.found(args.root)]
    print(json.dumps(rows, allow_nan=False) if args.json else "\n".join(status.table(rows)))
    return 0


def _logs(args: argparse.Namespace) -> int:
    from semvid.launch.ranks.rank_process import log_of

    folder = jobs.locate(args.root, args.id)
    path = log_of(folder, args.rank)
    if not path.is_file():
        ranks = sorted(int(found.stem.removeprefix("rank-")) for found in path.parent.glob("rank-*.log"))
        there = f"those of ranks {ranks}" if ranks else "none: ranks that Ray has started leave them"
        raise ValueError(f"--rank is {args.rank}, which has left no log in {args.id!r}; there are {there}")
    print(path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n"), end="")
    return 0


def _cancel(args: argparse.Namespace) -> int:
    job = jobs.load(jobs.locate(args.root, args.id))
    if job.state in ENDS:
        raise ValueError(f"job {args.id!r} is {job.state}; accepted: one that waits or runs")
    try:
        with lease.hold(job.folder):
            job.stop("cancelled", step=job.step)
            cancel.forget(job.folder)
    except lease.HeldError:
        cancel.ask(job.folder)
    print(f"{args.id}: {'cancelled' if job.state == 'cancelled' else 'asked to end'}", file=sys.stderr)
    return 0


def _command(commands: Any, name: str, text: str) -> Any:
    return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)


def _add_root(parser: Any) -> None:
    text = "the folder of the jobs, on a file system that all hosts share (default: %(default)s)"
    parser.add_argument("--root", type=Path, metavar="DIR", default=jobs.DEFAULT_ROOT, help=text)
