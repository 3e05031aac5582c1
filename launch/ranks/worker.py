"""One rank of one job, alone or by torchrun: `python -m semvid.launch.ranks.worker --job DIR` runs its job.toml."""

import contextlib
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semvid.launch import env, errors, machine
from semvid.launch.control import cancel, lease
from semvid.launch.ranks import watch
from semvid.launch.ranks.mesh_choice import resolve_mesh
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.heartbeat import Pulse
from semvid.runtime.jobs.job import Job, StoppedError
from semvid.runtime.models import folder as folders

if TYPE_CHECKING:
    import torch

    from semvid.parallel.ranks import Ranks

PROGRAM = "semvid.launch.ranks.worker"
SETTLE_S = 1.0


def run(
    folder: Path,
    label: str = "",
    pipeline: Any = None,
    ranks: "Ranks | None" = None,
    told_to_stop: Callable[[], bool] = lambda: False,
    pulse: Pulse | None = None,
) -> tuple[Job, Any]:
    """Runs the job of a folder with a progress bar on stderr and returns (Job, Result).

    On a rank other than 0 there is no bar, and None for the result.

    Args:
        folder: holds job.toml.
        label: stands before the bar.
        pipeline: the loaded checkpoint, if there is one already.
        ranks: this process among those of the job; alone if absent.
        told_to_stop: asked after each step.
        pulse: counts what this rank passes.

    Raises:
        ValueError: no job there, or its configuration does not fit the model or its own checkpoint.
        StoppedError: the job was told to stop.
    """
    env.prepare()
    from semvid.launch.report import Bar
    from semvid.runtime.jobs.generate import generate
    from semvid.runtime.models import load

    load.quiet()
    job = jobs.load(folder)
    if ranks is not None and ranks.rank > 0:
        return job, generate(job, pipeline=pipeline, ranks=ranks, told_to_stop=told_to_stop, pulse=pulse)
    with Bar(label) as bar:
        return job, generate(
            job,
            bar,
            pipeline,
            ranks,
            say=bar.say,
            told_to_stop=told_to_stop,
            pulse=pulse,
            keep=lambda result: _keep(job, result),
        )


def alone(folder: Path, as_json: bool) -> int:
    """Runs the job of a folder in this process and returns 0; nobody else runs it meanwhile.

    Raises:
        ValueError: as `run`, or somebody runs it.
        StoppedError: likewise.
    """
    with env.told_to_stop() as told, _held(jobs.load(folder)):
        wanted = _or_cancelled(folder, told)
        return report(folder, as_json, told_to_stop=wanted, pulse=env.watched(folder, 0))


def report(
    folder: Path,
    as_json: bool,
    ranks: "Ranks | None" = None,
    told_to_stop: Callable[[], bool] = lambda: False,
    pulse: Pulse | None = None,
) -> int:
    """Runs the job of a folder, prints the summary and with `as_json` one JSON object on rank 0, and returns 0.

    Raises:
        ValueError: as `run`.
        StoppedError: likewise.
    """
    job, result = run(folder, ranks=ranks, told_to_stop=told_to_stop, pulse=pulse)
    if result is None:
        return 0
    from semvid.launch import report as reports

    reports.tell(job, as_json)
    return 0


def _keep(job: Job, result: Any) -> None:
    """Writes the report of a job that is about to be done."""
    from semvid.launch import report as reports

    reports.keep(job, reports.as_json(job, result, machine.surroundings(result.device)))


def take_part(folder: Path, mesh: str | None, as_json: bool, pulse: Pulse | None = None) -> int:
    """Runs the job of a folder as the rank that torchrun's variables name, and returns 0.

    SIGTERM lets the step end and a checkpoint be written, whenever it comes.

    Args:
        folder: holds job.toml.
        mesh: degrees of the axes; None: those that serve so many ranks best.
        as_json: print one JSON object on stdout; the summary goes to stderr.
        pulse: counts what this rank passes; where it is given another process watches it and holds the job.

    Raises:
        ValueError: the mesh is not one of as many ranks as there are, or as `run`.
        StoppedError: as `run`.
    """
    place, job = env.seat(), jobs.load(folder)
    if place.world_size == 1 and pulse is None:
        resolve_mesh(mesh, 1, guided=folders.is_guided(job.config))
        return alone(folder, as_json)
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(env.told_to_stop())
        if pulse is None:
            if place.rank == 0:
                stack.enter_context(_held(job))
                told = _or_cancelled(folder, told)
            pulse = env.watched(folder, place.rank)
            stack.enter_context(watch.by_itself(pulse, job))
        pulse.beat("start")
        return _join(job, place, mesh, as_json, told, pulse)


@contextlib.contextmanager
def _held(job: Job) -> Iterator[None]:
    """Holds a job that nobody supervises; one that stops inside because it was cancelled says so."""
    with lease.hold(job.folder):
        cancel.forget(job.folder)
        try:
            yield
        except StoppedError:
            if cancel.is_wanted(job.folder):
                job.log("stop", state="cancelled", step=job.step)
                cancel.forget(job.folder)
            raise


