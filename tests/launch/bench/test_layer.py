"""`semvid bench layer` on gloo processes: every case is checked, timed by all ranks and reported."""

import importlib.util
import json
from pathlib import Path

import pytest

from semvid.launch import cli
from semvid.launch.bench.whole import layer

CASES = {"refresh", "reuse", "dense", "block, refresh", "block, reuse", "block, dense"}


def test_cases_of_one_and_two_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["--device", "cpu", "--gpus", "1,2", "--repeats", "2", "--warmup", "0", "--out", str(tmp_path), "--json"]
    args += ["--shape", "toy", "toy", "--density", "0.3", "0.6"]
    assert cli.main(["bench", "layer", *args]) == 0
    # The ranks' own lines too.
    out, err = capfd.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert report == json.loads((tmp_path / "layer.json").read_text())
    shape, denser = report["shapes"]
    assert denser["worlds"]["2"]["density"] > 1.5 * shape["worlds"]["2"]["density"]
    alone, both = (shape["worlds"][world] for world in ("1", "2"))
    assert {row["name"] for row in alone["rows"]} == CASES
    assert {row["name"] for row in both["rows"]} == CASES | {
        "refresh, contiguous",
        "refresh, longest first",
        "refresh, ring",
    }
    assert both["density"] == pytest.approx(alone["density"])
    for row in both["rows"]:
        assert 0 < row["ms_20"] <= row["median_ms"] <= row["ms_80"]
        assert shape["scaling"]["2"][row["name"]] > 0
        if row["name"].startswith(("refresh", "reuse")):
            assert row["error"] < 1e-2
            assert row["planned_imbalance"] >= 1
            assert len(row["phases_ms_of_ranks"]) == len(row["sent_bytes_of_ranks"]) == 2
            assert {"attend", "exchange", "return"} <= set(row["phases_ms"])
    assert "2 x  refresh, ring" in err
    assert "semvid: toy: 2 ranks: refresh, ring " in err
    assert (tmp_path / "layer.png").is_file() or "matplotlib is missing" in err


def made_up_report() -> dict[str, object]:
    rows = [
        {"name": name, "median_ms": 3.1, "phases_ms": {"plan on host": 0.5, "plan": 1.0, "attend": 2.0}}
        for name in ("refresh", "dense")
    ]
    shapes = [{"shape": name, "worlds": {"1": {"rows": rows}, "2": {"rows": rows}}} for name in ("a", "b")]
    return {"device": "CPU", "versions": {"torch": "0"}, "commit": "0", "shapes": shapes}


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert layer.plot(made_up_report(), tmp_path / "layer.png") is None
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_reason_and_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = layer.plot(made_up_report(), tmp_path / "layer.png")
    assert reason == "no plot: matplotlib is missing (pip install matplotlib)"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpus", "two"], "--gpus is 'two'; accepted: whole numbers with commas between"),
        (["--gpus", "0", "--device", "cpu"], "--gpus is 0; accepted: 1 or more"),
        (
            ["--shape", "wan14b-720p", "--device", "cpu"],
            "--shape is 'wan14b-720p', which takes GPUs; accepted on a CPU",
        ),
        (["--shape", "wan"], "--shape is 'wan'"),
        (["--density", "2"], "--density is 2"),
        (["--density", "0.3", "0.5"], "--density has 2 values for 1 shapes; accepted: one, or one for each shape"),
        (["--device", "cpu", "--usp"], "--usp can't run here: "),
        (["--device", "cpu", "--backend", "fast"], "backend is 'fast'"),
    ],
)
def test_bad_input_gets_one_line(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "layer", *args, "--out", str(tmp_path / "new")]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()
