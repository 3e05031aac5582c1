"""Several processes of this machine for one job: started, watched and ended together."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, resource_tracker
from multiprocessing.sharedctypes import RawArray
from typing import Any

from torch.multiprocessing.spawn import ProcessContext, start_processes
from tqdm import tqdm

from semvid.launch import env, errors
from semvid.launch.control import cancel, lease
from semvid.launch.ranks import worker
from semvid.launch.ranks.attempts import cause_of, report_death, supervise
from semvid.launch.ranks.watch import Watch
from semvid.runtime.jobs.heartbeat import BOARD_BYTES, read_board
from semvid.runtime.jobs.job import Job

PROGRAM = "semvid"
PATIENCE_S = 5.0
PATROL_S = 0.5

Target = Callable[..., int]


def run(job: Job, world_size: int, target: Target, *args: Any) -> int:
    """Runs `target(*args)` in as many processes, each with torchrun's variables, and returns the exit code.

    It is 0, 1, 2, or 143 after SIGTERM, which is passed on to all. If one fails the others are ended, and its own error
    is what is said and logged. No process is left behind, also where this one is killed.

    Args:
        job: whose events say how it ended.
        world_size: how many processes.
        target: a module's function; returns an exit code.
        args: what it is given; pickled.

    Raises:
        KeyboardInterrupt: Ctrl-C; the job's state is then "cancelled".
    """
    return _live(job, world_size, target, args, None)


def recover(job: Job, world_size: int, target: Target, *args: Any) -> int:
    """Runs `target(*args, pulse=…)` as `run` does, again whenever a rank dies or hangs, and returns the exit code.

    Holds the job meanwhile. It ends where the job is done, fails for good, is told to stop or is cancelled.

    Raises:
        HeldError: another process runs the job.
        KeyboardInterrupt: as `run`.
    """
    boards = RawArray("c", world_size * BOARD_BYTES)

    def live() -> int:
        ctypes.memset(boards, 0, len(boards))
        return _live(job, world_size, target, args, boards)

    with lease.hold(job.folder):
        cancel.forget(job.folder)
        job.log("begin", launcher="local")
        return supervise(job, live)


class _Patrol:
    """Looks after the ranks of one life of a job that is to go on after a death."""

    def __init__(self, job: Job, boards: Any) -> None:
        self.job = job
        self.boards = boards
        self.watch = Watch(job.config.job)

    def look(self, running: Iterable[int]) -> tuple[int | None, str] | None:
        """Returns (rank, reason) as Watch.look does if the job hangs, whose ranks `running` have not ended.

        Raises:
            KeyboardInterrupt: somebody has cancelled it.
        """
        if cancel.is_wanted(self.job.folder):
            raise KeyboardInterrupt
        return self.watch.look({rank: read_board(self.boards, rank) for rank in running})


def _live(job: Job, world_size: int, target: Target, args: tuple[Any, ...], boards: Any) -> int:
    """Runs one life of a job; with boards its ranks are watched, and after a death it is to go on."""
    context = _start(world_size, (world_size, env.free_port(), job, target, args, boards))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with _passing_on(context) as told_to_stop:
            return _watch(context, job, told_to_stop, None if boards is None else _Patrol(job, boards))
    except KeyboardInterrupt:
        _end(context)
        job.sweep()
        worker.end_bar(job.state == "running")
        job.stop("cancelled", step=job.step)
        raise


def _start(world_size: int, given: tuple[Any, ...]) -> ProcessContext:
    """Starts the processes and returns their context; Ctrl-C is held back from here on, in them and in this one."""
    # Starting it would let Ctrl-C through again.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        # Daemons: Python ends them with this process, however it goes.
        context: ProcessContext = start_processes(
            _rank, given, world_size, join=False, daemon=True, start_method="spawn"
        )
    except BaseException:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        raise
    return context


@contextlib.contextmanager
def _passing_on(context: ProcessContext) -> Iterator[Callable[[], bool]]:
    """Passes SIGTERM on to every process, and yields what says whether it has come."""
    told = threading.Event()

    def pass_on(*_: Any) -> None:
        told.set()
        for process in context.processes:
            process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _watch(context: ProcessContext, job: Job, told_to_stop: Callable[[], bool], patrol: _Patrol | None) -> int:
    """Waits for every process and returns the exit code. If one fails, or hangs, it ends the others.

    Raises:
        KeyboardInterrupt: a process was ended by Ctrl-C, or the job was cancelled.
    """
    waiting = dict(enumerate(context.processes))
    ends_as = "recovering" if patrol else "failed"
    while waiting:
        ready = connection.wait([process.sentinel for process in waiting.values()], PATROL_S if patrol else None)
        for rank in [rank for rank, process in waiting.items() if process.sentinel in ready]:
            process = waiting.pop(rank)
            process.join()
            if process.exitcode:
                return _after_failure(context, job, rank, process.exitcode, told_to_stop(), ends_as)
        if waiting and patrol and (hung := patrol.look(waiting)):
            _end(context)
            report_death(job, *hung, ends_as)
            return 1
    return 0


def _after_failure(context: ProcessContext, job: Job, rank: int, code: int, told_to_stop: bool, ends_as: str) -> int:
    """Ends the other processes, says why if the failed one could not, and returns the exit code."""
    if code == errors.STOPPED:
        # All have come as far before the first went.
        for process in context.processes:
            process.join(PATIENCE_S)
    _end(context)
    if code == -signal.SIGINT:
        raise KeyboardInterrupt
    if told_to_stop and code in (-signal.SIGTERM, errors.STOPPED):
        # Where it came too early for the ranks, nobody has said so.
        job.stop("interrupted", step=job.step)
        return errors.STOPPED
    report_death(job, rank, cause_of(code), ends_as)
    return max(1, code)


def _end(context: ProcessContext) -> None:
    """Ends every process that still runs and waits until it is gone."""
    for process in context.processes:
        # SIGTERM would let it finish its step, which it can't without the others.
        process.kill()
    for process in context.processes:
        process.join()


def _rank(rank: int, world_size: int, port: int, job: Job, target: Target, args: tuple[Any, ...], boards: Any) -> None:
    """Runs one process; its exit code is the target's, or that of its error."""
    # torch has this process get SIGINT when its parent dies. By default that and Ctrl-C end it at once, also in the
    # middle of a collective; the parent says what happened.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != os.getppid():
        # The parent died before that.
        env.end(1)
    # The bar's own lock is for several processes: a named semaphore, which a process that is ended leaves behind.
    tqdm.set_lock(threading.RLock())
    env.take_seat(env.Seat(rank, world_size, rank), port)
    if boards is None:
        code = worker.guarded(PROGRAM, job, rank, lambda: target(*args))
    else:
        board = memoryview(boards).cast("B")[rank * BOARD_BYTES :]
        pulse = env.watched(job.folder, rank, board)
        code = worker.guarded(PROGRAM, job, rank, lambda: target(*args, pulse=pulse), "recovering")
    if code:
        env.end(code)
