"""Every fault under every launcher, and twenty queued jobs with random kills. Slow: run with `pytest -m slow`.

With SEMVID_RESULTS=FILE what was seen is kept there as JSON.
"""

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from semvid.launch import cli, env, machine
from semvid.launch.control import status
from semvid.launch.control.request import Request
from semvid.launch.queue import queue, ray_actor
from semvid.launch.ranks import local as processes_module
from semvid.launch.ranks import ray_cluster
from semvid.launch.ranks.attempts import supervise
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job
from semvid.runtime.settings import resolve
from tests.launch.ranks.test_ray_cluster import MESH, head, left_behind, options, processes, sha256, shared  # noqa: F401

# In the order in which a job reaches them; at rank 1 nobody decodes and writes. One job suffers all, one a life.
POINTS = {
    "start": 0,
    "load": 0,
    "encode": 0,
    "cluster": 2,
    "all-reduce": 2,
    "exchange": 3,
    "step": 4,
    "checkpoint": 5,
    "decode": 6,
    "write": 6,
}
RANK_0_ALONE = ("decode", "write")
JOBS = 20
KILL_EVERY_S = (15.0, 35.0)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread_a_rank")]


def keep(name: str, found: dict[str, Any]) -> None:
    """Adds what a test has seen to the file that SEMVID_RESULTS names, if it is set."""
    if "SEMVID_RESULTS" in os.environ:
        path = Path(os.environ["SEMVID_RESULTS"])
        before = json.loads(path.read_text()) if path.exists() else {}
        about = {**machine.surroundings("cpu"), "mesh": MESH, "model": "a random three-layer Wan transformer"}
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
    (tmp_path / "short.toml").write_text("[job]\nhang_seconds = 8.0\nstart_seconds = 60.0\nfailures = 20\n")
    words = ["run", "a red ball", *options(tiny_model), "--config", str(tmp_path / "short.toml")]
    local, rows = shared("--launcher", "local"), []
    assert cli.main([*words, *local, "--out", str(tmp_path / "whole")]) == 0
    with ray_cluster.connected(head.address, 0):
        for action, rank in (("kill", 0), ("kill", 1), ("hang", 0), ("hang", 1)):
            points = [point for point in POINTS if rank == 0 or point not in RANK_0_ALONE]
            faults = ";".join(f"{action}:point={point}:rank={rank}:step={POINTS[point]}" for point in points)
            folder = tmp_path / f"{action}-{rank}"
            if launcher == "local":
                monkeypatch.setenv(env.FAULT, faults)
                assert cli.main([*words, *local, "--out", str(folder)]) == 0
            else:
                asked = Request(gpus=2, mesh=MESH, on_gpu=False, threads=1, faults=faults)
                job = jobs.create(folder, jobs.load(tmp_path / "whole").config)
                assert supervise(job, lambda job=job, asked=asked: ray_cluster.live(job, asked)) == 0
                assert left_behind(folder) == []
            rows += _rows(jobs.load(folder), action, rank, points)
            assert sha256(jobs.load(folder)) == sha256(jobs.load(tmp_path / "whole")), faults
    about = {"jobs": 4, "videos_equal": 4, "checkpoint_every_steps": 1, "hang_seconds": 8, "start_seconds": 60}
    keep(f"matrix_{launcher}", {**about, "faults": len(rows), "rows": rows})


def _rows(job: Job, action: str, rank: int, points: Sequence[str]) -> list[dict[str, Any]]:
    """What each death of a job was and cost; every fault has come, in its order."""
    events = list(job.events())
    deaths = [n for n, e in enumerate(events) if e["event"] == "stop" and e["state"] == "recovering"]
    assert len(deaths) == len(points), [events[n] for n in deaths]
    # Who was killed ended by a signal that its keeper sees; who hangs is known by its counts.
    assert [events[n].get("rank") for n in deaths] == [rank] * len(points), [events[n] for n in deaths]
    rows = []
    for point, death in zip(points, deaths, strict=True):
        found = [e for e in events[death:] if e["event"] in ("resume", "stop")][1:2]
        after = found[0]["step"] if found and found[0]["event"] == "resume" else 0
        rows.append(
            {
                "fault": f"{action} rank {rank} at {point}",
                "named_rank": events[death].get("rank"),
                "at_step": events[death]["step"],
                "went_on_after_step": after,
                "seconds_to_the_next_start": _restart_seconds(events, death),
            }
        )
    return rows


def _restart_seconds(events: Sequence[dict[str, Any]], death: int) -> float | None:
    """From the death's notice to the ranks' next start; None where they died before that."""
    for event in events[death + 1 :]:
        if event["event"] == "stop":
            return None
        if event["event"] == "start":
            return round(event["time"] - events[death]["time"], 1)
    return None


@pytest.mark.timeout(7200)
def test_twenty_queued_jobs_survive_random_kills_and_each_equals_its_undisturbed_twin(
    head: Any,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    video = {"height": 64, "width": 96, "frames": 9, "steps": 6, "guidance": 3.0}
    model = {"path": str(tiny_model), "dtype": "fp32", "device": "cpu"}
    # Kills are random here and follow from nothing that a job does: none must fail for their number.
    job = {"checkpoint_steps": 1, "failures": 100, "hang_seconds": 60.0}
    configs = [
        resolve(None, {"model": model, "video": {**video, "prompt": f"ball {n}", "seed": n}, "job": job}, preset="svg2")
        for n in range(JOBS)
    ]
    asked = Request(gpus=2, mesh=MESH, on_gpu=False, threads=1)
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[3])
    twins = [jobs.create(tmp_path / f"twin-{n}", config) for n, config in enumerate(configs)]
    assert processes_module.run(twins[0], 2, make_all, [twin.folder for twin in twins]) == 0
    seed = 7
    chance, kills = random.Random(seed), {"rank": 0, "worker": 0, "supervisor": 0}
    with ray_cluster.connected(head.address, 0):
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

                victim = int(ray.get(ray_actor.wake(tmp_path / "soak").pid.remote()))
            else:
                ranks = processes("semvid.launch.ranks.worker", str(tmp_path / "soak"))
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
    rows = [status.status(one) for one in made]
    assert [row["state"] for row in rows] == ["done"] * JOBS
    assert [sha256(one) for one in made] == [sha256(twin) for twin in twins]
    assert len({sha256(one) for one in made}) == JOBS
    # None doubled: each has ended once.
    assert [sum(e["event"] == "stop" and e["state"] == "done" for e in one.events()) for one in made] == [1] * JOBS
    assert len(status.found(tmp_path / "soak")) == JOBS
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


def make_all(folders: Sequence[Path]) -> int:
    """Makes jobs one after the other, as one of two ranks that live through all of them."""
    import torch

    from semvid.launch.ranks import worker
    from semvid.parallel import mesh, ranks

    place = env.seat()
    torch.set_num_threads(1)
    ranks.join(torch.device("cpu"), meeting=ranks.Meeting(place.rank, place.world_size, *env.meeting()))
    mine = ranks.connect(mesh.parse(MESH, 2))
    for folder in folders:
        worker.report(folder, False, mine)
    ranks.leave()
    return 0


def _finish(root: Path, each: Any) -> None:
    """Waits until every job of a folder has ended."""
    woken_at = -60.0
    while not all(job.state in jobs.ENDS for job in status.found(root)):
        if time.monotonic() - woken_at > 15:
            ray_actor.wake(root)
            woken_at = time.monotonic()
        each()
        time.sleep(0.5)
