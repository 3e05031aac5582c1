"""One rank as a process of its own under another that does no work: it can be watched, and ended at any moment."""

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from semvid.launch import env
from semvid.launch.env import Seat
from semvid.runtime.jobs.heartbeat import BOARD_BYTES, Seen, read_board

LOGS = "logs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a rank is told. Plain values: they travel between hosts."""

    folder: Path
    seat: Seat
    host: str
    """Where the ranks meet."""
    port: int
    gpus: tuple[str, ...]
    """Those of this job on this host, by the names that CUDA_VISIBLE_DEVICES takes; none: the CPU."""
    threads: int
    """Of PyTorch on the CPU."""
    mesh: str | None = None
    faults: str = ""
    loopback: bool = False
    """All ranks are on one host: nothing need listen for others."""


class Sight(NamedTuple):
    """What is seen of a rank."""

    code: int | None
    """The exit code, None while it runs."""
    board: Seen


class Child:
    """The process of one rank, ended at the latest when the thread that made it ends. Linux alone sees to that."""

    def __init__(self, order: Order) -> None:
        # It has no name, so that nobody has to remove it.
        with tempfile.TemporaryFile() as file:
            file.truncate(BOARD_BYTES)
            self.board = mmap.mmap(file.fileno(), BOARD_BYTES)
            self.process = _start(order, file.fileno())

    def look(self) -> Sight:
        """Returns how it is."""
        return Sight(self.process.poll(), read_board(self.board))

    def tell_to_stop(self) -> None:
        """Sends SIGTERM: it ends after its step, with a checkpoint."""
        if self.process.poll() is None:
            self.process.terminate()

    def end(self) -> None:
        """Ends it at once and waits until it is gone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def log_of(folder: Path, rank: int) -> Path:
    """Returns the file that has what a rank has printed, over all lives of the job."""
    return folder / LOGS / f"rank-{rank:04d}.log"


def _start(order: Order, board: int) -> "subprocess.Popen[bytes]":
    words = ["-m", "semvid.launch.ranks.worker", "--job", str(order.folder)]
    words += [] if order.mesh is None else ["--mesh", order.mesh]
    log = log_of(order.folder, order.seat.rank)
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=_environment(order, board),
            pass_fds=[board],
            # Ctrl-C is the parent's.
            start_new_session=True,
        )


def _environment(order: Order, board: int) -> Mapping[str, str]:
    given = env.rank_variables(order.seat, order.host, order.port)
    given |= {
        env.BOARD: str(board),
        env.PARENT: str(os.getpid()),
        env.FAULT: order.faults,
        "OMP_NUM_THREADS": str(order.threads),
    }
    given["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if order.gpus:
        given["CUDA_VISIBLE_DEVICES"] = ",".join(order.gpus)
    if order.loopback:
        given = {**env.LOOPBACK, **env.inherited(), **given}
    return {**env.inherited(), **given}
