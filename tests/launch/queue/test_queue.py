"""The queue of a folder without a cluster: what starts when, and that one job's trouble is not another's."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semvid.launch.control import cancel, lease, request, status
from semvid.launch.control.request import NoRoomError, Request
from semvid.launch.queue import queue
from semvid.launch.queue.queue import Queue
from semvid.runtime.config import Config
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job


class Cluster:
    """Eight GPUs, where a job runs until it is told to end."""

    def __init__(self) -> None:
        self.running: dict[str, threading.Event] = {}
        self.began: list[str] = []
        self.raises: dict[str, BaseException] = {}

    def run(self, job: Job, asked: Request) -> int:
        prompt = job.config.video.prompt
        self.began.append(prompt)
        if prompt in self.raises:
            raise self.raises.pop(prompt)
        job.log("start", state="running")
        self.running[prompt] = threading.Event()
        assert self.running[prompt].wait(20)
        job.stop("done")
        return 0


@pytest.fixture
def make(tiny_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Job]:
    """Submits jobs by their prompts."""

    def made(prompt: str, gpus: int) -> Job:
        return queue.submit(tmp_path / "jobs", [tiny_config(prompt=prompt)], Request(gpus=gpus))[0]

    return made


def settle(runs: Queue, true: Callable[[], Any]) -> None:
    until = time.monotonic() + 20
    while not true():
        runs.step()
        assert time.monotonic() < until
        time.sleep(0.01)


def finish(runs: Queue, cluster: Cluster, prompt: str) -> None:
    settle(runs, lambda: prompt in cluster.running)
    cluster.running[prompt].set()
    settle(runs, lambda: all(job.state == "done" for job, _ in _active(runs) if job.config.video.prompt == prompt))


def _active(runs: Queue) -> list[tuple[Job, Request]]:
    return [(jobs.load(folder), asked) for folder, (asked, thread) in runs.active.items() if thread.is_alive()]


def test_as_many_run_at_once_as_there_are_gpus_in_the_order_in_which_they_came(
    make: Callable[..., Job], tmp_path: Path
) -> None:
    cluster = Cluster()
    runs = Queue(tmp_path / "jobs", lambda on_gpu: 8, cluster.run)
    for prompt, gpus in (("a", 4), ("b", 4), ("c", 2), ("d", 2)):
        make(prompt, gpus)
    settle(runs, lambda: len(cluster.running) == 2)
    runs.step()
    # The order in which they were started; threads may begin in another.
    assert [job.config.video.prompt for job, _ in _active(runs)] == ["a", "b"]
    assert sorted(cluster.began) == ["a", "b"]
    finish(runs, cluster, "a")
    settle(runs, lambda: len(cluster.running) == 4)
    assert sorted(cluster.began[2:]) == ["c", "d"]
    for prompt in "bcd":
        finish(runs, cluster, prompt)
    settle(runs, lambda: runs.idle)
    assert [job.state for job in status.found(tmp_path / "jobs")] == ["done"] * 4


def test_a_small_job_overtakes_a_large_one_that_does_not_fit_but_not_for_ever(
    make: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster()
    runs = Queue(tmp_path / "jobs", lambda on_gpu: 8, cluster.run)
    make("first", 6)
    settle(runs, lambda: "first" in cluster.running)
    make("large", 8)
    make("small", 1)
    settle(runs, lambda: "small" in cluster.running)
    monkeypatch.setattr(queue, "PATIENCE_S", 0.0)
    make("later", 1)
    for _ in range(5):
        runs.step()
    assert "later" not in cluster.began
    finish(runs, cluster, "first")
    finish(runs, cluster, "small")
    settle(runs, lambda: "large" in cluster.running)
    assert "later" not in cluster.began
    finish(runs, cluster, "large")
    finish(runs, cluster, "later")


def test_a_job_that_finds_no_room_again_and_again_holds_nobody_up(
    make: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "AGAIN_S", 0.2)
    cluster = Cluster()
    run = cluster.run

    def never(job: Job, asked: Request) -> int:
        if asked.nodes == 2:
            raise NoRoomError("--gpus is 8 on 2 hosts, but …")
        return run(job, asked)

    runs = Queue(tmp_path / "jobs", lambda on_gpu: 16, never)
    config = make("small", 1).config
    (apart,) = queue.submit(tmp_path / "jobs", [config], Request(gpus=8, nodes=2))
    # First in the queue.
    request.write(apart, Request(gpus=8, nodes=2, number=0))
    settle(runs, lambda: "small" in cluster.running)
    # It is tried again while it is wanted, and the table says why it waits.
    settle(runs, lambda: sum(e["event"] == "wait" for e in apart.events()) > 2)
    assert not runs.idle
    assert status.status(apart)["reason"] == "--gpus is 8 on 2 hosts, but …"
    finish(runs, cluster, "small")
    assert not runs.idle


def test_one_jobs_trouble_is_not_anothers(
    make: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "AGAIN_S", 0.2)
    cluster = Cluster()
    cluster.raises = {"defect": TypeError("no such thing"), "crowded": NoRoomError("--gpus is 4, but …")}
    runs = Queue(tmp_path / "jobs", lambda on_gpu: 8, cluster.run)
    defect, crowded, huge, good = (make(*a) for a in (("defect", 4), ("crowded", 4), ("huge", 16), ("good", 4)))
    settle(runs, lambda: {"good", "crowded"} <= set(cluster.running))
    # It was put back, and came again.
    assert cluster.began.count("crowded") == 2
    assert [e["reason"] for e in crowded.events() if e["event"] == "wait"] == ["--gpus is 4, but …"]
    for prompt in ("good", "crowded"):
        finish(runs, cluster, prompt)
    assert (defect.state, list(defect.events())[-1]["reason"]) == ("failed", "TypeError: no such thing")
    assert [job.state for job in (crowded, huge, good)] == ["done", "queued", "done"]
    # Said once, and shown.
    (why,) = [e["reason"] for e in huge.events() if e["event"] == "wait"]
    assert why == status.status(huge)["reason"] == "--gpus is 16, but the cluster has 8; it waits for more"


def test_a_new_queue_goes_on_with_jobs_that_nobody_runs_any_more(make: Callable[..., Job], tmp_path: Path) -> None:
    cluster = Cluster()
    orphan, tried, ended = make("orphan", 1), make("tried", 1), make("ended", 1)
    orphan.log("start", state="running")
    for _ in range(3):
        tried.log("start", state="running")
        tried.stop("recovering", step=0, rank=1, reason="gone")
    ended.stop("cancelled", step=0)
    assert status.state_of(orphan) == "abandoned"
    runs = Queue(tmp_path / "jobs", lambda on_gpu: 8, cluster.run)
    finish(runs, cluster, "orphan")
    settle(runs, lambda: runs.idle)
    assert [job.state for job in (orphan, tried, ended)] == ["done", "failed", "cancelled"]
    assert list(tried.events())[-1]["reason"] == "failed 3 times at step 0; last: gone"
    # Its supervisor's death counts as one of its own.
    death, end = [e for e in orphan.events() if e["event"] == "stop"]
    assert (death["reason"], end["state"]) == ("the process that supervised it is gone", "done")
    assert cluster.began == ["orphan"]


def test_a_job_that_waits_is_cancelled_without_gpus(make: Callable[..., Job], tmp_path: Path) -> None:
    cluster = Cluster()
    runs = Queue(tmp_path / "jobs", lambda on_gpu: 0, cluster.run)
    job = make("a", 1)
    cancel.ask(job.folder)
    settle(runs, lambda: job.state == "cancelled")
    assert cluster.began == []
    queue.submit_again(job, Request(gpus=2))
    assert (job.state, request.read(job.folder)) == ("queued", Request(gpus=2, number=2))


def test_what_is_no_request_is_no_job_of_the_queue(make: Callable[..., Job], tmp_path: Path) -> None:
    job = make("a", 1)
    (job.folder / request.NAME).write_text('{"gpus": 1, "extra": 2}')
    runs = Queue(tmp_path / "jobs", lambda on_gpu: 8, Cluster().run)
    assert runs.waiting() == []
    (tmp_path / "jobs" / "stray").mkdir()
    (tmp_path / "jobs" / "file").touch()
    assert [found.folder for found in status.found(tmp_path / "jobs")] == [job.folder]


def test_the_table_has_steps_time_left_density_and_gpus(make: Callable[..., Job], tmp_path: Path) -> None:
    job = make("a", 2)
    assert status.status(job)["seconds_left"] is None
    job.log("start", state="running", world_size=2)
    job.log("phase", phase="denoise")
    for step, seconds in ((1, 9.0), (2, 10.0)):
        job.log("step", step=step, steps=4, seconds=seconds, density=0.3, sparse_calls=2)
    assert status.status(job)["state"] == "abandoned"
    with lease.hold(job.folder):
        row = status.status(job)
    assert (row["step"], row["steps"], row["seconds_left"], row["density"], row["gpus"]) == (2, 4, 19.0, 0.3, 2)
    job.stop("failed", reason="gone")
    lines = status.table([status.status(job)])
    assert lines[1].split()[1:] == ["failed", "2/4", "0.300", "2"]
    assert lines[2].strip() == "gone"
