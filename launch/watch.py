"""Who sees that a rank hangs: its counts, read from outside, or by a thread of its own where nobody else watches."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from semvid.launch import env
from semvid.runtime.config import JobConfig
from semvid.runtime.job import Job
from semvid.runtime.pulse import Pulse, Seen

SLOW = ("", "start", "load")
"""Points after which a rank is still starting, meeting the others or loading the model."""


class Watch:
    """Remembers when the ranks' counts last moved, by this process's clock."""

    def __init__(self, options: JobConfig) -> None:
        self.options = options
        self.seen: Mapping[int, Seen] = {}
        self.moved_at = time.monotonic()

    def look(self, boards: Mapping[int, Seen]) -> tuple[int, str] | None:
        """Returns (rank, reason) if the job hangs, else None.

        It does if no rank at all has moved for the limit: one that hangs soon keeps all others waiting, while a rank
        that waits for one that works is no fault. Named is the one that has passed the fewest points, as ranks pass the
        same ones.

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
        rank = min(boards, key=lambda rank: boards[rank].counts[0])
        place = f"to {boards[rank].point!r}" if boards[rank].point else "not even to its start"
        return rank, f"hangs: no rank has moved for job.{name} = {limit:g} s; this one came least far, {place}"


@contextlib.contextmanager
def by_itself(pulse: Pulse, job: Job) -> Iterator[None]:
    """Ends this process inside if its own counts stand still: under torchrun nobody else reads them.

    A collective that waits lets a thread run, so the ranks that wait for one that hangs find it too.
    """
    over = threading.Event()
    watch = Watch(job.config.job)

    def follow() -> None:
        while not over.wait(1.0):
            counts = (pulse.counts[0], pulse.counts[1], pulse.counts[2])
            found = watch.look({pulse.rank: Seen(counts, pulse.point)})
            if found is not None:
                if job.stop("failed", step=job.step, rank=pulse.rank, reason=found[1]):
                    print(f"semvid: rank {pulse.rank}: {found[1]}", file=sys.stderr)
                env.end(1)

    threading.Thread(target=follow, daemon=True).start()
    try:
        yield
    finally:
        over.set()
