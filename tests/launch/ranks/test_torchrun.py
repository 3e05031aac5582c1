"""Jobs under torchrun: it starts dead ranks again, on one machine or several, and the job goes on."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from semvid.launch import env
from semvid.launch.control import lease
from semvid.runtime.config import Config, JobConfig
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job

MESH = "cfg=1,ring=1,ulysses=2"
PATH = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
RUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = pytest.mark.usefixtures("one_thread_a_rank")


@pytest.fixture
def make(tiny_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Job]:
    """Makes jobs of five steps with a checkpoint after each."""

    def made(name: str, **options: float) -> Job:
        config = tiny_config(steps=5, frames=9)
        job = JobConfig(checkpoint_steps=1, **options)
        return jobs.create(tmp_path / name, replace(config, model=replace(config.model, device="cpu"), job=job))

    return made


def worker(job: Job) -> list[str]:
    return ["-m", "semvid.launch.ranks.worker", "--job", str(job.folder), "--mesh", MESH, "--json"]


def start(words: list[str], fault: str = "") -> "subprocess.Popen[str]":
    surroundings = os.environ | PATH | {env.FAULT: fault}
    return subprocess.Popen(words, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sha256(job: Job) -> str:
    return str(json.loads((job.folder / "report.json").read_text())["frames_sha256"])


@pytest.mark.timeout(400)
def test_two_agents_start_dead_ranks_again_and_the_job_goes_on(make: Callable[..., Job]) -> None:
    whole, job = make("whole"), make("job")
    done = start([*RUN, "--standalone", "--nproc-per-node", "2", *worker(whole)])
    assert done.wait(timeout=120) == 0, done.communicate()
    fault = "kill:rank=1:point=exchange:step=2;kill:rank=0:point=decode"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{env.free_port()}", "--rdzv-id", "job"]
    two = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
    agents = [start([*RUN, *two, "--local-addr", "127.0.0.1", *meeting, *worker(job)], fault) for _ in range(2)]
    shown = [agent.communicate(timeout=240) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], shown
    assert len(list(job.folder.glob(".fault-*"))) == 2
    assert (job.state, sha256(job)) == ("done", sha256(whole))
    assert [e["step"] for e in job.events() if e["event"] == "resume"][-1] >= 3
    assert lease.owner(job.folder) is None


@pytest.mark.timeout(300)
def test_a_rank_that_hangs_ends_itself_under_torchrun(make: Callable[..., Job], tiny_model: Path) -> None:
    job = make("job", hang_seconds=5.0)
    one = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    begin = time.monotonic()
    process = start([*RUN, *one, *worker(job)], "hang:rank=1:point=cluster:step=3")
    shown = process.communicate(timeout=200)
    assert process.returncode == 0, shown
    # The collective's own time-out is ten minutes.
    assert time.monotonic() - begin < 150
    (stop,) = [e for e in job.events() if e["event"] == "stop" and e["state"] == "failed"]
    assert stop["reason"].startswith(
        "hangs, or waits for a rank that does: it has not moved for job.hang_seconds = 5 s"
    )
    assert job.state == "done"


@pytest.mark.timeout(200)
def test_the_torchrun_launcher_is_torchrun_on_this_machine(tiny_model: Path, tmp_path: Path) -> None:
    size = ["--height", "64", "--width", "96", "--frames", "5", "--steps", "3", "--guidance", "3", "--dtype", "fp32"]
    args = ["run", "a red ball", "--model", str(tiny_model), *size, "--device", "cpu", "--checkpoint-every", "1"]
    more = ["--gpus", "2", "--mesh", MESH, "--launcher", "torchrun", "--out", str(tmp_path / "job"), "--json"]
    process = start([sys.executable, "-m", "semvid.launch.cli", *args, *more], "kill:rank=1:point=step:step=2")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert (report["mesh"], report["gpus"], report["resumed_after_step"] > 0) == (MESH, 2, True)
