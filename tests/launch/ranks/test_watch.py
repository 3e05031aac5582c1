"""When a job counts as one that hangs."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from semvid.launch import env
from semvid.launch.ranks.watch import Watch, by_itself
from semvid.runtime.config import JobConfig
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.heartbeat import Pulse, Seen
from semvid.runtime.settings import resolve


def test_a_job_hangs_if_no_rank_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = Watch(JobConfig(hang_seconds=10, start_seconds=50))

    def at(when: float, *counts: int, point: str = "block") -> tuple[int | None, str] | None:
        nonlocal now
        now = 100 + when
        return watch.look({rank: Seen((count, 0, 0, 0), point) for rank, count in enumerate(counts)})

    assert at(45, 0, 0, point="load") is None
    assert at(46, 1, 1) is None
    # A rank that waits for one that works.
    for when in range(50, 100, 5):
        assert at(when, 1, when) is None
    assert at(105, 1, 95) is None
    found = at(106, 1, 95)
    assert found == (0, "hangs: no rank has moved for job.hang_seconds = 10 s; this one came least far, to 'block'")
    # One that has ended is not asked: rank 0 alone decodes.
    assert watch.look({1: Seen((95, 0, 0, 0), "decode")}) is None


def test_starting_and_loading_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = Watch(JobConfig(hang_seconds=10, start_seconds=50))
    boards = {0: Seen((5, 0, 0, 0), "load"), 1: Seen((0, 0, 0, 0), "")}
    assert watch.look(boards) is None
    now = 50.0
    assert watch.look(boards) is None
    now = 50.1
    reason = "hangs: no rank has moved for job.start_seconds = 50 s; this one came least far, not even to the start"
    assert watch.look(boards) == (1, reason)


def named(*told: Callable[[Pulse], None]) -> tuple[int | None, str] | None:
    """Returns what is said of ranks that stand still after what each has counted."""
    pulses = [Pulse(rank=rank) for rank in range(len(told))]
    for pulse, tell in zip(pulses, told, strict=True):
        pulse.beat("cluster")
        tell(pulse)
    watch = Watch(JobConfig(hang_seconds=0, start_seconds=0))
    watch.moved_at, watch.seen = 0.0, {pulse.rank: pulse.seen() for pulse in pulses}
    return watch.look(watch.seen)


def wait(pulse: Pulse) -> None:
    pulse.beat_of_meeting()


def wait_twice(pulse: Pulse) -> None:
    wait(pulse)
    pulse.beat("map")
    wait(pulse)


def hang(pulse: Pulse) -> None:
    pass


def busy(pulse: Pulse) -> None:
    pulse.beat_of_device(7)
    pulse.beat_of_writer()


def write(pulse: Pulse) -> None:
    pulse.beat_of_part()


def wait_after_writing(pulse: Pulse) -> None:
    write(pulse)
    wait(pulse)


STILL = "no rank has moved for job.hang_seconds = 0 s"


@pytest.mark.parametrize(
    ("told", "rank"),
    [
        # The same point is the last that all have passed.
        ((wait, hang), 1),
        ((hang, wait), 0),
        # Ranks 0 and 1 wait for each other only after a meeting to which rank 3 keeps rank 2.
        ((wait_twice, wait_twice, wait, hang), 3),
        # What a rank does alone says nothing.
        ((busy, wait), 0),
        ((wait, busy), 1),
        # All wait for a checkpoint: the one whose writer has not written its part.
        ((write, hang), 1),
        ((hang, write), 0),
        # A main thread that hangs before it has a checkpoint written keeps those that wait elsewhere.
        ((wait_after_writing, hang), 1),
    ],
)
def test_the_rank_is_named_that_has_not_come_where_the_others_wait(
    told: tuple[Callable[[Pulse], None], ...], rank: int
) -> None:
    assert named(*told) == (rank, f"hangs: {STILL}; this one came least far, to 'cluster'")


def test_ranks_that_came_equally_far_are_named_together() -> None:
    said = f"hangs: {STILL}; these came least far, to 'cluster'"
    assert named(hang, hang) == (None, f"one of ranks 0, 1 {said}")
    assert named(wait, hang, wait_twice, hang) == (None, f"one of ranks 1, 3 {said}")
    assert named(busy, hang) == (None, f"one of ranks 0, 1 {said}")
    found = named(hang, lambda pulse: pulse.beat_alone("encode"))
    assert found == (None, f"one of ranks 0, 1 {said} or 'encode'")


def test_a_rank_that_watches_itself_does_not_say_that_it_is_the_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()

    monkeypatch.setattr(env, "end", lambda code: ended.set())
    config = resolve(None, {"job": {"hang_seconds": 0.5}, "video": {"prompt": "x"}}, preset="svg2")
    job = jobs.create(tmp_path / "job", config)
    pulse = Pulse(rank=1)
    pulse.beat("cluster")
    with by_itself(pulse, job):
        assert ended.wait(10)
    stop = list(job.events())[-1]
    reason = "hangs, or waits for a rank that does: it has not moved for job.hang_seconds = 0.5 s, it came to 'cluster'"
    assert (stop["state"], stop["rank"], stop["reason"]) == ("failed", 1, reason)
    assert capsys.readouterr().err == f"semvid: rank 1: {reason}\n"
