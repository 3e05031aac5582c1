"""`semvid schedule`: the picture of a plan."""

import json
from pathlib import Path

import pytest

from semvid.launch import cli
from semvid.launch.commands.schedule import draw, kind, picture
from semvid.runtime.attention.schedule import plan
from semvid.runtime.config import AttentionConfig


def run(args: list[str]) -> int:
    return cli.main(["schedule", *args])


def test_the_picture_has_a_line_a_layer_and_a_letter_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--preset", "svg2", "--steps", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "svg2: 10 steps, 10 layers, attention.refresh fixed"
    assert lines[2:4] == ["layer 0   DDDDDDDDDD", "layer 1   DDSRRRRRRR"]
    assert [line.split()[2] for line in lines[12:]] == ["28", "9", "63", "0"]


def test_a_terminal_gets_colours() -> None:
    (row, *_) = picture(plan(AttentionConfig(), 3, 1), coloured=True)[1:]
    assert row == "layer 0   " + "\x1b[41;30mD\x1b[0m" * 3


def test_the_plan_of_a_configuration_as_json_and_as_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.toml"
    policy = "dense_layers = 0\nleast_dense_steps = 0\nrefresh = 'drift'\nrefresh_every = 2\n"
    file.write_text(f"[video]\nsteps = 8\n[attention]\n{policy}")
    out = tmp_path / "plan.png"
    assert run(["--config", str(file), "--json", "--out", str(out)]) == 0
    rows = json.loads(capsys.readouterr().out)["decisions"]
    assert rows == [["dense", "seed", "reuse", "refresh", "reuse", "reuse", "reuse", "refresh"]] * 10
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert run(["--config", str(file), "--json", "--drift", "0.5"]) == 0
    row = json.loads(capsys.readouterr().out)["decisions"][0]
    assert row == ["dense", "seed", "reuse", *["refresh"] * 5]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--drift", "2"], "--drift is 2.0; accepted: 0 .. 1"),
        (["--steps", "0"], "steps is 0; accepted: 1 or more"),
        (["--out", "plan.jpg"], "--out is 'plan.jpg'; accepted: a file that ends in .png"),
        (["--config", "no.toml"], "--config is 'no.toml', which can't be read"),
    ],
)
def test_bad_input_is_said_in_one_line(
    args: list[str], message: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_every_decision_has_a_look(tmp_path: Path) -> None:
    decisions = plan(AttentionConfig(refresh_every=3), 9, 2)
    assert {kind(what) for row in decisions for what in row} == {"dense", "seed", "refresh", "reuse"}
    with pytest.raises(ValueError, match="accepted: a file that ends in .png"):
        draw(decisions, "", tmp_path / "x.svg")
