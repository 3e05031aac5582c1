"""Several processes of this machine for one job: started, watched and ended together."""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, start_processes
from tqdm import tqdm

from semvid.launch import env, worker
from semvid.runtime.job import Job

PROGRAM = "semvid"
PATIENCE_S = 5.0

Target = Callable[..., int]


def run(job: Job, world_size: int, target: Target, *args: Any) -> int:
    """Runs `target(*args)` in as many processes, each with torchrun's variables, and returns the exit code: 0, 1 or 2.

    If one fails the others are ended, and its own error is what is said and logged. No process is left behind, also
    where this one is killed.

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
        return _watch(context, job)
    except KeyboardInterrupt:
        _end(context)
        job.sweep()
        worker.end_bar(job.state == "running")
        job.stop("cancelled", step=job.step)
        raise


def _start(world_size: int, given: tuple[Any, ...]) -> ProcessContext:
    """Starts the processes and returns their context; Ctrl-C is held back from here on, in them and in this one."""
    # It warns of each process that it ends; that is no news.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    # Starting it would let Ctrl-C through again.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Daemons: Python ends them with this process, however it goes.
    context: ProcessContext = start_processes(_rank, given, world_size, join=False, daemon=True, start_method="spawn")
    return context


def _watch(context: ProcessContext, job: Job) -> int:
    """Waits for every process and returns the exit code. If one fails it ends the others.

    Raises:
        KeyboardInterrupt: a process was ended by Ctrl-C.
    """
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        if error.exit_code == -signal.SIGINT:
            raise KeyboardInterrupt from None
        code = error.exit_code
        reason = f"ended with exit code {code}" if code > 0 else f"killed by {error.signal_name}"
        if error.signal_name == "SIGKILL":
            reason += ", as the system does where memory runs out"
        _report_death(job, error.error_index, reason)
        return max(1, code)
    return 0


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
        process.terminate()
    for process in context.processes:
        process.join(PATIENCE_S)
        process.kill()
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
