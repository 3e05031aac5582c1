"""What a rank tells those who watch it: counts that move only while its work moves. And, for tests, faults. No torch.

The main thread counts each named point that it passes: a block of a model, a phase of an attention call, a frame that
is written. Stuck in a collective it passes none. All ranks pass the same points, so the one that hangs has passed the
fewest. Two more counts are not compared: blocks that a GPU has finished, and what this rank does for all or beside the
main thread, which are the blocks of encoders and of the VAE and the bytes that the writer of checkpoints has written.
"""

import os
import signal
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

BOARD_BYTES = 64
"""What one rank writes: three counts and the name of a point."""
_BOARD = struct.Struct("<QQQ40s")
POINTS = ("start", "load", "encode", "cluster", "all-reduce", "exchange", "step", "checkpoint", "decode", "write")
"""Those that a fault may name."""


class Seen(NamedTuple):
    """What a board shows."""

    counts: tuple[int, int, int]
    """Of the points that all ranks pass, of its GPU, of what it does alone."""
    point: str
    """The last one that the main thread has passed; "" before the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What a rank does to itself at a point, to test that a job survives it."""

    action: Literal["kill", "hang"]
    point: str
    rank: int | None = None
    """None: any."""
    step: int | None = None
    """Only after so many steps; None: whenever."""
    times: int = 1
    """Over all lives of the job."""

    @property
    def name(self) -> str:
        """One that no other fault of the job has."""
        return f"{self.action}-{self.point}-{self.rank}-{self.step}"


@dataclass(slots=True)
class Pulse:
    """One rank's counts, on a board that another process may read. The default is watched by nobody."""

    board: Any = None
    """A writable buffer of BOARD_BYTES that is shared with the one who watches."""
    rank: int = 0
    faults: Sequence[Fault] = ()
    folder: Path = Path()
    """The job's; it remembers which faults have been."""
    step: int = 0
    """Steps done."""
    point: str = ""
    counts: list[int] = field(default_factory=lambda: [0, 0, 0])

    def beat(self, point: str) -> None:
        """Counts a point that the main thread passes."""
        self.point = point
        self.counts[0] += 1
        self._show()
        self.reach(point)

    def beat_alone(self, point: str) -> None:
        """Counts a point that the main thread of this rank passes and that of others does not."""
        self.point = point
        self.counts[2] += 1
        self._show()
        self.reach(point)

    def beat_of_device(self, blocks: int) -> None:
        """Counts blocks that the GPU has finished."""
        self.counts[1] += blocks
        self._show()

    def beat_of_writer(self) -> None:
        """Counts a stretch of bytes that the thread of the writer has written."""
        self.counts[2] += 1
        self._show()

    def reach(self, point: str) -> None:
        """Does what a fault says of this point, in whichever thread this is."""
        for fault in self.faults:
            mine = fault.rank in (None, self.rank) and fault.step in (None, self.step)
            if fault.point == point and mine and self._first(fault):
                _suffer(fault)

    def _show(self) -> None:
        if self.board is not None:
            _BOARD.pack_into(self.board, 0, *self.counts, self.point.encode()[:40])

    def _first(self, fault: Fault) -> bool:
        """Returns whether a fault still has a time to come, and takes one."""
        for time_of in range(fault.times):
            try:
                (self.folder / f".fault-{fault.name}-{time_of}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False


def read_board(board: Any, rank: int = 0) -> Seen:
    """Returns what the board of a rank shows; boards lie one after the other."""
    *counts, point = _BOARD.unpack_from(board, rank * BOARD_BYTES)
    first, second, third = counts
    return Seen((first, second, third), point.rstrip(b"\0").decode(errors="replace"))


def _suffer(fault: Fault) -> None:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(60)
