"""Ranks that die or hang at every point: the job goes on by itself and makes the same video."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from semvid.launch import cli, env
from semvid.launch.control import lease
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job

MESH = "cfg=1,ring=1,ulysses=2"
SIZE = ["--height", "64", "--width", "96", "--frames", "9", "--steps", "6", "--guidance", "3"]
# Each kills another life of one job: after the death at one point the job goes on and comes as far as the next.
EVERY_POINT = ";".join(
    (
        "kill:rank=1:point=start",
        "kill:rank=0:point=cluster:step=2",
        "kill:rank=1:point=exchange:step=3",
        "kill:rank=0:point=checkpoint:step=5",
        "kill:rank=0:point=decode",
        "kill:rank=0:point=write",
    )
)


def words(model: Path, folder: Path, *more: str, every: int = 1) -> list[str]:
    """`semvid run` of six steps on two processes with a checkpoint after each."""
    size = [*SIZE, "--model", str(model), "--dtype", "fp32", "--device", "cpu", "--checkpoint-every", str(every)]
    return ["run", "a red ball", *size, "--gpus", "2", "--mesh", MESH, "--out", str(folder), "--json", *more]


pytestmark = pytest.mark.usefixtures("one_thread_a_rank")


@pytest.fixture(scope="module")
def undisturbed(one_thread_a_rank: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the video of `words` where nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole") / "job"
    assert cli.main(words(tiny_model, folder, "--launcher", "local")) == 0
    return str(json.loads((folder / "report.json").read_text())["frames_sha256"])


def deaths(job: Job) -> list[tuple[int, int | None]]:
    """The step and the rank of each death."""
    return [(e["step"], e["rank"]) for e in job.events() if e["event"] == "stop" and e["state"] == "recovering"]


@pytest.mark.timeout(400)
def test_a_job_whose_ranks_are_killed_at_every_point_makes_the_same_video(
    undisturbed: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.FAULT, EVERY_POINT)
    assert cli.main(words(tiny_model, tmp_path / "job", "--launcher", "local")) == 0
    job = jobs.load(tmp_path / "job")
    assert deaths(job) == [(0, 1), (2, 0), (3, 1), (5, 0), (6, 0), (6, 0)]
    assert json.loads((job.folder / "report.json").read_text())["frames_sha256"] == undisturbed
    # Each went on after a checkpoint of at most two steps before: the one under way at the death may be lost.
    resumed = [e["step"] for e in job.events() if e["event"] == "resume"]
    assert len(resumed) == 5
    assert all(0 <= step - after <= 2 for (step, _), after in zip(deaths(job)[1:], resumed, strict=True))
    assert [path.name for path in job.folder.iterdir() if ".part" in path.name or "lease" in path.name] == []


@pytest.mark.timeout(300)
def test_a_rank_that_hangs_is_found_and_named_by_its_counts(
    undisturbed: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Rank 0 then waits behind the same point, in the same phase, and for a part of a checkpoint that does not come.
    points = {"encode": 0, "cluster": 2, "all-reduce": 3, "checkpoint": 5}
    faults = [f"hang:rank=1:point={point}:step={step}" for point, step in points.items()]
    monkeypatch.setenv(env.FAULT, ";".join(faults))
    (tmp_path / "job.toml").write_text("[job]\nhang_seconds = 4.0\n")
    begin = time.monotonic()
    args = words(tiny_model, tmp_path / "job", "--launcher", "local", "--config", str(tmp_path / "job.toml"))
    assert cli.main(args) == 0
    # The collective's own time-out is ten minutes.
    assert time.monotonic() - begin < 280
    job = jobs.load(tmp_path / "job")
    stops = [e for e in job.events() if e["event"] == "stop" and e["state"] == "recovering"]
    assert [stop["rank"] for stop in stops] == [1, 1, 1, 1]
    assert [stop["step"] for stop in stops][:3] == [0, 2, 3]
    reason = "hangs: no rank has moved for job.hang_seconds = 4 s; this one came least far, to"
    assert [stop["reason"] for stop in stops[:3]] == [f"{reason} '{point}'" for point in list(points)[:3]]
    # The main thread goes on beside the writer, to where it waits for it.
    assert stops[3]["reason"].startswith(reason)
    assert capfd.readouterr().err.count(f"semvid: rank 1: {reason}") == 4
    assert json.loads((job.folder / "report.json").read_text())["frames_sha256"] == undisturbed


@pytest.mark.timeout(300)
def test_a_job_that_dies_at_one_step_again_and_again_has_failed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(env.FAULT, "kill:rank=1:point=start:times=9")
    (tmp_path / "job.toml").write_text("[job]\nfailures = 2\n")
    args = words(tiny_model, tmp_path / "job", "--launcher", "local", "--config", str(tmp_path / "job.toml"))
    assert cli.main(args) == 1
    job = jobs.load(tmp_path / "job")
    reason = "failed 2 times at step 0; last: killed by SIGKILL, as the system does where memory runs out"
    stop = list(job.events())[-1]
    assert (stop["state"], stop["rank"], stop["reason"]) == ("failed", 1, reason)
    assert capfd.readouterr().err.splitlines()[-1] == f"semvid: {reason}"


@pytest.mark.timeout(420)
def test_a_full_disk_ends_the_job_with_its_cause_and_it_goes_on_later(
    undisturbed: str, tiny_model: Path, tmp_path: Path
) -> None:
    # A limit on the size of a file stands in for a full disk: the system refuses the write in the same way.
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    limited += "from semvid.launch import cli; sys.exit(cli.main(sys.argv[1:]))"
    (tmp_path / "job.toml").write_text("[job]\nfailures = 1\n")
    args = words(tiny_model, tmp_path / "job", "--launcher", "local", "--config", str(tmp_path / "job.toml"))
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", limited, *args], capture_output=True, text=True, check=False, env=os.environ | path
    )
    job = jobs.load(tmp_path / "job")
    assert (done.returncode, job.state) == (1, "failed"), done.stderr
    assert "File too large" in list(job.events())[-1]["reason"]
    assert "File too large" in done.stderr
    args = ["resume", str(job.folder), "--gpus", "2", "--mesh", MESH, "--launcher", "local", "--json"]
    assert cli.main(args) == 0
    assert json.loads((job.folder / "report.json").read_text())["frames_sha256"] == undisturbed


@pytest.mark.timeout(300)
def test_a_driver_that_is_killed_takes_its_ranks_along_and_one_command_goes_on(
    undisturbed: str, tiny_model: Path, tmp_path: Path
) -> None:
    path = {"PYTHONPATH": os.pathsep.join(sys.path), env.FAULT: "hang:rank=1:point=cluster:step=4"}
    args = [sys.executable, "-m", "semvid.launch.cli", *words(tiny_model, tmp_path / "job", "--launcher", "local")]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | path)
    until = time.monotonic() + 120
    while not list((tmp_path / "job").glob(".fault-*")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    # The ranks have this pipe too, which ends when the last of them is gone.
    assert process.communicate(timeout=30)[0] == b""
    job = jobs.load(tmp_path / "job")
    assert job.state == "running"
    assert lease.owner(job.folder) is None
    args = ["resume", str(job.folder), "--gpus", "2", "--mesh", MESH, "--launcher", "local", "--json"]
    assert cli.main(args) == 0
    report = json.loads((job.folder / "report.json").read_text())
    assert (report["frames_sha256"], report["resumed_after_step"] >= 2) == (undisturbed, True)
