"""One process at a time runs a job, also across hosts."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from semvid.launch import cli
from semvid.launch.commands import queue
from semvid.launch.control import lease
from semvid.launch.control.request import Request
from semvid.runtime.config import Config
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job


@pytest.fixture
def job(tiny_config: Callable[..., Config], tmp_path: Path) -> Job:
    """A new job."""
    return jobs.create(tmp_path / "one", tiny_config())


HOLDER = """
import sys, time
from pathlib import Path
from semvid.launch.control import lease
with lease.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(job: Job) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the job's lease."""
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    args = [sys.executable, "-c", HOLDER, str(job.folder)]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=os.environ | path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_one_process_at_a_time_runs_a_job(
    job: Job, holder: "subprocess.Popen[str]", capsys: pytest.CaptureFixture[str]
) -> None:
    found = lease.owner(job.folder)
    assert found is not None
    assert found.pid == holder.pid
    assert cli.main(["resume", str(job.folder)]) == 2
    line = f"is being run by process {holder.pid} on {found.host}; accepted: a job that nobody runs, or wait for it"
    assert line in capsys.readouterr().err
    assert list(job.events()) == []
    holder.kill()
    holder.wait()
    # A process of this machine that is gone holds nothing.
    assert lease.owner(job.folder) is None
    with lease.hold(job.folder):
        assert lease.owner(job.folder) is not None
    assert not (job.folder / lease.NAME).exists()


def foreign(job: Job, beat: int) -> None:
    """Leaves the lease of a process of another machine."""
    own = lease.Owner("abc", "elsewhere", "another boot", 7, 1, beat)
    (job.folder / lease.NAME).write_text(lease._text(own))


def test_a_lease_of_another_host_is_stale_once_its_count_stands_still(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 0.6)
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    foreign(job, 5)
    # Years ahead or back: no clock of another machine is read.
    os.utime(job.folder / lease.NAME, (4e9, 4e9))
    begin = time.monotonic()
    with lease.hold(job.folder):
        assert time.monotonic() - begin >= 0.6
        found = lease.owner(job.folder)
        assert found is not None
        assert found.pid == os.getpid()
        time.sleep(0.7)
        later = lease.owner(job.folder)
        assert later is not None
        assert later.beat > found.beat


def test_a_lease_of_another_host_that_beats_is_held(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    foreign(job, 5)
    beats = iter(range(6, 1000))
    sleep = time.sleep

    def beating(seconds: float) -> None:
        foreign(job, next(beats))
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", beating)
    with pytest.raises(lease.HeldError, match="is being run by process 7 on elsewhere"), lease.hold(job.folder):
        pass


def test_a_cluster_is_not_asked_for_a_job_that_somebody_runs(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 0.2)
    job.log("start", state="running")
    before = list(job.events())
    with lease.hold(job.folder), pytest.raises(lease.HeldError, match="is being run by process"):
        queue.run(job, Request(gpus=1), "127.0.0.1:9", as_json=False)
    assert list(job.events()) == before
    assert lease.check_free(job.folder) is None
    # Whoever ran it on another host may have died with it: its count stands still.
    foreign(job, 5)
    found = lease.check_free(job.folder)
    assert found is not None
    assert (found.pid, found.host) == (7, "elsewhere")


def test_who_loses_a_lease_is_told(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    told: list[bool] = []
    with lease.hold(job.folder, lambda: told.append(True)):
        foreign(job, 1)
        until = time.monotonic() + 5
        while not told and time.monotonic() < until:
            time.sleep(0.02)
    assert told == [True]
    # It is not this one's to remove.
    assert (job.folder / lease.NAME).exists()
