"""Lives of a job: how deaths are counted, and what is not tried again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from semvid.launch.ranks.attempts import WITHOUT_CHECKPOINT, last_stop, note_death, report_death, supervise
from semvid.runtime.config import Config
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job


@pytest.fixture
def job(tiny_config: Callable[..., Config], tmp_path: Path) -> Job:
    """A new job."""
    return jobs.create(tmp_path / "one", tiny_config())


def dies(job: Job, steps: list[int], *, checkpoints: bool = False) -> Callable[[], int]:
    """A life that dies at the next of `steps`; after the last it makes the video."""
    left = iter(steps)

    def live() -> int:
        step = next(left, None)
        job.log("start", state="running")
        if step is None:
            job.stop("done")
            return 0
        if checkpoints:
            job.log("checkpoint", step=step)
        job.stop("recovering", step=step, rank=1, reason="gone")
        return 1

    return live


def test_deaths_are_counted_by_step(job: Job) -> None:
    said: list[str] = []
    assert supervise(job, dies(job, [1, 2, 1, 2, 4]), said.append) == 0
    assert (job.state, len(said)) == ("done", 5)
    job.log("begin")
    assert supervise(job, dies(job, [1, 3, 1, 1]), said.append) == 1
    assert (job.state, said[-1]) == ("failed", "failed 3 times at step 1; last: gone")


def test_a_death_after_the_end_is_none(job: Job) -> None:
    def live() -> int:
        job.log("start", state="running")
        assert job.stop("done")
        assert not note_death(job, 0, "killed")
        return 9

    assert supervise(job, live) == 0
    assert (job.state, len(list(job.events()))) == ("done", 2)


def test_a_death_of_nobody_knows_which_rank_is_told_without_one(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.log("begin")
    report_death(job, None, "one of ranks 0, 1 hangs", "recovering")
    assert capsys.readouterr().err == "semvid: one of ranks 0, 1 hangs\n"
    stop = last_stop(job)
    assert (stop["state"], stop["rank"], stop["reason"]) == ("recovering", None, "one of ranks 0, 1 hangs")


def test_a_job_that_never_reaches_its_next_checkpoint_fails_too(job: Job) -> None:
    said: list[str] = []
    steps = list(range(1, 2 * WITHOUT_CHECKPOINT))
    assert supervise(job, dies(job, steps), said.append) == 1
    assert said[-1].startswith(f"failed {WITHOUT_CHECKPOINT} times without a new checkpoint; last, at step")
    job.log("begin")
    assert supervise(job, dies(job, steps, checkpoints=True), said.append) == 0


def test_out_of_memory_is_named_with_what_to_change_and_not_tried_again(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from semvid.launch.ranks import worker

    monkeypatch.setattr(worker, "SETTLE_S", 0.0)

    def fails() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    lives = 0

    def live() -> int:
        nonlocal lives
        lives += 1
        job.log("start", state="running")
        return worker.guarded("semvid", job, 1, fails, "recovering")

    assert supervise(job, live) == 1
    assert (lives, job.state) == (1, "failed")
    advice = "fewer --frames, a smaller --height and --width, or more --gpus need less"
    assert list(job.events())[-1]["reason"].endswith(f"Tried to allocate 2.00 GiB; {advice}")
    assert capsys.readouterr().err.splitlines()[-1] == f"semvid: rank 1: OutOfMemoryError: out of memory; {advice}"
