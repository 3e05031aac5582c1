"""The command line as a person uses it: bad input, a whole run, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from semvid.launch import cli
from semvid.launch.commands.job_options import config_of
from semvid.runtime.jobs.video import encoder
from semvid.runtime.settings import DEMO_MODEL

SMALL = ["--height", "64", "--width", "96", "--frames", "17", "--steps", "2", "--seed", "3", "--dtype", "fp32"]


def run(args: list[str]) -> int:
    """The exit code of `semvid ARGS`, also where argparse itself exits."""
    try:
        return cli.main(args)
    except SystemExit as stop:
        return int(stop.code or 0)


def program(*args: str) -> list[str]:
    return [sys.executable, "-m", "semvid.launch.cli", *args]


BAD = [
    (["run", "--stps", "3"], "unknown option '--stps'; did you mean --steps?"),
    (["run", "a", "red", "ball"], "unknown word 'red' after the prompt; a prompt of several words stands in quotes"),
    (["run", "--seed", "x"], "--seed: invalid int value: 'x'"),
    (["run", "--device", "tpu"], "--device: invalid choice: 'tpu' (choose from"),
    (["rum"], "invalid choice: 'rum'"),
    (["run", ""], "prompt is ''; accepted: a text"),
    (["run", "--frames", "32"], "frames is 32; accepted: 4k + 1, nearest 29 and 33"),
    (["run", "--height", "100"], "height is 100; accepted: a multiple of 16, nearest 96 and 112"),
    (["run", "--steps", "0"], "steps is 0; accepted: 1 or more"),
    (["run", "--preset", "svg3"], "--preset is 'svg3'; accepted: balanced, dense, quality, svg2, turbo, or a"),
    (["compare", "--against", "x"], "--against is 'x'; accepted: balanced, dense"),
    (["run", "--config", "absent.toml"], "--config is 'absent.toml', which can't be read: no such file"),
    (["run", "--model", "absent"], "--model is 'absent', which is no folder; accepted: a diffusers checkpoint folder"),
    (["run", "--model", "."], "which has no model_index.json"),
    (["run", "--out", "/proc/semvid/x"], "which can't be written"),
    (["run", "--gpus", "2", "--nodes", "2"], "--nodes is 2, but without --address there is this machine alone; acc"),
    (["run", "--gpus", "2", "--address", "127.0.0.1:9"], "--address is '127.0.0.1:9', where nothing listens: "),
    (["submit", "x", "--address", "ray://127.0.0.1:9"], "--address is 'ray://127.0.0.1:9', where nothing listens: "),
    (["jobs", "--root", "absent"], "--root is 'absent', which is no folder"),
    (["bench", "throughput", "--steps", "abc"], "--steps: invalid int value: 'abc'"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    args: list[str], message: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(empty.iterdir()) == []


CONFIGS = [
    ("[attention]\np = 0", "attention.p is 0.0; accepted: 0 < p <= 1"),
    ("[attention]\np = 1.5", "attention.p is 1.5; accepted: 0 < p <= 1"),
    ("[attention]\nquery_clusters = 0", "attention.query_clusters is 0; accepted: 1 or more"),
    (
        "[attention]\nkey_clusters = 1621",
        "attention.key_clusters is 1621; accepted: 1 .. 1620, the tokens of this video",
    ),
    ("[attention]\nfloors = 1", "unknown option 'attention.floors'; accepted: "),
    ("[vido]\n", "unknown option 'vido'; accepted: preset, model, video, attention, job; did you mean 'video'?"),
    ("p = = 2", "which is no valid TOML"),
    ("model = 3", "model is 3; accepted: a table"),
]


@pytest.mark.parametrize(("text", "message"), CONFIGS)
def test_a_bad_config_file_is_refused_the_same_way(
    text: str, message: str, empty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.toml").write_text(text)
    assert run(["run", "--config", str(tmp_path / "bad.toml")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(empty.iterdir()) == []


def test_cuda_without_a_gpu_is_refused(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(["run", "--device", "cuda"]) == 2
    assert "--device is 'cuda', but there is no usable NVIDIA GPU" in capsys.readouterr().err
    assert list(empty.iterdir()) == []


def test_a_truncated_weight_file_is_refused(empty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    weights = next((model / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-7])
    assert run(["run", "a ball", "--model", str(model)]) == 2
    assert "--model holds a truncated file" in capsys.readouterr().err
    assert list(empty.iterdir()) == []


def test_an_out_folder_with_a_job_is_left_alone(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "job.toml").write_text("mine")
    assert run(["run", "--out", "."]) == 2
    assert "already holds a job" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in empty.iterdir()] == [("job.toml", "mine")]


def test_an_out_folder_with_anything_in_it_is_left_alone(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "video.mp4").write_text("mine")
    for out in (".", ""):
        assert run(["run", "--out", out]) == 2
        assert "--out is '.', which holds 'video.mp4'; accepted: a new or empty folder" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in empty.iterdir()] == [("video.mp4", "mine")]


def test_a_model_is_found_from_wherever_the_job_goes_on(empty: Path, tiny_model: Path) -> None:
    (empty / "model").symlink_to(tiny_model)
    # Somebody's folder of that name is not the embedded model.
    (empty / "demo").mkdir()
    for model, path in (("model", str(empty / "model")), ("demo", "demo")):
        args = cli._parser().parse_args(["run", "a ball", "--model", model, *SMALL])
        assert config_of(args, None).model.path == path


@pytest.mark.parametrize("args", [["run", "--frames", "32"], ["run", "--device", "cuda"]])
def test_bad_input_answers_within_three_seconds(args: list[str], empty: Path) -> None:
    if args[-1] == "cuda" and Path("/dev/nvidia0").exists():
        pytest.skip("needs a machine without an NVIDIA GPU; there is one")
    cpu_before, begin = os.times(), time.perf_counter()
    done = subprocess.run(program(*args), capture_output=True, text=True, check=False)
    cpu = sum(os.times()[2:4]) - sum(cpu_before[2:4])
    assert done.returncode == 2
    # On a machine that other work shares the wall clock says little; the processor's time is what the command costs.
    assert min(cpu, time.perf_counter() - begin) < 3


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A job folder, the JSON of `semvid run --json`, and its stderr."""
    folder = tmp_path_factory.mktemp("made") / "job"
    args = program("run", "a red ball", "--model", str(tiny_model), *SMALL, "--out", str(folder), "--json")
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_run_makes_a_job_folder_and_its_json(made: tuple[Path, dict[str, Any], str]) -> None:
    folder, report, _ = made
    assert report["job"] == str(folder)
    assert Path(report["video"]).stat().st_size > 0
    assert (report["steps"], report["density_calls"], report["all_calls"]) == (2, 8, 12)
    assert report["seconds_per_step"] > 0
    assert 0 < report["density"] < 1
    assert report["kernels"] == {"dense": "diffusers", "sparse": "reference"}
    assert len(report["frames_sha256"]) == 64
    assert report["versions"]["torch"]
    job = tomllib.loads((folder / "job.toml").read_text())
    assert (job["video"]["seed"], job["video"]["frames"], job["attention"]["p"]) == (3, 17, 0.9)