def _or_cancelled(folder: Path, told_to_stop: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: told_to_stop() or cancel.is_wanted(folder)


def _join(
    job: Job, place: env.Seat, mesh: str | None, as_json: bool, told_to_stop: Callable[[], bool], pulse: Pulse
) -> int:
    """Meets the other ranks, runs the job with them and leaves them."""
    if place.rank == 0:
        job.log("join", state="queued", world_size=place.world_size)
    else:
        env.hush()
    env.prepare()
    guided = folders.is_guided(job.config)
    if place.world_size == 1:
        resolve_mesh(mesh, 1, guided=guided)
        return report(job.folder, as_json, None, told_to_stop, pulse)
    from semvid.parallel import phases, ranks

    device = _own_device(job.config.model.device, place.local_rank)
    # Longer than the watch needs to find a rank that hangs: it says which.
    seconds = max(600.0, 2 * job.config.job.hang_seconds)
    with phases.counting(pulse.beat_of_meeting):
        ranks.join(device, meeting=ranks.Meeting(place.rank, place.world_size, *env.meeting()), seconds=seconds)
        chosen = resolve_mesh(mesh, place.world_size, guided=guided, hosts=ranks.hosts())
        code = report(job.folder, as_json, ranks.connect(chosen), told_to_stop, pulse)
    # Not after an error: the others may be in the middle of a collective, and leaving can wait for them.
    ranks.leave()
    return code


def guarded(program: str, job: Job, rank: int, work: Callable[[], int], ends_as: str = "failed") -> int:
    """Returns what `work` returns, or the exit code of what stopped this rank: 2 (bad input), 1, 130 (Ctrl-C) or 143.

    The first rank that fails says why, on stderr and in the job's events. The others' errors follow from the first,
    and they stay silent.

    Args:
        program: what stands before the line.
        job: whose events say how it ended.
        rank: this one.
        work: what this rank does.
        ends_as: the job's state after an error that need not come again: "recovering" where it will be tried again.
    """
    try:
        try:
            return work()
        except StoppedError:
            return errors.STOPPED
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must end too
            return _fail(f"{program}: rank {rank}", job, rank, error, ends_as)
    except KeyboardInterrupt:
        if job.stop("cancelled", step=job.step):
            print(f"{program}: {errors.INTERRUPTED}", file=sys.stderr)
        return 130


def end_bar(running: bool) -> None:
    """Ends the line of another process's progress bar, if the job was running, so that a message stands alone."""
    if running:
        print(file=sys.stderr)


def _fail(program: str, job: Job, rank: int, error: Exception, ends_as: str) -> int:
    """Says and logs what stopped this rank, if no other was first, and returns the exit code."""
    # Where this error only follows from the death of another rank, who started the ranks ends this one meanwhile.
    time.sleep(SETTLE_S)
    running, name = job.state == "running", type(error).__name__
    reason = f"{name}: {error}"
    if isinstance(error, ValueError):
        ends_as = "failed"
    elif errors.lacks_memory(error):
        ends_as, reason = "failed", f"{reason}; {errors.MORE_MEMORY}"
    try:
        first = job.stop(ends_as, step=job.step, rank=rank, reason=reason)
    except OSError:
        # A full disk, perhaps the error itself.
        first = True
    if not first:
        # Another rank has the word, and all are ended once one exits: it shall be that one.
        time.sleep(SETTLE_S)
        return 1
    # Rank 0 has ended its own.
    end_bar(running and rank > 0)
    try:
        message, code = errors.explain(error)
    except Exception:  # noqa: BLE001 - a defect: its traceback too
        traceback.print_exception(error)
        message, code = " ".join(str(error).split()), 1
    print(f"{program}: {name}: {message}", file=sys.stderr)
    return code


def _own_device(name: str, local_rank: int) -> "torch.device":
    """Returns this rank's device; on a machine with GPUs "cuda" means this one from here on.

    Raises:
        ValueError: there are fewer GPUs than ranks.
    """
    import torch

    from semvid.runtime.device import resolve_device

    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if local_rank >= torch.cuda.device_count():
        num = torch.cuda.device_count()
        raise ValueError(f"LOCAL_RANK is {local_rank}, but the GPUs here are 0 .. {num - 1}; accepted: a rank a GPU")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def main() -> int:
    """Runs as a program; returns the exit code."""
    env.follow_parent()
    about = "Run the job.toml of a job folder, from its newest checkpoint if it has one and is not done."
    parser = ArgumentParser(PROGRAM, description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--job", type=Path, required=True, metavar="DIR", help="the job folder")
    add("--mesh", metavar="AXES", help="by torchrun: cfg=2,ring=1,ulysses=2 (default: what serves the ranks best)")
    add("--json", action="store_true", help="print one JSON object on stdout; the summary goes to stderr")
    args = parser.parse_args()
    return errors.exit_code(PROGRAM, lambda: _main(args))


def _main(args: Namespace) -> int:
    place, job = env.seat(), jobs.load(args.job)
    if job.done:
        # As when a line that goes on with a job is given once too often.
        if place.rank == 0:
            print(f"{PROGRAM}: {str(args.job)!r} is done; its video is {job.video}", file=sys.stderr)
        return 0
    if place.world_size == 1 and not env.is_watched():
        return take_part(args.job, args.mesh, args.json)
    pulse = env.watched(args.job, place.rank) if env.is_watched() else None
    ends_as = "recovering" if pulse else "failed"
    work = guarded(PROGRAM, job, place.rank, lambda: take_part(args.job, args.mesh, args.json, pulse), ends_as)
    return work if work == 0 else env.end(work)


if __name__ == "__main__":
    sys.exit(main())
