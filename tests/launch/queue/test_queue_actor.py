"""How long the actor of a queue stays. Real ones are in test_cluster."""

import threading
import time
from pathlib import Path

import pytest

from semvid.launch.control.request import Request
from semvid.launch.queue import queue_actor
from semvid.launch.queue.queue import Queue
from semvid.launch.queue.queue_actor import Supervisor
from semvid.runtime.jobs.job import Job

WAIT_S = 10.0


class Left:
    """Notes the folder with which a supervisor has ended."""

    def __init__(self) -> None:
        self.root: Path | None = None
        self.over = threading.Event()

    def __call__(self, root: Path) -> None:
        self.root = root
        self.over.set()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_actor, "LOOK_S", 0.01)


def total(on_gpu: bool) -> int:
    return 1


def run(job: Job, request: Request) -> int:
    return 0


def test_a_supervisor_with_nothing_to_do_leaves_and_says_so_to_who_pokes_it(tmp_path: Path) -> None:
    left = Left()
    made = Supervisor(str(tmp_path), total, run, left, idle_s=0.05)
    assert left.over.wait(WAIT_S)
    assert left.root == tmp_path
    assert not made.poke()


def test_a_supervisor_stays_while_it_is_poked(tmp_path: Path) -> None:
    left = Left()
    made = Supervisor(str(tmp_path), total, run, left, idle_s=2.0)
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        assert made.poke()
        time.sleep(0.05)
    assert not left.over.is_set()
    assert left.over.wait(WAIT_S)


def test_a_folder_that_cannot_be_read_now_ends_no_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left, looks = Left(), 0
    enough = threading.Event()

    def step(queue: Queue) -> None:
        nonlocal looks
        looks += 1
        if looks > 3:
            enough.set()
        raise OSError("no folder now")

    monkeypatch.setattr(Queue, "step", step)
    Supervisor(str(tmp_path), total, run, left, idle_s=1.0)
    assert enough.wait(WAIT_S)
    assert left.over.wait(WAIT_S)
    assert "no folder now" in capsys.readouterr().err
