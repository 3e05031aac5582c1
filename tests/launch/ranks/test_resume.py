"""Jobs that are killed or told to stop, and `semvid resume`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semvid.launch import cli
from semvid.runtime.config import Config, JobConfig
from semvid.runtime.jobs import checkpoint_files
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.generate import generate
from semvid.runtime.jobs.job import Job

REUSED = {"refresh_every": 3, "p": 0.6, "query_clusters": 6, "key_clusters": 9, "first_iterations": 5}
PATH = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
# Each job runs in a process of its own, which ends itself by SIGKILL: after a step, or after so many bytes of a write.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from semvid.runtime.jobs import job
from semvid.runtime.jobs import checkpoint_files
from semvid.runtime.jobs.generate import generate

torch.set_num_threads(1)
checkpoint_files.BLOCK_BYTES = 1000

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def run(folder, after, room):
    write = os.write
    def limited(handle, block):
        nonlocal room
        if room < len(block):
            write(handle, block[:room])
            kill()
        room -= len(block)
        return write(handle, block)
    if room:
        os.write = limited
    def watch(progress):
        if progress.step == after and progress.seconds:
            kill()
    generate(job.load(Path(folder)), watch)

for words in sys.argv[1:]:
    folder, after, room = words.split(":")
    child = os.fork()
    if child == 0:
        run(folder, int(after), int(room))
        os._exit(3)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, words
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tiny_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Job]:
    """Makes jobs of six steps, a checkpoint after each unless told otherwise."""

    def made(name: str, preset: str = "svg2", attention: dict[str, Any] | None = None, every: int = 1) -> Job:
        config = tiny_config(preset, attention or {}, steps=6, frames=9)
        return jobs.create(tmp_path / name, replace(config, job=JobConfig(checkpoint_steps=every)))

    return made


def program(*args: str) -> "subprocess.Popen[str]":
    words = [sys.executable, *args]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | PATH)


@pytest.mark.timeout(300)
def test_a_killed_job_makes_the_same_video(make: Callable[..., Job], capsys: pytest.CaptureFixture[str]) -> None:
    kinds: dict[str, tuple[Any, ...]] = {"dense": ("dense",), "refreshed": ("svg2",), "reused": ("svg2", REUSED)}
    whole = {kind: generate(make(f"{kind}-whole", *args, every=0)).frames_sha256 for kind, args in kinds.items()}
    # After a step; in the tensors of the first checkpoint; in those of a later one.
    ends = {"step": (4, 0), "first": (0, 5_000), "later": (0, 400_000)}
    killed = {(kind, end): make(f"{kind}-{end}", *args) for kind, args in kinds.items() for end in ends}
    words = [f"{job.folder}:{ends[end][0]}:{ends[end][1]}" for (_, end), job in killed.items()]
    process = program("-c", KILLED, *words)
    assert process.wait(timeout=240) == 0, process.communicate()
    resumed = []
    for (kind, end), job in killed.items():
        assert job.state == "running"
        capsys.readouterr()
        assert cli.main(["resume", str(job.folder), "--json"]) == 0
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert report["frames_sha256"] == whole[kind], (kind, end)
        assert report["steps"] == 6
        after = report["resumed_after_step"]
        resumed.append((end, after))
        line = f"goes on after step {after} of 6" if after else "there is no checkpoint; it begins at the first step"
        assert f"semvid: {line}\n" in err
        assert not [path for path in job.checkpoints.iterdir() if path.name.startswith(".")]
    # The checkpoint of the step before was whole in any case.
    assert {after for end, after in resumed if end == "step"} <= {2, 3, 4}
    assert {after for end, after in resumed if end == "first"} == {0}
    assert all(after > 0 for end, after in resumed if end == "later")


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, path
        time.sleep(0.05)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("gpus", ["1", "2"])
def test_a_job_that_gets_sigterm_ends_with_a_checkpoint_and_goes_on_elsewhere(
    gpus: str, make: Callable[..., Job], capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    whole = make("whole", every=0)
    size = ["--height", "64", "--width", "96", "--frames", "9", "--steps", "60", "--guidance", "3"]
    model = ["--model", str(tiny_model), "--dtype", "fp32", "--device", "cpu"]
    out = ["--out", str(tmp_path / "job"), "--gpus", gpus, "--launcher", "local", "--checkpoint-every", "50"]
    process = program("-m", "semvid.launch.cli", "run", "a red ball", *size, *model, *out)
    events = tmp_path / "job" / "events.jsonl"
    wait_for(events, process)
    while '"step"' not in events.read_text():
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    shown = process.communicate(timeout=60)[1]
    job = jobs.load(tmp_path / "job")
    line = f"semvid: told to stop; it goes on after step {job.step} with: semvid resume {job.folder}"
    assert (process.returncode, job.state, shown.count(line)) == (143, "interrupted", 1), shown
    assert 0 < job.step < 60
    assert checkpoint_files.steps(job.checkpoints) == [job.step]
    assert "Traceback" not in shown
    # On one process, whatever it began on.
    assert cli.main(["resume", str(job.folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    video = replace(whole.config.video, steps=60)
    again = jobs.create(tmp_path / "again", replace(whole.config, video=video))
    assert report["frames_sha256"] == generate(again).frames_sha256
    assert report["gpus"] == 1


@pytest.mark.timeout(180)
def test_a_job_goes_on_with_more_processes(
    make: Callable[..., Job], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = make("whole", "dense", every=0)
    config = replace(make("like", "dense", every=2).config, model=replace(whole.config.model, device="cpu"))
    job = jobs.create(tmp_path / "job", config)
    process = program("-c", KILLED, f"{job.folder}:5:0")
    assert process.wait(timeout=120) == 0, process.communicate()
    assert cli.main(["resume", str(job.folder), "--gpus", "2", "--mesh", "ring=3"]) == 2
    assert "--mesh is cfg=1,ring=3,ulysses=1, which is 1 x 3 x 1 = 3 ranks, but there are 2" in capfd.readouterr().err
    assert cli.main(["resume", str(job.folder), "--gpus", "2", "--launcher", "local", "--json"]) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert (report["mesh"], report["resumed_after_step"]) == ("cfg=2,ring=1,ulysses=1", 4)
    assert err.count("semvid: goes on after step 4 of 6") == 1
    assert report["frames_sha256"] == generate(whole).frames_sha256


def test_what_cannot_go_on_is_refused_in_one_line(
    make: Callable[..., Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = make("done", "dense")
    done.log("start", state="running")
    assert done.stop("done")
    for folder, message in (
        (done.folder, "holds a job that is done; its video is"),
        (tmp_path, "job is '.*job.toml', which can't be read: no such file"),
    ):
        assert cli.main(["resume", str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert re.search(message, err), err
    with pytest.raises(SystemExit):
        cli.main(["resume"])
    assert cli.main(["run", "a red ball", "--checkpoint-every", "-1", "--out", str(tmp_path / "new")]) == 2
    assert "job.checkpoint_steps is -1; accepted: 0 or more" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_said_in_one_line(
    make: Callable[..., Job], capsys: pytest.CaptureFixture[str]
) -> None:
    job = make("job", "dense")
    job.folder.chmod(0o500)
    try:
        assert cli.main(["resume", str(job.folder)]) == 1
    finally:
        job.folder.chmod(0o700)
    assert capsys.readouterr().err.splitlines()[-1].startswith("semvid: Permission denied: ")
