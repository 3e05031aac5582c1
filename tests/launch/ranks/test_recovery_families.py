"""Every launcher with models that take more than text: an image, two transformers, a joint sequence, shared weights."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from semvid.launch import cli, env
from semvid.launch.control import request, status
from semvid.launch.queue import ray_actor
from semvid.launch.ranks import ray_cluster
from semvid.runtime.config import Config
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job
from semvid.runtime.settings import resolved, to_toml

MESH = "cfg=1,ring=1,ulysses=2"
JOINT = {"p": 0.6, "dense_steps": 0.0, "refresh_every": 2}

pytestmark = pytest.mark.usefixtures("one_thread_a_rank")


@pytest.fixture
def words(family_config: Callable[..., Config], tmp_path: Path) -> Callable[..., list[str]]:
    """Makes the options of `semvid run` for a job of a family with a checkpoint after each step."""

    def made(name: str, **video: Any) -> list[str]:
        config = family_config(name, JOINT, **video)
        path = tmp_path / f"{name}.toml"
        path.write_text(to_toml(config))
        return ["--config", str(path), "--checkpoint-every", "1", "--gpus", "2"]

    return made


def sha256(folder: Path) -> str:
    return str(json.loads((folder / "report.json").read_text())["frames_sha256"])


def deaths(folder: Path) -> list[tuple[int, int | None]]:
    """The step and the rank of each death."""
    events = jobs.load(folder).events()
    return [(e["step"], e["rank"]) for e in events if e["event"] == "stop" and e["state"] == "recovering"]


@pytest.mark.timeout(400)
def test_a_video_from_an_image_with_shared_weights_survives_a_death_in_every_phase(
    words: Callable[..., list[str]], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is named on a command line is meant from where it is given; the ranks may start elsewhere.
    monkeypatch.chdir(image.parent)
    args = ["run", *words("wan2.1-i2v-14b"), "--image", image.name, "--mesh", MESH, "--launcher", "local"]
    assert cli.main([*args, "--out", str(tmp_path / "whole")]) == 0
    assert not jobs.load(tmp_path / "whole").config.job.share_weights
    # Rank 1 has no encoders. The VAE encodes the image first, which is no decoding.
    faults = ("kill:rank=1:point=encode", "kill:rank=0:point=exchange:step=2", "kill:rank=0:point=decode")
    monkeypatch.setenv(env.FAULT, ";".join(faults))
    assert cli.main([*args, "--share-weights", "--out", str(tmp_path / "job")]) == 0
    config = jobs.load(tmp_path / "job").config
    assert config.job.share_weights
    assert config.video.image == str(image)
    assert deaths(tmp_path / "job") == [(0, 1), (2, 0), (4, 0)]
    assert sha256(tmp_path / "job") == sha256(tmp_path / "whole")


@pytest.mark.timeout(400)
def test_text_in_the_sequence_and_shared_weights_survive_deaths_under_ray(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["run", *words("hunyuanvideo")]
    assert cli.main([*args, "--launcher", "local", "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setenv(env.FAULT, "kill:rank=1:point=exchange:step=2;kill:rank=0:point=decode")
    assert cli.main([*args, "--share-weights", "--launcher", "ray", "--out", str(tmp_path / "job")]) == 0
    assert deaths(tmp_path / "job") == [(2, 1), (4, 0)]
    # Guidance is an input of the model: there are no branches to part.
    (mesh,) = {e["mesh"] for e in jobs.load(tmp_path / "job").events() if e["event"] == "start"}
    assert mesh.startswith("cfg=1")
    assert sha256(tmp_path / "job") == sha256(tmp_path / "whole")


@pytest.mark.timeout(400)
def test_sigterm_while_the_second_transformer_runs_leaves_a_checkpoint_to_go_on_from(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    steps = 60
    args = words("wan2.2-t2v-a14b", steps=steps, boundary=0.9)
    args = ["run", *args, "--share-weights", "--mesh", MESH, "--launcher", "local", "--checkpoint-every", "50"]
    assert cli.main([*args, "--out", str(tmp_path / "whole")]) == 0
    job = tmp_path / "job"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "semvid.launch.cli", *args, "--out", str(job)]
    process = subprocess.Popen(command, env=os.environ | path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not job.is_dir() or _steps(job) < steps // 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    stopped = Job(job, jobs.load(job).config)
    assert stopped.state == "interrupted"
    step = stopped.step
    assert steps // 2 <= step < steps
    with safe_open(job / "checkpoint" / f"step-{step:06d}" / "rank-0000.safetensors", "pt") as file:
        assert any(name.startswith("cond-2/") for name in file.keys())  # noqa: SIM118 - no mapping
    assert cli.main(["resume", str(job), "--gpus", "2", "--mesh", MESH, "--launcher", "local"]) == 0
    assert json.loads((job / "report.json").read_text())["resumed_after_step"] == step
    assert sha256(job) == sha256(tmp_path / "whole")


def _steps(folder: Path) -> int:
    return sum(event["event"] == "step" for event in Job(folder, Config()).events())


def test_submit_takes_what_run_takes_and_an_image_for_each_job(
    words: Callable[..., list[str]], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(ray_actor, "wake", lambda *_: None)
    other = shutil.copy(image, tmp_path / "other.png")
    prompts = tmp_path / "prompts.toml"
    prompts.write_text(f"[[video]]\nprompt = 'one'\n[[video]]\nprompt = 'two'\nimage = '{other}'\nguidance = 1.0\n")
    monkeypatch.chdir(image.parent)
    args = [*words("wan2.1-i2v-14b"), "--image", image.name, "--share-weights", "--prompts", str(prompts)]
    root = ["--root", str(tmp_path / "jobs")]
    assert cli.main(["submit", *args, *root, "--address", "auto"]) == 0
    found = sorted(status.found(tmp_path / "jobs"), key=lambda job: job.config.video.prompt)
    assert [(job.config.video.prompt, job.config.video.image) for job in found] == [
        ("one", str(image)),
        ("two", str(other)),
    ]
    assert all(job.config.job.share_weights and job.config.job.checkpoint_steps == 1 for job in found)
    assert [request.read(job.folder).gpus for job in found] == [2, 2]
    # The mesh serves the first job and not the second, which has one branch.
    assert cli.main(["submit", *args, *root, "--mesh", "cfg=2,ring=1,ulysses=1"]) == 2
    assert len(status.found(tmp_path / "jobs")) == 2
    prompts.write_text("[[video]]\nprompt = 'one'\nimage = 3\n")
    assert cli.main(["submit", *args, *root]) == 2
    assert len(status.found(tmp_path / "jobs")) == 2


def test_branches_that_a_family_has_not_are_refused_by_every_command(
    words: Callable[..., list[str]], empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*words("hunyuanvideo"), "--mesh", "cfg=2,ring=1,ulysses=1"]
    capsys.readouterr()
    for command in (["run", "--launcher", "local"], ["run", "--launcher", "ray"], ["run"], ["submit"]):
        assert cli.main([*command, *options]) == 2
        err = capsys.readouterr().err
        assert "cfg must be 1" in err
        assert err.count("\n") == 1
    assert list(empty.iterdir()) == []


def test_one_gpu_shares_its_weights_with_nobody(
    words: Callable[..., list[str]], empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*words("wan2.1-t2v-1.3b"), "--gpus", "1"]
    capsys.readouterr()
    for command in (["run"], ["run", "--launcher", "ray"], ["run", "--launcher", "torchrun"], ["submit"]):
        assert cli.main([*command, *options, "--share-weights"]) == 2
        err = capsys.readouterr().err
        assert err == (
            "semvid: job.share_weights is True, but one GPU has nobody to share with; accepted: --gpus 2 or more\n"
        )
    assert list(empty.iterdir()) == []


def test_what_shares_its_weights_is_neither_compared_nor_resumed_on_one_gpu(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "shared.toml"
    alone = Path(words("wan2.1-t2v-1.3b")[1]).read_text()
    config.write_text(alone.replace("share_weights = false", "share_weights = true"))
    assert cli.main(["compare", "--config", str(config), "--out", str(tmp_path / "compare")]) == 2
    assert "one GPU has nobody to share with" in capsys.readouterr().err
    job = jobs.create(tmp_path / "job", resolved(config))
    assert cli.main(["resume", str(job.folder)]) == 2
    assert "one GPU has nobody to share with" in capsys.readouterr().err
    assert not (tmp_path / "compare").exists()
