"""`semvid bench attention` on the toy shape: every combination, checked, written as it goes; wrong options refused."""

import json
from pathlib import Path

import pytest
import torch

from semvid.kernels.dispatch import select
from semvid.launch import cli
from semvid.launch.bench.kernels import sweep
from semvid.launch.bench.options import SHAPES, SweepOptions

TOY = SweepOptions(
    shapes=("toy",),
    backends=("reference",),
    query_clusters=(5,),
    key_clusters=(7, 20),
    densities=(0.3, 0.6),
    repeats=1,
    warmup=0,
    device="cpu",
)


def test_every_combination_is_checked_timed_and_written(tmp_path: Path) -> None:
    report, lines = sweep.run(TOY, tmp_path)
    [shape] = report["shapes"]
    cells = shape["cells"]
    assert [(c["query_clusters"], c["key_clusters"]) for c in cells] == [(5, 7), (5, 7), (5, 20), (5, 20)]
    assert [round(c["density"], 1) for c in cells] == [0.3, 0.6, 0.3, 0.6]
    assert all(c["results"]["reference"]["passed"] and c["results"]["reference"]["median_ms"] > 0 for c in cells)
    assert json.loads((tmp_path / sweep.RESULT).read_text()) == report
    assert sum("density" in line for line in lines) == 4


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = select("reference", torch.device("cpu"))

    def wrong(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right.attention(*given)
        return out * 1.1, lse

    monkeypatch.setattr(sweep, "select", lambda *_: right._replace(attention=wrong))
    report, lines = sweep.run(TOY, tmp_path)
    result = report["shapes"][0]["cells"][0]["results"]["reference"]
    assert not result["passed"]
    assert result["median_ms"] is None
    assert any("FAILED its check" in line for line in lines)


def test_the_command_fails_if_a_check_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["bench", "attention", "--device", "cpu", "--backends", "reference", "--repeats", "1", "--density", "0.3"]
    assert cli.main([*args, "--out", str(tmp_path / "a")]) == 0
    monkeypatch.setattr(sweep.checks, "ATTENTION_BOUND", -1.0)
    assert cli.main([*args, "--out", str(tmp_path / "b")]) == 1


def test_sides_are_grouped_and_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    side = sweep._side(SHAPES["toy"], 9, generator, torch.device("cpu"))
    assert bool((side.labels.diff(dim=-1) >= 0).all())
    assert side.offsets[:, -1].tolist() == [500, 500]
    for h in range(2):
        assert torch.equal(side.labels[h].bincount(minlength=9).int(), side.sizes[h])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "0.001"], "--density is 0.001; accepted: 0.02 .. 1"),
        (["--key-clusters", "501"], "--key-clusters is 501; accepted: 1 .. 500"),
        (["--peers", "flex"], "--peers is 'flex'; accepted: fa3, sdpa-cudnn, flashinfer-fa3"),
        (["--peers", "fa3"], "--peers is 'fa3', which can't run here"),
        (["--shape", "wan14b-720p"], "--shape is 'wan14b-720p', which takes a GPU"),
        (["--repeats", "0"], "--repeats is 0; accepted: 1 or more"),
        (["--backends", "cuda"], "backend is 'cuda'; accepted"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["bench", "attention", "--device", "cpu", *options, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
