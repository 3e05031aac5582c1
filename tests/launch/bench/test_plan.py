"""`semvid bench plan`: its recounts of finished plans, its traces, and the command as a person uses it."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semvid.launch import cli
from semvid.launch.bench import plan
from semvid.launch.bench.options import PlanOptions
from semvid.parallel.balance import Piece

KEYS = ["model", "layer", "world_size", "imbalance", "imbalance_contiguous", "imbalance_lpt", "traffic", "traffic_max"]
GOOD = {"model": "m", "layer": 3, "tokens": 5000, "heads": 3, "density": [0.5, 0.25, 1]}
TRACE = plan.Trace(model="m", layer=3, tokens=100, heads=3, density=(0.5, 0.25, 1.0))


def run(args: list[str]) -> int:
    try:
        return cli.main(["bench", "plan", *args])
    except SystemExit as stop:
        return int(stop.code or 0)


def last_line(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def write(empty: Path) -> Callable[..., str]:
    """Writes traces.json from the changes of one good trace each, and returns its name."""

    def write(*changes: dict[str, Any]) -> str:
        (empty / "traces.json").write_text(json.dumps({"source": "a test", "traces": [GOOD | c for c in changes]}))
        return "traces.json"

    return write


def test_loads_are_shared_by_query_rows() -> None:
    parts = [[Piece(0, 0, 100), Piece(1, 0, 40)], [Piece(1, 40, 100)], [Piece(2, 0, 100)], []]
    assert plan.loads(parts, TRACE, 0) == [0.5 * 100 * 100 + 0.25 * 100 * 40, 0.25 * 100 * 60, 100 * 100, 0]
    assert plan.loads(parts, TRACE, 7) == [6000 + 14, 1500 + 7, 10_000 + 7, 0]
    # Keys and values of each head that is held, query rows in and output rows out.
    assert plan.moved_rows(parts, 100) == [2 * 200 + 2 * 140, 200 + 120, 400, 0]


def test_whole_heads_in_equal_numbers_move_what_ulysses_moves() -> None:
    assert sum(plan.moved_rows([[Piece(0, 0, 100)], [Piece(1, 0, 100)], [Piece(2, 0, 100)]], 100)) == 4 * 3 * 100


def test_over_mean_of_nothing_is_one() -> None:
    assert plan.over_mean([3, 1, 2]) == 1.5
    assert plan.over_mean([0, 0]) == 1


@pytest.mark.parametrize(
    "parts",
    [
        [[Piece(0, 0, 100), Piece(1, 0, 100)], [Piece(2, 0, 99)]],
        [[Piece(0, 0, 100), Piece(1, 0, 100)], [Piece(2, 0, 60)], [Piece(2, 59, 100)]],
        [[Piece(0, 0, 100), Piece(1, 0, 100)], [Piece(2, 0, 60)], [Piece(2, 61, 100)]],
        [[Piece(0, 0, 100)], [Piece(2, 0, 100)]],
        [[Piece(0, 0, 100), Piece(1, 0, 100), Piece(1, 100, 100)], [Piece(2, 0, 100)]],
    ],
)
def test_a_plan_that_leaves_out_or_repeats_rows_is_found(parts: list[list[Piece]]) -> None:
    with pytest.raises(AssertionError, match="head|rows"):
        plan.check_cover(parts, TRACE)


def test_cluster_sizes_are_skewed_and_follow_from_the_shape_alone() -> None:
    sizes = plan.cluster_sizes(3, 300, 75_600)
    assert (sizes.shape, sizes.sum(1).tolist()) == ((3, 300), [75_600] * 3)
    assert (sizes.std(1) / sizes.mean(1) > 0.6).all()
    assert np.array_equal(sizes, plan.cluster_sizes(3, 300, 75_600))


def test_the_carried_traces_balance_and_the_last_line_is_json(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--world-sizes", "2,4", "8"]) == 0
    out, err = capsys.readouterr()
    plans = json.loads(out.splitlines()[-1])
    assert err == ""
    assert list(empty.iterdir()) == []
    assert len(plans) == 3 * len(plan.read_traces(PlanOptions().traces))
    assert {found["world_size"] for found in plans} == {2, 4, 8}
    for found in plans:
        assert list(found) == KEYS
        assert 1 <= found["imbalance"] <= 1.03
        assert found["imbalance"] <= found["imbalance_contiguous"]
        assert found["imbalance_lpt"] >= 1
        assert 1 <= found["traffic"] <= found["traffic_max"]
        if found["model"] == "Wan2.1-T2V-14B" and found["world_size"] == 4:
            assert found["traffic_max"] <= 1.15
    wan = [found["imbalance_contiguous"] for found in plans if found["model"] == "Wan2.1-T2V-14B"]
    assert statistics.mean(wan) > 1.1
    for word in ("imbalance", "contiguous", "longest first", "largest rank's", "planner, ms", "worst", "HunyuanVideo"):
        assert word in out


def test_with_json_the_table_goes_to_stderr(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--world-sizes", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert [list(found) for found in json.loads(out)] == [KEYS] * 11
    assert "planner, ms" in err


def test_figures_of_a_small_trace_by_hand(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    # Two equal heads on two ranks stay whole; on one rank there is nothing to share.
    name = write({"heads": 2, "density": [0.5, 0.5], "video": "ignored"})
    assert run(["--traces", name, "--world-sizes", "2,1"]) == 0
    two, one = last_line(capsys)
    assert list(two.values()) == ["m", 3, 2, 1, 1, 1, 1, 1]
    assert list(one.values()) == ["m", 3, 1, 1, 1, 1, 1, 1]


def test_one_head_on_two_ranks_sends_its_keys_twice(
    write: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--traces", write({"heads": 1, "density": [0.5]}), "--world-sizes", "2"]) == 0
    [found] = last_line(capsys)
    assert found["imbalance"] == pytest.approx(1, abs=0.03)
    assert (found["imbalance_contiguous"], found["imbalance_lpt"]) == (2, 2)
    # 2 x 2 N for keys and values, 2 N for queries and output, over 4 N.
    assert found["traffic"] == 1.5


def test_a_cost_by_piece_counts(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    name = write({"heads": 3, "density": [1, 1, 1]})
    assert run(["--traces", name, "--world-sizes", "2", "--piece-cost", str(10**12)]) == 0
    # Two pieces each: the one head that is cut counts twice. Whole heads: two and one.
    [found] = last_line(capsys)
    assert found["imbalance"] == pytest.approx(1, abs=1e-3)
    assert found["imbalance_lpt"] == pytest.approx(4 / 3, abs=1e-3)


def test_densities_of_zero_and_one_query_cluster(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    name = write({"density": [0, 0, 0.0]}, {"density": [0, 1, 0]})
    assert run(["--traces", name, "--world-sizes", "1,2,64", "--query-clusters", "1"]) == 0
    assert len(last_line(capsys)) == 6


def test_the_report_names_versions_commit_and_the_planners_time() -> None:
    report, _ = plan.run(PlanOptions(world_sizes=(2, 5)))
    assert {"versions", "commit", "device", "seed", "query_clusters"} <= set(report)
    assert list(report["planner_ms"]) == ["2", "5"]
    assert all(ms > 0 for ms in report["planner_ms"].values())


def test_figures_follow_from_the_options_alone() -> None:
    first, again, other = (
        plan.run(PlanOptions(world_sizes=(3,), query_clusters=n))[0]["plans"] for n in (300, 300, 30)
    )
    assert first == again != other


def test_torch_is_not_imported() -> None:
    code = "import sys; from semvid.launch.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    args = ["bench", "plan", "--world-sizes", "2", "--json"]
    subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True, timeout=120)


BAD_OPTIONS = [
    (["--traces", "missing.json"], "--traces is 'missing.json', which can't be read: no such file or directory"),
    (["--traces", "."], "--traces is '.', which can't be read: is a directory"),
    (["--world-sizes", "0"], "--world-sizes is '0'; accepted: whole numbers 1 .. 1024, such as 2,4,8"),
    (["--world-sizes", "2,-1"], "--world-sizes is '-1'; accepted: whole numbers 1 .. 1024"),
    (["--world-sizes", "2,x"], "--world-sizes is 'x'; accepted: "),
    (["--world-sizes", "2.5"], "--world-sizes is '2.5'; accepted: "),
    (["--world-sizes", "1025"], "--world-sizes is '1025'; accepted: "),
    (["--world-sizes", ","], "--world-sizes is ''; accepted: "),
    (["--query-clusters", "0"], "--query-clusters is 0; accepted: 1 or more"),
    (["--query-clusters", "200000"], "--query-clusters is 200000; accepted: 1 .. 108000, the tokens of the shortest"),
    (["--query-clusters", "x"], "--query-clusters: invalid int value: 'x'"),
    (["--piece-cost", "-1"], "--piece-cost is -1; accepted: 0 .. 10^15"),
    (["--trace", "x"], "unknown option '--trace'; did you mean --traces?"),
    (["x"], "unknown word 'x'; see semvid bench plan --help"),
]


@pytest.mark.parametrize(("args", "message"), BAD_OPTIONS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_options_are_one_line_and_exit_2(
    args: list[str], message: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def changed(**changes: Any) -> str:
    """A file of a good trace and a changed one; a change to None takes the key out."""
    trace = {key: value for key, value in (GOOD | changes).items() if value is not None}
    return json.dumps({"traces": [GOOD, trace]})


BAD_FILES = [
    ("", "which is no valid JSON: Expecting value"),
    ('{"traces": [', "which is no valid JSON: "),
    (b"\xff\xfe", "which is no valid JSON: 'utf-8' codec can't decode"),
    ("[]", 'which has no list "traces" with something in it; accepted: {"traces": [{"model", '),
    ("{}", 'which has no list "traces" with something in it; accepted: '),
    ('{"traces": []}', 'which has no list "traces" with something in it; accepted: '),
    ('{"traces": {"a": 1}}', 'which has no list "traces" with something in it; accepted: '),
    ('{"traces": [5]}', "whose traces[0] is 5; accepted: "),
    *((changed(**{key: None}), f"whose traces[1] has no '{key}'; accepted: ") for key in GOOD),
    (changed(model=5), "traces[1] has model 5; accepted: a text"),
    (changed(layer="3"), 'traces[1] has layer "3"; accepted: a whole number, 0 or more'),
    (changed(layer=True), "traces[1] has layer true; accepted: a whole number, 0 or more"),
    (changed(layer=-1), "traces[1] has layer -1; accepted: a whole number, 0 or more"),
    (changed(tokens=0), "traces[1] has tokens 0; accepted: a whole number, 1 .. 10000000"),
    (changed(tokens=5000.0), "traces[1] has tokens 5000.0; accepted: a whole number"),
    (changed(tokens=10**30), f"traces[1] has tokens {10**30}; accepted: a whole number"),
    (changed(heads=[3]), "traces[1] has heads [3]; accepted: a whole number, 1 or more"),
    (changed(heads=0, density=[]), "traces[1] has heads 0; accepted: a whole number, 1 or more"),
    (changed(heads=4), "traces[1] has density 3 numbers and heads 4; accepted: a number for each head"),
    (changed(density=0.5), "traces[1] has density 0.5 and heads 3; accepted: a number for each head"),
    (changed(density=[0.5, 1.2, 0]), "traces[1] has density[1] 1.2; accepted: 0 .. 1"),
    (changed(density=[0.5, 0.2, -0.1]), "traces[1] has density[2] -0.1; accepted: 0 .. 1"),
    (changed(density=[float("nan"), 0.2, 0.1]), "traces[1] has density[0] NaN; accepted: 0 .. 1"),
    (changed(density=[0.1, "x" * 80, 0.1]), f'traces[1] has density[1] "{"x" * 36}...; accepted: 0 .. 1'),
    (changed(density=[0.1, True, 0.1]), "traces[1] has density[1] true; accepted: 0 .. 1"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=[message[:60] for _, message in BAD_FILES])
def test_bad_traces_are_one_line_and_exit_2(
    content: str | bytes, message: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / "bad.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(["--traces", "bad.json"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("semvid: --traces is 'bad.json', wh")
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
