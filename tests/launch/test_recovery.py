"""Ranks that die or hang at every point: the job goes on by itself and makes the same video."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semvid.launch import cli, env, lease
from semvid.launch.supervise import WITHOUT_CHECKPOINT, supervise
from semvid.launch.watch import Watch
from semvid.runtime import job as jobs
from semvid.runtime.config import Config, JobConfig
from semvid.runtime.job import Job
from semvid.runtime.pulse import BOARD_BYTES, Fault, Pulse, Seen, read_board

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
def test_a_rank_that_hangs_is_found_by_its_counts(
    undisturbed: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(env.FAULT, "hang:rank=1:point=cluster:step=3")
    (tmp_path / "job.toml").write_text("[job]\nhang_seconds = 4.0\n")
    begin = time.monotonic()
    args = words(tiny_model, tmp_path / "job", "--launcher", "local", "--config", str(tmp_path / "job.toml"))
    assert cli.main(args) == 0
    # The collective's own time-out is ten minutes.
    assert time.monotonic() - begin < 200
    job = jobs.load(tmp_path / "job")
    (stop,) = [e for e in job.events() if e["event"] == "stop" and e["state"] == "recovering"]
    assert (stop["rank"], stop["step"]) == (1, 3)
    assert (
        stop["reason"] == "hangs: no rank has moved for job.hang_seconds = 4 s; this one came least far, to 'cluster'"
    )
    assert capfd.readouterr().err.count(stop["reason"]) == 1
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

    from semvid.launch import worker

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


FAULTS = [
    ("", ()),
    ("kill:point=start", (Fault(action="kill", point="start"),)),
    (
        "hang:rank=1:point=exchange:step=3;kill:point=write:times=2",
        (Fault(action="hang", point="exchange", rank=1, step=3), Fault(action="kill", point="write", times=2)),
    ),
]


@pytest.mark.parametrize(("text", "found"), FAULTS)
def test_faults_are_read(text: str, found: tuple[Fault, ...]) -> None:
    assert env.faults(text) == found


@pytest.mark.parametrize(
    "text", ["kill", "burn:point=start", "kill:point=lunch", "kill:point=start:rank=x", "kill:a=1"]
)
def test_a_fault_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="^SEMVID_FAULT is '.*'; accepted: kill or hang, then point="):
        env.faults(text)


def test_a_fault_comes_as_often_as_it_says_over_all_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(Exception):
        pass

    def kill(pid: int, number: int) -> None:
        raise KilledError

    monkeypatch.setattr(os, "kill", kill)
    fault = Fault(action="kill", point="write", rank=1, step=2, times=2)

    def life(rank: int, step: int, point: str) -> None:
        Pulse(None, rank, [fault], tmp_path, step).beat(point)

    life(0, 2, "write")
    life(1, 1, "write")
    life(1, 2, "decode")
    for _ in range(2):
        with pytest.raises(KilledError):
            life(1, 2, "write")
    life(1, 2, "write")


def test_a_board_shows_counts_and_the_last_point() -> None:
    board = bytearray(2 * BOARD_BYTES)
    pulse = Pulse(memoryview(board)[BOARD_BYTES:])
    assert read_board(board, 1) == Seen((0, 0, 0), "")
    pulse.beat("load")
    pulse.beat("block")
    pulse.beat_of_device(3)
    pulse.beat_of_writer()
    assert read_board(board, 1) == Seen((2, 3, 1), "block")
    assert read_board(board, 0) == Seen((0, 0, 0), "")


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


HOLDER = """
import sys, time
from pathlib import Path
from semvid.launch import lease
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


def test_a_clock_that_goes_backwards_changes_nothing(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    from semvid.launch import follow
    from semvid.runtime.generate import generate

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
    row = follow.status(job)
    assert (row["state"], row["step"], row["steps"]) == ("done", 4, 4)


def test_a_line_of_events_that_a_full_disk_cut_short_spoils_no_other(job: Job) -> None:
    job.log("start", state="running")
    with (job.folder / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "event": "st')
    job.log("step", step=1)
    job.stop("done")
    assert [e["event"] for e in job.events()] == ["start", "step", "stop"]
    assert (job.state, job.step) == ("done", 1)


@pytest.mark.timeout(180)
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
