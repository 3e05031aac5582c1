"""One job on several processes of this machine: who speaks, what is written, and that nobody is left behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from semvid.launch import cli, env, errors
from semvid.launch.ranks import local
from semvid.parallel import ranks
from semvid.runtime.config import Config
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job

VIDEO = ["--height", "64", "--width", "96", "--frames", "5", "--steps", "2", "--dtype", "fp32", "--device", "cpu"]
CFG = "cfg=2,ring=1,ulysses=1"


def words(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        "run",
        "a red ball",
        "--model",
        str(model),
        *VIDEO,
        "--guidance",
        "3",
        "--out",
        str(folder),
        "--launcher",
        "local",
        *more,
    ]


@pytest.fixture
def job(tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A new job. The processes find this module by the name that pytest gave it."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[3])
    return jobs.create(tmp_path / "job", tiny_config())


REFUSED = [
    (["--gpus", "0"], "--gpus is 0; accepted: 1 or more"),
    (
        ["--gpus", "2"],
        "--gpus is 2, but there is no usable NVIDIA GPU; accepted: --gpus 1, or --device cpu for as many",
    ),
    (["--gpus", "2", "--device", "cpu", "--mesh", "cfg=2,ulysses=2"], "= 4 ranks, but there are 2; accepted here"),
    (["--gpus", "2", "--device", "cpu", "--mesh", "rows=2"], "--mesh is 'rows=2'; accepted: degrees such as cfg=2"),
    (["--gpus", "2", "--device", "cpu", "--mesh", "cfg=2", "--guidance", "1"], "cfg must be 1; accepted here"),
    (["--mesh", "ulysses=2"], "= 2 ranks, but there are 1"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_cannot_be_shared_is_refused_in_one_line_and_nothing_written(
    args: list[str], message: str, empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["run", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "text"), [(1, "there is 1 GPU; accepted: 1"), (2, "there are 2 GPUs; accepted: 1 .. 2")]
)
def test_more_gpus_than_there_are_is_refused(found: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    with pytest.raises(ValueError, match=f"^--gpus is 4, but {text}$"):
        cli._check_gpus(4, "auto")
    cli._check_gpus(found, "cuda")
    cli._check_gpus(4, "cpu")


@pytest.mark.timeout(180)
def test_two_processes_make_one_video_and_one_is_heard(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "job"
    assert cli.main(words(tiny_model, folder, "--gpus", "2", "--json")) == 0
    out, shown = capfd.readouterr()
    assert out.count("\n") == 1
    report = json.loads(out)
    assert (report["job"], report["mesh"], report["gpus"]) == (str(folder), CFG, 2)
    # Each rank ran one branch; the counts are of both.
    assert (report["all_calls"], report["density_calls"], len(report["frames_sha256"])) == (12, 8, 64)
    assert shown.count(f"mesh      {CFG}: 2 processes") == 1
    assert shown.count("write   100%") >= 1
    assert "warning" not in shown.lower()
    files = ["contact.png", "events.jsonl", "job.toml", "report.json", "video.mp4"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert json.loads((folder / "report.json").read_text()) == report
    assert "mesh" not in (folder / "job.toml").read_text()
    events = list(jobs.load(folder).events())
    assert [e["event"] for e in events] == [
        "begin",
        "join",
        "start",
        *["phase"] * 3,
        *["step"] * 2,
        *["phase"] * 2,
        "stop",
    ]
    assert (events[2]["mesh"], events[2]["world_size"], events[-1]["state"]) == (CFG, 2, "done")
    assert multiprocessing.active_children() == []


@pytest.mark.timeout(180)
def test_torchrun_runs_a_job_folder_with_a_mesh(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "job", tiny_config("dense", steps=2, frames=5))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    mesh = ["--mesh", "cfg=1,ulysses=2"]
    worker = ["-m", "semvid.launch.ranks.worker", "--job", str(job.folder), *mesh, "--json"]
    done = subprocess.run([*torchrun, *worker], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["mesh"], report["gpus"], report["preset"]) == ("cfg=1,ring=1,ulysses=2", 2, "dense")
    assert (job.state, job.step) == ("done", 2)
    assert done.stderr.count("mesh      ") == 1


def all_fail() -> int:
    raise ValueError("steps is 0;\naccepted: 1 or more")


def one_fails() -> int:
    """Rank 1 raises, rank 0 waits for it in a collective."""
    ranks.join(torch.device("cpu"))
    if env.seat().rank == 1:
        raise TypeError("no such thing")
    dist.all_reduce(torch.zeros(1))
    return 0


def one_is_killed() -> int:
    ranks.join(torch.device("cpu"))
    if env.seat().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))
    return 0


def waits() -> int:
    ranks.join(torch.device("cpu"))
    os.write(1, b"waiting\n")
    time.sleep(600)
    return 0


FAILURES = [
    (all_fail, 2, "ValueError: steps is 0; accepted: 1 or more", False),
    (one_fails, 1, "TypeError: no such thing", True),
    (one_is_killed, 1, "killed by SIGKILL, as the system does where memory runs out", False),
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("target", "code", "reason", "traced"), FAILURES)
def test_a_rank_that_fails_ends_all_with_its_own_error(
    job: Job, target: Callable[[], int], code: int, reason: str, traced: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    assert local.run(job, 2, target) == code
    shown = capfd.readouterr().err.splitlines()
    (stop,) = job.events()
    assert shown[-1] == f"semvid: rank {stop['rank']}: {reason}"
    assert (len(shown) > 1, "Traceback (most recent call last):" in shown) == (traced, traced)
    assert (stop["state"], " ".join(stop["reason"].split())) == ("failed", reason)
    assert stop["rank"] == 1 or target is all_fail
    assert multiprocessing.active_children() == []


PROGRAM = """
import sys
from pathlib import Path
from semvid.launch import errors
from semvid.launch.ranks import local
from semvid.runtime.jobs import job
from tests.launch.ranks.test_local import waits
sys.exit(errors.exit_code("semvid", lambda: local.run(job.load(Path(sys.argv[1])), 2, waits)))
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_processes_end_with_their_parent(job: Job, end: signal.Signals) -> None:
    args = [sys.executable, "-c", PROGRAM, str(job.folder)]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    # The children have these pipes too, which end when the last of them is gone.
    process = subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | path, start_new_session=True
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["waiting\n"] * 2
    if end == signal.SIGINT:
        # A terminal's Ctrl-C is for all of them.
        os.killpg(process.pid, end)
    else:
        process.kill()
    shown = process.communicate(timeout=30)
    if end == signal.SIGINT:
        assert (process.returncode, shown, job.state) == (130, ("", f"semvid: {errors.INTERRUPTED}\n"), "cancelled")
