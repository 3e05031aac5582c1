"""What a video needs, before anything is loaded."""

import json
from pathlib import Path

import pytest

from semvid.launch.cli import main
from semvid.launch.commands import deployment as deployments
from semvid.launch.commands import estimate
from semvid.runtime import settings

GIB = 1 << 30


@pytest.mark.parametrize("name", settings.deployments())
def test_every_deployment_can_be_read_and_fits_an_h200(name: str) -> None:
    deployment = deployments.read(Path(name))
    report, lines = estimate.run(deployment, None, 139 * GIB)
    assert report["fits"], lines
    assert sum(report["steps"].values()) == deployment.config.video.steps
    # A toy's attention is less than fifty iterations of its k-means.
    most = 5 if name.startswith("toy") else 1
    assert 0 < report["denoise_seconds"] <= report["dense_denoise_seconds"] * most


def test_the_mesh_is_said_with_its_reason() -> None:
    four = estimate.choose_mesh(deployments.read(Path("wan2.1-14b-720p"), gpus=4), None)
    assert str(four[0]) == "cfg=2,ring=1,ulysses=2"
    assert "branches apart" in four[1]
    three = estimate.choose_mesh(deployments.read(Path("wan2.1-14b-720p"), gpus=3), None)
    assert str(three[0]) == "cfg=1,ring=1,ulysses=3"
    assert "can't be parted" in three[1]
    hunyuan = estimate.choose_mesh(deployments.read(Path("hunyuan-720p"), gpus=4), None)
    assert str(hunyuan[0]) == "cfg=1,ring=1,ulysses=4"
    with pytest.raises(ValueError, match="without guidance there is one branch"):
        estimate.choose_mesh(deployments.read(Path("hunyuan-720p"), gpus=4), "cfg=2,ring=1,ulysses=2")


def test_steps_follow_the_schedule() -> None:
    kinds = deployments.step_kinds(deployments.read(Path("wan2.1-14b-720p")))
    assert kinds == {"dense": 10, "first": 1, "refresh": 39, "reuse": 0}
    # Each of two transformers begins with its own clusters.
    assert deployments.step_kinds(deployments.read(Path("wan2.2-a14b-720p")))["first"] == 2
    # Refreshed 2, 4, 8 and then every 10 steps after the one before.
    growing = deployments.step_kinds(deployments.read(Path("wan2.1-14b-720p"), "balanced"))
    assert growing == {"dense": 10, "first": 1, "refresh": 5, "reuse": 34}
    dense = deployments.step_kinds(deployments.read(Path("wan2.1-14b-720p"), "dense"))
    assert dense == {"dense": 50, "first": 0, "refresh": 0, "reuse": 0}


def test_what_does_not_fit_is_refused_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--config", "wan2.1-14b-720p", "--frames", "121"]
    code = main(["estimate", *size, "--gpus", "1", "--gpu-memory", "46", "--json"])
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert code == 2
    assert not report["fits"]
    assert "--gpus is 1, on which denoise is predicted to take" in err
    assert "would fit: --linear fp8, or --gpus 2 " in err
    assert "--frames " in err
    code = main(["estimate", "--config", "wan2.1-14b-720p", "--gpu-memory", "20"])
    assert code == 2
    assert "GiB and more" in capsys.readouterr().err


def test_shared_weights_need_less_and_several_gpus() -> None:
    two = deployments.read(Path("wan2.2-a14b-720p"), gpus=2)
    whole, _ = estimate.run(two, None, 50 * GIB)
    shared, _ = estimate.run(two, None, 50 * GIB, share_weights=True)
    assert not whole["fits"]
    assert "--share-weights" in whole["would_fit"]
    assert shared["fits"]
    with pytest.raises(ValueError, match="--share-weights with one GPU"):
        estimate.run(deployments.read(Path("toy")), None, GIB, share_weights=True)


def test_a_checkpoint_folder_is_estimated(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    assert main(["estimate", "--model", str(tiny_model), "--height", "64", "--width", "96", "--frames", "17"]) == 0
    assert "120 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to estimate; accepted: --config NAME"),
        (["--config", "wan"], "--config is 'wan', which can't be read"),
        (["--config", "toy", "--gpus", "0"], "--gpus is 0; accepted: 1 or more"),
        (["--config", "toy", "--frames", "16"], "frames is 16; accepted: 4k"),
        (["--config", "toy", "--gpu-memory", "-1"], "--gpu-memory is -1.0; accepted"),
        (["--model", "nothing"], "--model is 'nothing', which is no folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_deployment_without_its_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[video]\nframes = 5\n")
    with pytest.raises(ValueError, match=r"whose \[deployment\] is None; accepted: a \[deployment\] with model"):
        deployments.read(path)
    path.write_text('[deployment]\nmodel = "toy"\ngpus = "two"\n')
    with pytest.raises(ValueError, match="deployment.gpus is 'two'; accepted: a whole number"):
        deployments.read(path)


def test_fp8_halves_the_large_layers_and_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    deployment = deployments.read(Path("wan2.1-14b-720p"), gpus=1)
    plain, fp8 = (estimate.run(d, None, 139 * GIB)[0] for d in (deployment, estimate.with_linear(deployment, "fp8")))
    # 40 layers of six matrices of 5120² and two of 5120 x 13,824, a byte less each.
    saved = 40 * (6 * 5120**2 + 2 * 5120 * 13824)
    assert plain["bytes"]["weights"] - fp8["bytes"]["weights"] == saved
    between = (plain["peak_bytes"] + fp8["peak_bytes"]) / 2 / GIB
    assert main(["estimate", "--config", "wan2.1-14b-720p", "--gpus", "1", "--gpu-memory", f"{between}"]) == 2
    assert "would fit: --linear fp8" in capsys.readouterr().err
    assert (
        main(
            ["estimate", "--config", "wan2.1-14b-720p", "--gpus", "1", "--gpu-memory", f"{between}", "--linear", "fp8"]
        )
        == 0
    )
    words = ["--gpus", "2", "--share-weights", "--linear", "fp8"]
    assert main(["estimate", "--config", "wan2.1-14b-720p", *words]) == 2
    assert "accepted: one of them" in capsys.readouterr().err
