"""`bench e2e` and `bench throughput` at toy size."""

import json
from pathlib import Path

import pytest
import torch

from semvid.kernels.dispatch import select
from semvid.launch.bench import video_options
from semvid.launch.bench.whole import e2e, replay, throughput
from semvid.launch.bench.whole.e2e_rank import tensor_bytes
from semvid.launch.cli import main
from semvid.parallel.ranks import Ranks
from semvid.runtime.models import published

TOY = ["bench", "e2e", "--config", "toy", "--device", "cpu", "--repeats", "1"]


def test_e2e_measures_every_kind_on_one_and_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TOY, "--gpus", "1,2", "--mesh", "cfg=1,ring=1,ulysses=1", "--out", str(tmp_path)]
    assert main(words) == 2
    assert "cfg=1,ring=1,ulysses=1" in capsys.readouterr().err
    assert not (tmp_path / "e2e.json").exists()
    assert main([*TOY, "--gpus", "2", "--mesh", "ulysses=2", "--fp8", "--out", str(tmp_path / "two"), "--json"]) == 0
    two = json.loads(capsys.readouterr().out)["worlds"]["2"]
    sparse = ["first", "refresh", "reuse", "dense, ours"]
    assert [row["name"] for row in two["rows"]] == [*sparse, *(f"{name}, fp8" for name in sparse)]
    assert main([*TOY, "--gpus", "1", "--out", str(tmp_path / "one"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    one = report["worlds"]["1"]
    assert report == json.loads((tmp_path / "one" / "e2e.json").read_text())
    assert [row["name"] for row in one["rows"]] == ["dense, diffusers native", *sparse]
    for found in (one, two):
        assert found["drawn_layers"] == 2
        # 3 layers, of which the first is dense; the traces of layers 0 and 8 are nearest.
        assert found["density_of_layers"] == pytest.approx(one["density_of_layers"], abs=0.1)
        for row in found["rows"]:
            assert row["seconds"] > 0
            if row["parts"]:
                assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
    assert one["video_seconds"].keys() == {"dense", "svg2"}
    assert two["video_seconds"].keys() == {"dense", "svg2", "svg2, fp8"}
    assert one["vae"]["seconds"] > 0
    assert [row["encoder"] for row in one["text"]] == ["umt5"]


@pytest.mark.parametrize("world", [1, 2])
def test_e2e_measures_a_joint_sequence(world: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "e2e", "--config", "toy-joint", "--device", "cpu", "--repeats", "1", "--fp8", "--json"]
    assert main([*words, "--gpus", str(world), "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["worlds"][str(world)]
    sparse = ["first", "refresh", "reuse", "dense, ours"]
    stock = ["dense, diffusers native"] if world == 1 else []
    assert [row["name"] for row in found["rows"]] == [*stock, *sparse, *(f"{name}, fp8" for name in sparse)]
    assert found["drawn_layers"] == 2
    assert [row["encoder"] for row in found["text"]] == ["llama", "clip"]


def test_usp_is_not_for_a_joint_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "e2e", "--config", "toy-joint", "--device", "cpu", "--usp", "--out", str(tmp_path)]
    assert main(words) == 2
    assert "--usp is not for --config toy-joint, whose attention masks padding" in capsys.readouterr().err


def test_a_video_is_computed_from_its_schedule() -> None:
    def rows(suffix: str, *seconds: float) -> list[dict[str, object]]:
        names = (f"{name}{suffix}" for name in ("first", "refresh", "reuse", "dense, ours"))
        return [{"name": name, "seconds": second} for name, second in zip(names, seconds, strict=True)]

    ours = [*rows("", 3.0, 2.0, 1.0, 3.5), *rows(", fp8", 2.0, 1.0, 0.5, 3.0)]
    stock = {"name": "dense, diffusers native", "seconds": 4.0}
    found = {"rows": [stock, *ours], "mesh": "cfg=1,ring=1,ulysses=1", "vae": {"seconds": 5.0}, "text": []}
    report = {"steps": {"dense": 2, "first": 1, "refresh": 4, "reuse": 3}, "branches": 2, "preset": "x"}
    made = e2e._video(found, report)["video_seconds"]
    plain, fp8 = 7 + 3 + 8 + 3, 6 + 2 + 4 + 1.5
    assert made == {"dense": 2 * 10 * 4.0 + 5, "x": 2 * plain + 5, "x, fp8": 2 * fp8 + 5}
    # Branches on two GPUs; without another's dense pass ours is the yardstick.
    made = e2e._video(found | {"rows": ours, "mesh": "cfg=2,ring=1,ulysses=1"}, report)["video_seconds"]
    assert made == {"dense": 10 * 3.5 + 5, "x": plain + 5, "x, fp8": fp8 + 5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "1"], "--layers is 1; accepted: more than attention.dense_layers"),
        (["--layers", "4"], "--layers is 4; accepted: 1 .. 3"),
        (["--density", "0"], "--density is 0.0; accepted: 0.02 .. 1"),
        (["--usp"], "--usp can't run here: "),
        (["--parts", "sound"], "--parts is 'sound'; accepted: transformer, vae, text"),
        (["--gpus", "x"], "--gpus is 'x'; accepted: whole numbers"),
        (
            ["--config", "hunyuan-720p"],
            "--config is 'hunyuan-720p', which takes GPUs; accepted on a CPU: toy, toy-joint",
        ),
    ],
)
def test_bad_options_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOY, *words]) == 2
    assert message in capsys.readouterr().err


