"""Who sees that a rank hangs: its counts, read from outside, or by a thread of its own where nobody else watches."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from semvid.launch import env
from semvid.runtime.config import JobConfig
from semvid.runtime.jobs.heartbeat import Pulse, Seen
from semvid.runtime.jobs.job import Job

SLOW = ("", "start", "load")
"""Points after which a rank is still starting, meeting the others or loading the model."""


class Watch:
    """Remembers when the ranks' counts last moved, by this process's clock."""

    def __init__(self, options: JobConfig) -> None:
        self.options = options
        self.seen: Mapping[int, Seen] = {}
        self.moved_at = time.monotonic()

    def look(self, boards: Mapping[int, Seen]) -> tuple[int | None, str] | None:
        """Returns (rank, reason) if the job hangs, else None; the rank is None where it can't be told from others.

        It does if no rank at all has moved for the limit: one that hangs soon keeps all others waiting, while a rank
        that waits for one that works is no fault. Named is the one that has come least far, as ranks pass the same
        points and enter the same collectives.

        Args:
            boards: what each rank that runs shows now.
        """
        limit = self.stands(boards)
        if limit is None:
            return None
        least = min(board.progress for board in boards.values())
        last = sorted(rank for rank, board in boards.items() if board.progress == least)
        place = _place(*(boards[rank].point for rank in last))
        if len(last) == 1:
            return last[0], f"hangs: no rank has moved for {limit}; this one came least far, {place}"
        ranks = ", ".join(map(str, last))
        return None, f"one of ranks {ranks} hangs: no rank has moved for {limit}; these came least far, {place}"

    def stands(self, boards: Mapping[int, Seen]) -> str | None:
        """Returns for how long, and by which option, no rank may stand still, if none has moved for longer.

        Args:
            boards: what each rank that runs shows now.
        """
        now = time.monotonic()
        if boards != self.seen:
            self.seen, self.moved_at = dict(boards), now
        starting = any(board.point in SLOW for board in boards.values())
        name = "start_seconds" if starting else "hang_seconds"
        limit: float = getattr(self.options, name)
        if not boards or now - self.moved_at <= limit:
            return None
        return f"job.{name} = {limit:g} s"


def _place(*points: str) -> str:
    names = dict.fromkeys(repr(point) for point in points if point)
    return f"to {' or '.join(names)}" if names else "not even to the start"


@contextlib.contextmanager
def by_itself(pulse: Pulse, job: Job) -> Iterator[None]:
    """Ends this process inside if its own counts stand still: under torchrun nobody else reads them.

    A collective that waits lets a thread run, so the ranks that wait for one that hangs find it too. None knows which
    of them it is, and the first to notice says so.
    """
    over = threading.Event()
    watch = Watch(job.config.job)

    def follow() -> None:
        while not over.wait(1.0):
            seen = pulse.seen()
            limit = watch.stands({pulse.rank: seen})
            if limit is not None:
                reason = (
                    f"hangs, or waits for a rank that does: it has not moved for {limit}, it came {_place(seen.point)}"
                )
                if job.stop("failed", step=job.step, rank=pulse.rank, reason=reason):
                    print(f"semvid: rank {pulse.rank}: {reason}", file=sys.stderr)
                env.end(1)

    threading.Thread(target=follow, daemon=True).start()
    try:
        yield
    finally:
        over.set()
