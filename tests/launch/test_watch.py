"""When a job counts as one that hangs."""

import time

import pytest

from semvid.launch.watch import Watch
from semvid.runtime.config import JobConfig
from semvid.runtime.pulse import Seen


def test_a_job_hangs_if_no_rank_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = Watch(JobConfig(hang_seconds=10, start_seconds=50))

    def at(when: float, *counts: int, point: str = "block") -> tuple[int, str] | None:
        nonlocal now
        now = 100 + when
        return watch.look({rank: Seen((count, 0, 0), point) for rank, count in enumerate(counts)})

    assert at(45, 0, 0, point="load") is None
    assert at(46, 1, 1) is None
    # A rank that waits for one that works.
    for when in range(50, 100, 5):
        assert at(when, 1, when) is None
    assert at(105, 1, 95) is None
    found = at(106, 1, 95)
    assert found == (0, "hangs: no rank has moved for job.hang_seconds = 10 s; this one came least far, to 'block'")
    # One that has ended is not asked: rank 0 alone decodes.
    assert watch.look({1: Seen((95, 0, 0), "decode")}) is None


def test_starting_and_loading_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = Watch(JobConfig(hang_seconds=10, start_seconds=50))
    boards = {0: Seen((5, 0, 0), "load"), 1: Seen((0, 0, 0), "")}
    assert watch.look(boards) is None
    now = 50.0
    assert watch.look(boards) is None
    now = 50.1
    reason = "hangs: no rank has moved for job.start_seconds = 50 s; this one came least far, not even to its start"
    assert watch.look(boards) == (1, reason)
