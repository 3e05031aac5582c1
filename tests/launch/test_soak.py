"""Every fault under every launcher, and twenty queued jobs with random kills. Slow: run with `pytest -m slow`.

With SEMVID_RESULTS=FILE what was seen is kept there as JSON.
"""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from semvid.launch import cli, cluster, env, follow, queue
from semvid.launch.request import Request
from semvid.launch.supervise import supervise
from semvid.runtime import job as jobs
from semvid.runtime.config import resolve
from semvid.runtime.job import Job
from tests.launch.test_cluster import MESH, head, left_behind, options, processes, sha256, shared  # noqa: F401

POINTS = ("start", "load", "encode", "cluster", "all-reduce", "exchange", "step", "checkpoint", "decode", "write")
# Rank 0 alone decodes and writes.
CASES = [
    (action, point, rank)
    for action in ("kill", "hang")
    for point in POINTS
    for rank in ((0,) if point in ("decode", "write") else (0, 1))
]
STEPS = {"cluster": 3, "all-reduce": 3, "exchange": 3, "step": 4, "checkpoint": 4}
JOBS = 20
KILL_EVERY_S = (8.0, 20.0)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread_a_rank")]


def keep(name: str, found: dict[str, Any]) -> None:
    """Adds what a test has seen to the file that SEMVID_RESULTS names, if it is set."""
    if "SEMVID_RESULTS" in os.environ:
        path = Path(os.environ["SEMVID_RESULTS"])
        before = json.loads(path.read_text()) if path.exists() else {}
        about = {**env.surroundings("cpu"), "mesh": MESH, "model": "a random three-layer Wan transformer"}
        path.write_text(json.dumps({**about, **before, name: found}, indent=1) + "\n")


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("launcher", ["ray", "local"])
def test_every_fault_of_every_rank_leaves_the_same_video(
    launcher: str,
    head: Any,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "short.toml").write_text("[job]\nhang_seconds = 6.0\nstart_seconds = 25.0\n")
    words = ["run", "a red ball", *options(tiny_model), "--config", str(tmp_path / "short.toml")]
    local = shared("--launcher", "local")
    assert cli.main([*words, *local, "--out", str(tmp_path / "whole")]) == 0
    whole, rows = sha256(jobs.load(tmp_path / "whole")), []
    with cluster.connected(head.address, 0):
        for action, point, rank in CASES:
            step = f":step={STEPS[point]}" if point in STEPS else ""
            fault = f"{action}:point={point}:rank={rank}{step}"
            folder = tmp_path / f"{action}-{point}-{rank}"
            begin = time.monotonic()
            if launcher == "local":
                monkeypatch.setenv(env.FAULT, fault)
                assert cli.main([*words, *local, "--out", str(folder)]) == 0
            else:
                asked = Request(gpus=2, mesh=MESH, on_gpu=False, threads=1, faults=fault)
                job = jobs.create(folder, jobs.load(tmp_path / "whole").config)
                assert supervise(job, lambda job=job, asked=asked: cluster.live(job, asked)) == 0
                assert left_behind(folder) == []
            rows.append(_row(jobs.load(folder), action, point, rank, time.monotonic() - begin))
            assert rows[-1]["deaths"] == 1, fault
            assert sha256(jobs.load(folder)) == whole, fault
    limits = {"checkpoint_every_steps": 1, "hang_seconds": 6, "start_seconds": 25}
    keep(f"matrix_{launcher}", {"cases": len(rows), "videos_equal": len(rows), **limits, "rows": rows})


def _row(job: Job, action: str, point: str, rank: int, seconds: float) -> dict[str, Any]:
    events = list(job.events())
    deaths = [e for e in events if e["event"] == "stop" and e["state"] == "recovering"]
    resumed = [e["step"] for e in events if e["event"] == "resume"]
    lost = deaths[0]["step"] - (resumed[0] if resumed else 0) if deaths else 0
    return {
        "fault": f"{action} at {point}",
        "rank": rank,
        "deaths": len(deaths),
        "named_rank": deaths[0].get("rank") if deaths else None,
        "steps_lost": lost,
        "seconds": round(seconds, 1),
    }


@pytest.mark.timeout(7200)
def test_twenty_queued_jobs_survive_random_kills_and_each_equals_its_undisturbed_twin(
    head: Any,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    video = {"height": 64, "width": 96, "frames": 9, "steps": 6, "guidance": 3.0}
    model = {"path": str(tiny_model), "dtype": "fp32", "device": "cpu"}
    job = {"checkpoint_steps": 1, "failures": 6, "hang_seconds": 30.0}
    configs = [
        resolve(None, {"model": model, "video": {**video, "prompt": f"ball {n}", "seed": n}, "job": job}, preset="svg2")
        for n in range(JOBS)
    ]
    asked = Request(gpus=2, mesh=MESH, on_gpu=False, threads=1)
    seed = 7
    chance, kills = random.Random(seed), {"rank": 0, "worker": 0, "supervisor": 0}
    with cluster.connected(head.address, 0):
        twins = queue.submit(tmp_path / "calm", configs, asked)
        _finish(tmp_path / "calm", lambda: None)
        begin = time.monotonic()
        made = queue.submit(tmp_path / "soak", configs, asked)
        next_kill = time.monotonic() + 10

        def kill_something() -> None:
            nonlocal next_kill
            if time.monotonic() < next_kill:
                return
            next_kill = time.monotonic() + chance.uniform(*KILL_EVERY_S)
            kind = chance.choices(list(kills), weights=[6, 3, 1])[0]
            if kind == "supervisor":
                import ray

                victim = int(ray.get(cluster.wake(tmp_path / "soak").pid.remote()))
            else:
                ranks = processes("semvid.launch.worker", str(tmp_path / "soak"))
                if not ranks:
                    return
                victim = chance.choice(ranks)
                if kind == "worker":
                    victim = int(Path(f"/proc/{victim}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(victim, signal.SIGKILL)
            kills[kind] += 1

        _finish(tmp_path / "soak", kill_something)
        seconds = time.monotonic() - begin
        until = time.monotonic() + 30
        while left_behind(tmp_path / "soak") and time.monotonic() < until:
            time.sleep(0.5)
        assert left_behind(tmp_path / "soak") == []
    rows = [follow.status(one) for one in made]
    assert [row["state"] for row in rows] == ["done"] * JOBS
    assert [sha256(one) for one in made] == [sha256(twin) for twin in twins]
    assert len({sha256(one) for one in made}) == JOBS
    # None doubled: each has ended once.
    assert [sum(e["event"] == "stop" and e["state"] == "done" for e in one.events()) for one in made] == [1] * JOBS
    assert len(follow.found(tmp_path / "soak")) == JOBS
    found = {
        "jobs": JOBS,
        "gpus_a_job": 2,
        "cpu_workers": 4,
        "seed": seed,
        "kills": kills,
        "deaths_noticed": sum(row["deaths"] for row in rows),
        "equal_to_their_undisturbed_twins": JOBS,
        "seconds": round(seconds, 1),
    }
    keep("soak", found)


def _finish(root: Path, each: Any) -> None:
    """Waits until every job of a folder has ended."""
    woken_at = -60.0
    while not all(job.state in jobs.ENDS for job in follow.found(root)):
        if time.monotonic() - woken_at > 15:
            cluster.wake(root)
            woken_at = time.monotonic()
        each()
        time.sleep(0.5)