def test_each_layer_takes_the_nearest_recorded_one() -> None:
    model = published.read("wan2.1-t2v-14b")
    found = replay.layer_densities(model, 40)
    assert found.shape == (40, 40)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[12], found[39])
    assert float(found[12].mean()) == pytest.approx(0.208, abs=1e-3)
    assert float(replay.layer_densities(model, 40, mean=0.3).mean()) == pytest.approx(0.3, abs=1e-3)
    assert float(replay.layer_densities(model, 40, scale=0.5).mean()) < float(found.mean()) * 0.7
    # 24 heads of the 5B model: evenly spaced of 40.
    assert replay.layer_densities(published.read("wan2.2-ti2v-5b"), 30).shape == (30, 24)


def test_a_replayed_map_has_the_density_of_its_layer_and_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    densities = torch.tensor([[0.2, 0.6], [0.9, 0.4]], dtype=torch.float64)
    made = replay.Replay(select("reference", torch.device("cpu")), densities, Ranks(), seed=0)
    q, k = torch.randn(2, 40, 8, generator=generator), torch.randn(2, 200, 8, generator=generator)
    sizes = torch.randint(1, 9, (2, 200), generator=generator, dtype=torch.int32)
    sizes[:, 7] = 0
    for layer in (0, 1):
        made.layer = layer
        selected = made.ops().top_p_map(q, k, sizes, 0.9, 0.1).selected
        assert not selected[:, :, 7].any()
        share = (selected * sizes[:, None]).sum(-1).double().mean(-1) / sizes.sum(-1)
        torch.testing.assert_close(share, densities[layer], rtol=0.1, atol=0.02)
        assert torch.equal(selected, made.ops().top_p_map(k[:, :40], k, sizes, 0.9, 0.1).selected)


def test_bytes_of_a_storage_are_counted_once() -> None:
    x = torch.ones(10)
    assert tensor_bytes([x, (x[:5], {"a": 1}), torch.ones(2, dtype=torch.int64)]) == 40 + 16


def test_throughput_runs_jobs_in_groups_of_every_size(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "2"]
    words = ["bench", "throughput", "a red ball", "--model", str(tiny_model), *small, "--jobs", "2", "--gpus", "2"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [case["groups"] for case in report["cases"]] == ["2 x 1", "1 x 2"]
    for case in report["cases"]:
        assert len(case["finished_seconds"]) == 2
        assert case["p50_seconds"] <= case["p95_seconds"] <= case["seconds"]
        assert case["videos_per_hour"] == pytest.approx(3600 * 2 / case["seconds"])
    assert (tmp_path / "1x2" / "job-1" / "video.mp4").exists()


def test_a_checkpoint_of_random_weights_runs_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(tmp_path / "toy"), "--device", "cpu"]
    assert main(["bench", "checkpoint", "--model", "toy", "--device", "cpu", "--out", str(tmp_path / "toy")]) == 0
    size = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "2", "--dtype", "fp32"]
    assert main(["run", "a red ball", *model, *size, "--out", str(tmp_path / "job")]) == 0
    assert (tmp_path / "job" / "video.mp4").exists()
    capsys.readouterr()
    assert main(["bench", "checkpoint", "--model", "toy", "--device", "cpu", "--out", str(tmp_path / "toy")]) == 2
    assert "which exists; accepted: a new folder" in capsys.readouterr().err


def test_a_case_is_summed_up() -> None:
    found = throughput.summary([10.0, 20.0, 20.0, 30.0], [10.0, 10.0, 20.0, 10.0], 2, 4)
    assert found["groups"] == "2 x 2"
    assert found["videos_per_hour"] == 480.0
    assert found["gpu_seconds_per_video"] == 25.0
    assert found["p50_seconds"] == 20.0


def test_groups_must_divide_the_gpus() -> None:
    assert video_options.group_sizes(video_options.ThroughputOptions(gpus=4)) == [1, 2, 4]
    assert video_options.group_sizes(video_options.ThroughputOptions(gpus=6)) == [1, 2]
    with pytest.raises(ValueError, match="--groups is 3; accepted: a divisor of --gpus 4"):
        video_options.check_throughput(video_options.ThroughputOptions(gpus=4, groups=(3,)))


def test_a_job_that_fails_ends_the_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "throughput", "--model", "absent", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match="a job of 1 x 1 failed: semvid: --model is 'absent', which is no folder"):
        main(words)