def test_run_shows_every_step_and_a_summary(made: tuple[Path, dict[str, Any], str]) -> None:
    _, report, shown = made
    for step in ("0/2 steps", "1/2 steps", "2/2 steps", "left"):
        assert step in shown
    assert f"video     {report['video']}" in shown
    assert "over the 8 sparse of 12 self-attention calls" in shown
    assert "kernels   dense: diffusers, sparse: reference" in shown
    assert f"encoder   {encoder()}" in shown
    assert report["frames_sha256"] in shown


def test_a_job_toml_as_config_makes_the_same_video(
    made: tuple[Path, dict[str, Any], str], empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report, _ = made
    assert run(["run", "--config", str(folder / "job.toml"), "--out", "again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames_sha256"] == report["frames_sha256"]


def test_the_worker_runs_a_job_folder(made: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    folder, report, _ = made
    (tmp_path / "job").mkdir()
    shutil.copy(folder / "job.toml", tmp_path / "job")
    args = [sys.executable, "-m", "semvid.launch.ranks.worker", "--job", str(tmp_path / "job")]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    assert report["frames_sha256"] in done.stdout
    left = [(tmp_path / "job" / name).stat().st_mtime_ns for name in ("video.mp4", "events.jsonl")]
    again = subprocess.run(args, capture_output=True, text=True, check=True)
    assert "is done; its video is" in again.stderr
    assert [(tmp_path / "job" / name).stat().st_mtime_ns for name in ("video.mp4", "events.jsonl")] == left
    failed = subprocess.run([*args[:-1], str(tmp_path)], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert "job.toml" in failed.stderr


def test_ctrl_c_ends_with_130_and_a_readable_folder(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    # Without checkpoints: on busy cores ten steps are done before the first is seen here.
    long = [*SMALL, "--steps", "5000", "--checkpoint-every", "0"]
    args = program("run", "a red ball", "--model", str(tiny_model), *long, "--out", str(folder))
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
    events = folder / "events.jsonl"
    for _ in range(600):
        if events.exists() and '"step"' in events.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in shown
    assert "Traceback" not in shown
    last = json.loads(events.read_text().splitlines()[-1])
    assert (last["state"], last["step"] >= 1) == ("cancelled", True)
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "job.toml"]


def test_compare_measures_two_presets_of_one_seed(
    tiny_model: Path, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["compare", "a red ball", "--model", str(tiny_model), *SMALL, "--json", "--out", "cmp"]
    assert run([*args, "--preset", "svg2", "--against", "dense"]) == 0
    out, shown = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert (report["preset"]["preset"], report["against"]["preset"]) == ("svg2", "dense")
    assert 0 < report["preset"]["density"] < report["against"]["density"] == 1
    assert len(report["psnr"]) == len(report["ssim"]) == 17
    assert report["latent_error"] > 0
    assert not report["same_frames"]
    assert "PSNR" in shown
    assert sorted(path.name for path in Path("cmp").iterdir()) == ["against", "compare.json", "contact.png", "preset"]
    assert json.loads(Path("cmp/compare.json").read_text()) == report
    assert run(["compare", "a red ball", "--model", str(tiny_model), *SMALL, "--out", "cmp"]) == 2


def test_compare_of_a_preset_with_itself_finds_no_difference(
    tiny_model: Path, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", "x", "--model", str(tiny_model), *SMALL, "--json", "--against", "svg2"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["same_frames"], report["mean_psnr"], report["latent_error"]) == (True, None, 0)
    assert report["mean_ssim"] == pytest.approx(1)


def test_doctor_names_versions_kernels_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("device", "torch", "diffusers", "kernels   reference: yes", "kernels   hopper: ", "auto", "video"):
        assert word in text
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"]["reference"] == "yes"


@pytest.mark.parametrize("args", ["--help", "run --help", "compare --help", "doctor --help", "--version"])
def test_help_and_version_answer(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args.split()) == 0
    assert "semvid" in capsys.readouterr().out
