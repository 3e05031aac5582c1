"""`semvid bench throughput`: the same jobs on the same GPUs, one GPU a job, two, … all: videos an hour."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semvid.launch import machine
from semvid.launch.bench.timing import percentile
from semvid.launch.bench.video_options import ThroughputOptions, check_throughput, group_sizes

RESULT = "throughput.json"
FORM = "{:<12}{:>14}{:>16}{:>12}{:>12}{:>12}"


def run(options: ThroughputOptions, given: Sequence[str], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the report of `semvid bench throughput` and its lines; each job is a `semvid run` of its own.

    All jobs are there at the beginning; a group of GPUs takes the next one as soon as it has none. Loading counts.

    Args:
        options: how many jobs on how many GPUs.
        given: options of `semvid run` that describe the job, without --gpus, --seed and --out.
        folder: of the job folders; made if it is not there.

    Raises:
        ValueError: an option is not accepted, or there are fewer GPUs.
        RuntimeError: a job failed; its last line is in the message.
    """
    check_throughput(options)
    if options.device == "cuda":
        _check_gpus(options.gpus)
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "bench": "throughput",
        **machine.surroundings(options.device),
        "jobs": options.jobs,
        "gpus": options.gpus,
        "run": list(given),
        "cases": [],
    }
    for size in group_sizes(options):
        print(f"semvid: {options.jobs} jobs on {options.gpus // size} x {size} GPUs", file=sys.stderr, flush=True)
        report["cases"].append(_case(size, options, given, folder / f"{options.gpus // size}x{size}"))
        (folder / RESULT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report, [*lines(report), "", f"results  {folder / RESULT}"]


def lines(report: Mapping[str, Any]) -> list[str]:
    """Returns the report for a reader."""
    head = FORM.format("groups", "videos/hour", "GPU-s a video", "p50 s", "p95 s", "all s")
    rows = [
        FORM.format(
            case["groups"],
            f"{case['videos_per_hour']:.1f}",
            f"{case['gpu_seconds_per_video']:.1f}",
            f"{case['p50_seconds']:.1f}",
            f"{case['p95_seconds']:.1f}",
            f"{case['seconds']:.1f}",
        )
        for case in report["cases"]
    ]
    return [
        f"device   {report['device']}, commit {report['commit']}",
        f"{report['jobs']} jobs, all there at 0 s",
        head,
        *rows,
    ]


def summary(finished_s: Sequence[float], busy_s: Sequence[float], group: int, gpus: int) -> dict[str, Any]:
    """Returns what a case comes to.

    Args:
        finished_s: when each job was done, from the beginning of all.
        busy_s: how long each took.
        group: GPUs a job.
        gpus: in all.
    """
    whole = max(finished_s)
    return {
        "groups": f"{gpus // group} x {group}",
        "gpus_per_job": group,
        "seconds": whole,
        "videos_per_hour": 3600 * len(finished_s) / whole,
        "gpu_seconds_per_video": group * sum(busy_s) / len(busy_s),
        "p50_seconds": percentile(finished_s, 0.5),
        "p95_seconds": percentile(finished_s, 0.95),
        "finished_seconds": [round(x, 3) for x in sorted(finished_s)],
        "busy_seconds": [round(x, 3) for x in busy_s],
    }


def _case(size: int, options: ThroughputOptions, given: Sequence[str], folder: Path) -> dict[str, Any]:
    """Runs all jobs with `size` GPUs each."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for job in range(options.jobs):
        waiting.put(job)
    finished: list[tuple[float, float]] = []
    errors: list[str] = []
    begin = time.perf_counter()

    def serve(first: int) -> None:
        while not errors:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.perf_counter()
            problem = _job(job, range(first, first + size), options, given, folder / f"job-{job}")
            if problem is not None:
                errors.append(problem)
            finished.append((time.perf_counter() - begin, time.perf_counter() - start))

    servers = [threading.Thread(target=serve, args=(first,)) for first in range(0, options.gpus, size)]
    for server in servers:
        server.start()
    for server in servers:
        server.join()
    if errors:
        raise RuntimeError(f"a job of {options.gpus // size} x {size} failed: {errors[0]}")
    return summary([done for done, _ in finished], [busy for _, busy in finished], size, options.gpus)


def _job(job: int, gpus: range, options: ThroughputOptions, given: Sequence[str], folder: Path) -> str | None:
    """Runs one job on some GPUs; returns the last line of its stderr if it failed."""
    command = [sys.executable, "-m", "semvid.launch.cli", "run", *given, "--seed", str(job)]
    # By this machine's processes alone: the GPUs are named here, and no cluster's queue is measured.
    command += ["--launcher", "local", "--gpus", str(len(gpus)), "--device", options.device]
    command += ["--out", str(folder), "--checkpoint-every", "0"]
    surroundings = dict(os.environ)
    if options.device == "cuda":
        known = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        surroundings["CUDA_VISIBLE_DEVICES"] = ",".join(known[gpu] if known else str(gpu) for gpu in gpus)
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]


def _check_gpus(wanted: int) -> None:
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted > found:
        raise ValueError(
            f"--gpus is {wanted}, but there are {found} usable GPUs; accepted: up to {found}, or --device cpu"
        )
