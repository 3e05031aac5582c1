import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from semvid.runtime.config import Config
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.generate import Progress, generate


def test_a_job_leaves_its_configuration_events_video_and_contact_sheet(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    job = jobs.create(tmp_path / "job", tiny_config())
    seen: list[Progress] = []
    result = generate(job, seen.append)
    assert [p.step for p in seen if p.seconds] == [1, 2, 3, 4]
    assert [p.phase for p in seen if not p.seconds] == ["load", "encode", "denoise", "decode", "write"]
    assert sorted(path.name for path in job.folder.iterdir()) == [
        "contact.png",
        "events.jsonl",
        "job.toml",
        "video.mp4",
    ]
    assert jobs.load(job.folder).config == job.config
    events = list(job.events())
    assert (events[0]["mesh"], events[0]["world_size"]) == ("cfg=1,ring=1,ulysses=1", 1)
    steps = [e for e in events if e["event"] == "step"]
    assert [(e["step"], e["steps"]) for e in steps] == [(i, 4) for i in (1, 2, 3, 4)]
    assert all(e["seconds"] > 0 and 0 < e["density"] <= 1 and e["sparse_calls"] == 4 for e in steps)
    assert job.state == "done"
    assert events[-1]["frames_sha256"] == result.frames_sha256
    assert result.frames.shape == (17, 64, 96, 3)
    assert (result.density.sparse_calls, result.density.dense_calls) == (16, 8)
    assert result.kernels == {"dense": "diffusers", "sparse": "reference"}


def test_the_same_seed_gives_the_same_video_and_another_does_not(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    def sha(name: str, seed: int) -> str:
        return generate(jobs.create(tmp_path / name, tiny_config(seed=seed, steps=2))).frames_sha256

    assert sha("a", 5) == sha("b", 5) != sha("c", 6)


def test_the_hash_is_of_the_decoded_frames(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    result = generate(jobs.create(tmp_path / "job", tiny_config(steps=1, frames=5)))
    whole = repr(result.frames.shape).encode() + np.ascontiguousarray(result.frames).tobytes()
    assert result.frames_sha256 == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt(), "cancelled"), (RuntimeError("gone"), "failed")])
def test_a_job_that_is_stopped_says_so_and_leaves_no_half_video(
    tiny_config: Callable[..., Config], tmp_path: Path, error: BaseException, state: str
) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 2 and progress.seconds:
            raise error

    job = jobs.create(tmp_path / "job", tiny_config())
    with pytest.raises(type(error)):
        generate(job, stop)
    assert job.state == state
    assert list(job.events())[-1]["step"] == 2
    assert sorted(path.name for path in job.folder.iterdir()) == ["events.jsonl", "job.toml"]


def test_a_job_of_a_size_the_model_cannot_make_is_refused_before_it_starts(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    job = jobs.create(tmp_path / "job", tiny_config(frames=32))
    with pytest.raises(ValueError, match="frames is 32; accepted: 4k [+] 1, nearest 29 and 33"):
        generate(job)
    assert job.state == "queued"


def test_a_prompt_longer_than_the_model_reads_is_refused(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "job", tiny_config(prompt="red ball " * 300))
    with pytest.raises(ValueError, match=r"prompt has \d+ tokens; accepted: 512 or fewer"):
        generate(job)
    assert job.state == "failed"


def test_a_folder_that_holds_a_job_is_refused(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    jobs.create(tmp_path / "job", tiny_config())
    with pytest.raises(ValueError, match="already holds a job"):
        jobs.create(tmp_path / "job", tiny_config())


def test_a_place_that_cannot_be_written_is_refused(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is no folder"):
        jobs.check_out(tmp_path / "file" / "job")
    with pytest.raises(ValueError, match="is no folder"):
        jobs.check_out(tmp_path / "file")
    with pytest.raises(ValueError, match="can't be written"):
        jobs.create(Path("/proc/semvid/job"), tiny_config())
    if os.geteuid():
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="can't be written"):
            jobs.check_out(tmp_path / "shut" / "job")


def test_of_what_stops_a_run_the_first_is_logged(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "job", tiny_config())
    job.log("step", step=3)
    job.log("start", state="running")
    assert job.step == 0
    job.log("step", step=2)
    assert job.stop("failed", step=job.step, rank=1)
    assert not job.stop("failed", step=job.step, rank=0)
    assert not job.stop("done")
    assert [(e["state"], e["step"], e["rank"]) for e in job.events() if e["event"] == "stop"] == [("failed", 2, 1)]
    job.log("start", state="running")
    assert job.stop("done")
    assert job.state == "done"


def test_the_beginnings_of_files_are_swept(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "job", tiny_config())
    (job.folder / ".video.part.mp4").touch()
    job.sweep()
    assert [path.name for path in job.folder.iterdir()] == ["job.toml"]


def test_a_last_line_cut_short_is_passed_over(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "job", tiny_config())
    job.log("start", state="running")
    with (job.folder / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "eve')
    assert [e["event"] for e in job.events()] == ["start"]
    assert job.state == "running"


def test_a_new_job_is_queued_and_default_folders_do_not_collide(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = jobs.create(jobs.default_folder("A red Ball!"), tiny_config())
    second = jobs.create(jobs.default_folder("A red Ball!"), tiny_config())
    assert first.state == "queued"
    assert first.folder != second.folder
    assert first.folder.parent == jobs.DEFAULT_ROOT
    assert "a-red-ball" in first.folder.name
    assert json.dumps(list(first.events())) == "[]"
