"""Several processes of this machine for one job: started, watched and ended together."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection, resource_tracker
from typing import Any

from torch.multiprocessing.spawn import ProcessContext, start_processes
from tqdm import tqdm

from semvid.launch import env, worker
from semvid.runtime.job import Job

PROGRAM = "semvid"
PATIENCE_S = 5.0

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
    context = _start(world_size, (world_size, _free_port(), job, target, args))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with _passing_on(context) as told_to_stop:
            return _watch(context, job, told_to_stop)
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


def _watch(context: ProcessContext, job: Job, told_to_stop: Callable[[], bool]) -> int:
    """Waits for every process and returns the exit code. If one fails it ends the others.

    Raises:
        KeyboardInterrupt: a process was ended by Ctrl-C.
    """
    waiting = dict(enumerate(context.processes))
    while waiting:
        ready = connection.wait([process.sentinel for process in waiting.values()])
        for rank in [rank for rank, process in waiting.items() if process.sentinel in ready]:
            process = waiting.pop(rank)
            process.join()
            if process.exitcode:
                return _after_failure(context, job, rank, process.exitcode, told_to_stop())
    return 0


def _after_failure(context: ProcessContext, job: Job, rank: int, code: int, told_to_stop: bool) -> int:
    """Ends the other processes, says why if the failed one could not, and returns the exit code."""
    if code == env.STOPPED:
        # All have come as far before the first went.
        for process in context.processes:
            process.join(PATIENCE_S)
    _end(context)
    if code == -signal.SIGINT:
        raise KeyboardInterrupt
    if told_to_stop and code in (-signal.SIGTERM, env.STOPPED):
        # Where it came too early for the ranks, nobody has said so.
        job.stop("interrupted", step=job.step)
        return env.STOPPED
    reason = f"ended with exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        reason += ", as the system does where memory runs out"
    _report_death(job, rank, reason)
    return max(1, code)


def _report_death(job: Job, rank: int, reason: str) -> None:
    """Says and logs how a process ended, if it could not do so itself."""
    job.sweep()
    running = job.state == "running"
    if job.stop("failed", step=job.step, rank=rank, reason=reason):
        worker.end_bar(running)
        print(f"{PROGRAM}: rank {rank}: {reason}", file=sys.stderr)


def _end(context: ProcessContext) -> None:
    """Ends every process that still runs and waits until it is gone."""
    for process in context.processes:
        # SIGTERM would let it finish its step, which it can't without the others.
        process.kill()
    for process in context.processes:
        process.join()


def _rank(rank: int, world_size: int, port: int, job: Job, target: Target, args: tuple[Any, ...]) -> None:
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
    code = worker.guarded(PROGRAM, job, rank, lambda: target(*args))
    if code:
        env.end(code)


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
