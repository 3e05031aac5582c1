"""The demo model at 81 × 480 × 832 on 2 to 8 GPUs, one rank killed mid-way, under Ray and under torchrun; timed.

Slow: `SEMVID_RESULTS=FILE pytest -m slow tests/launch/ranks/test_recovery_gpu.py` keeps the times as JSON.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from semvid.launch import machine
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job
from tests.launch.ranks.test_ray_cluster import processes, wait_until

STEPS, EVERY, KILL_AFTER = 50, 5, 23
# With two branches the mesh wants an even number.
GPUS = min(8, torch.cuda.device_count() // 2 * 2)
VIDEO = ["--height", "480", "--width", "832", "--frames", "81", "--steps", str(STEPS), "--seed", "0"]
PATH = {"PYTHONPATH": os.pathsep.join(sys.path)}

pytestmark = [pytest.mark.slow, pytest.mark.multigpu]


def start(folder: Path, launcher: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "semvid.launch.cli", "run", "a big grey bunny standing in a meadow", *VIDEO]
    where = ["--gpus", str(GPUS), "--launcher", launcher, "--out", str(folder)]
    more = [*where, "--checkpoint-every", str(EVERY), "--json"]
    return subprocess.Popen(
        [*words, *more], env=os.environ | PATH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def reached(job: Job, kind: str, step: int, after: int = 0) -> dict[str, Any] | None:
    """The first event of a kind at a step or later, from event number `after` on."""
    events = list(job.events())[after:]
    return next((e for e in events if e["event"] == kind and e.get("step", 0) >= step), None)


def disturbed(folder: Path, launcher: str) -> dict[str, Any]:
    """Runs the job, kills a rank after KILL_AFTER steps, and returns what happened when, in seconds."""
    process = start(folder, launcher)
    wait_until(lambda: (folder / "events.jsonl").exists() or process.poll() is not None, "the job has begun", 300)
    job = jobs.load(folder)
    wait_until(lambda: reached(job, "step", KILL_AFTER) or process.poll() is not None, "it is mid-way", 600)
    assert process.poll() is None, process.communicate()
    # Under torchrun the agent's command line has the folder too.
    ranks = [
        pid for pid in processes("semvid.launch.ranks.worker", str(folder)) if "distributed.run" not in words_of(pid)
    ]
    killed_at, known, at_step = time.time(), len(list(job.events())), job.step
    os.kill(ranks[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    events = list(job.events())[known:]
    join = next(e for e in events if e["event"] == "join")
    resume = next(e for e in events if e["event"] == "resume")
    # torchrun's agent is the one that sees it, and says nothing here until it has started the ranks again.
    stop = next((e for e in events[: events.index(join)] if e["event"] == "stop"), join)
    step = next(e for e in events[events.index(resume) :] if e["event"] == "step")
    return {
        "killed_after_step": at_step,
        "detected_s": round(stop["time"] - killed_at, 2),
        "ranks_alive_again_s": round(join["time"] - killed_at, 2),
        "resumed_s": round(resume["time"] - killed_at, 2),
        "first_step_again_s": round(step["time"] - killed_at, 2),
        "resumed_after_step": resume["step"],
        "steps_lost": at_step - resume["step"],
        "frames_sha256": json.loads(out)["frames_sha256"],
        "seconds_per_step": json.loads(out)["seconds_per_step"],
    }


def words_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


@pytest.mark.timeout(3000)
def test_a_job_of_several_gpus_recovers_from_a_killed_rank_under_ray_and_torchrun(tmp_path: Path) -> None:
    process = start(tmp_path / "whole", "local")
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    whole = json.loads(out)
    found: dict[str, Any] = {
        **machine.surroundings("cuda"),
        "model": "demo",
        "video": "81 x 480 x 832",
        "steps": STEPS,
        "checkpoint_every_steps": EVERY,
        "gpus": GPUS,
        "mesh": whole["mesh"],
        "undisturbed_frames_sha256": whole["frames_sha256"],
    }
    for launcher in ("ray", "torchrun"):
        found[launcher] = disturbed(tmp_path / launcher, launcher)
        assert found[launcher]["steps_lost"] <= 2 * EVERY
    checkpoints = [e for e in jobs.load(tmp_path / "ray").events() if e["event"] == "checkpoint"]
    found["checkpoint_bytes"] = checkpoints[-1]["bytes"]
    found["checkpoint_stall_seconds"] = sorted(e["stall_seconds"] for e in checkpoints)[len(checkpoints) // 2]
    if "SEMVID_RESULTS" in os.environ:
        Path(os.environ["SEMVID_RESULTS"]).write_text(json.dumps(found, indent=1) + "\n")
    assert {found[launcher]["frames_sha256"] for launcher in ("ray", "torchrun")} == {whole["frames_sha256"]}
