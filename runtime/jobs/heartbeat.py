"""What a rank tells those who watch it: counts that move only while its work moves. And, for tests, faults. No torch.

The main thread counts each named point that it passes: a block of a model, a phase of an attention call, a frame that
is written; and each collective when it enters it. Stuck in one it counts nothing. All ranks pass the same points and
enter the same collectives, so one that waits has counted the collective to which the one that hangs has not come: that
one has the lowest count. A writer of checkpoints may hang in its own thread, while all main threads wait alike; so the
parts that it has written are counted too. Two more counts are not compared: blocks that a GPU has finished, and what
this rank does for all or beside the main thread, which are the blocks of encoders and of the VAE and the bytes of
checkpoints.
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
"""What one rank writes: four counts and the name of a point."""
_BOARD = struct.Struct("<Q32sQQQ")
# What the main thread writes at the front; each count of other threads has its own place behind, so that none shows
# again what another has counted further.
_FRONT, _COUNT = struct.Struct("<Q32s"), struct.Struct("<Q")
_MAIN, _DEVICE, _ALONE, _PARTS = range(4)
POINTS = ("start", "load", "encode", "cluster", "all-reduce", "exchange", "step", "checkpoint", "decode", "write")
"""Those that a fault may name."""


class Seen(NamedTuple):
    """What a board shows."""

    counts: tuple[int, int, int, int]
    """Of the points and collectives of all ranks, of its GPU, of what it does alone, of parts of checkpoints."""
    point: str
    """The last one that the main thread has passed; "" before the first."""

    @property
    def progress(self) -> tuple[int, int]:
        """How far the rank has come in what all ranks do: of two, the lower one keeps the other waiting."""
        return self.counts[_MAIN], self.counts[_PARTS]


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
    counts: list[int] = field(default_factory=lambda: [0, 0, 0, 0])

    def beat(self, point: str) -> None:
        """Counts a point that the main thread passes."""
        self.point = point
        self.counts[_MAIN] += 1
        self._show()
        self.reach(point)

    def beat_of_meeting(self) -> None:
        """Counts a collective that the main thread enters; the point remains the last that it has passed."""
        self.counts[_MAIN] += 1
        self._show()

    def beat_alone(self, point: str) -> None:
        """Counts a point that the main thread of this rank passes and that of others does not."""
        self.point = point
        self._show()
        self._count(_ALONE)
        self.reach(point)

    def beat_of_device(self, blocks: int) -> None:
        """Counts blocks that the GPU has finished."""
        self._count(_DEVICE, blocks)

    def beat_of_writer(self) -> None:
        """Counts a stretch of bytes that the thread of the writer has written."""
        self._count(_ALONE)

    def beat_of_part(self) -> None:
        """Counts a part of a checkpoint that the thread of the writer has written whole."""
        self._count(_PARTS)

    def reach(self, point: str) -> None:
        """Does what a fault says of this point, in whichever thread this is."""
        for fault in self.faults:
            mine = fault.rank in (None, self.rank) and fault.step in (None, self.step)
            if fault.point == point and mine and self._first(fault):
                _suffer(fault)

    def seen(self) -> Seen:
        """Returns what the board shows, if there is one."""
        main, device, alone, parts = self.counts
        return Seen((main, device, alone, parts), self.point)

    def _show(self) -> None:
        if self.board is not None:
            _FRONT.pack_into(self.board, 0, self.counts[_MAIN], self.point.encode())

    def _count(self, which: int, more: int = 1) -> None:
        self.counts[which] += more
        if self.board is not None:
            _COUNT.pack_into(self.board, _FRONT.size + (which - 1) * _COUNT.size, self.counts[which])

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
    main, point, device, alone, parts = _BOARD.unpack_from(board, rank * BOARD_BYTES)
    return Seen((main, device, alone, parts), point.rstrip(b"\0").decode(errors="replace"))


def _suffer(fault: Fault) -> None:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(60)
