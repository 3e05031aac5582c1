"""What a job's folder tells, whatever its clock and its disk have done."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semvid.launch.control import status
from semvid.runtime.config import Config, JobConfig
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.generate import generate
from semvid.runtime.jobs.job import Job


@pytest.fixture
def job(tiny_config: Callable[..., Config], tmp_path: Path) -> Job:
    """A new job."""
    return jobs.create(tmp_path / "one", tiny_config())


def test_a_clock_that_goes_backwards_changes_nothing(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    config = replace(tiny_config(), job=JobConfig(checkpoint_steps=1))
    whole = generate(jobs.create(tmp_path / "whole", config)).frames_sha256
    clock = iter(range(2_000_000_000, 0, -1_000_000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    job = jobs.create(tmp_path / "job", config)

    def stop(progress: Any) -> None:
        if progress.step == 3 and progress.seconds:
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        generate(job, stop)
    assert (job.state, job.step) == ("failed", 3)
    result = generate(job)
    assert (result.frames_sha256, result.resumed_after > 0) == (whole, True)
    times = [event["time"] for event in job.events()]
    assert times == sorted(times, reverse=True)
    row = status.status(job)
    assert (row["state"], row["step"], row["steps"]) == ("done", 4, 4)


def test_a_line_of_events_that_a_full_disk_cut_short_spoils_no_other(job: Job) -> None:
    job.log("start", state="running")
    with (job.folder / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "event": "st')
    job.log("step", step=1)
    job.stop("done")
    assert [e["event"] for e in job.events()] == ["start", "step", "stop"]
    assert (job.state, job.step) == ("done", 1)
