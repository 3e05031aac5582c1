"""`semvid bench kernels`: its inputs, counts and checks, and the command as a person uses it."""

import importlib.util
import itertools
import json
import math
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from semvid.kernels import dispatch, reference
from semvid.kernels.layout import BlockMap
from semvid.launch import cli
from semvid.launch.bench import options, timing, workload
from semvid.launch.bench.kernels import cases, checks, peers
from semvid.launch.bench.kernels import run as kernels
from semvid.launch.bench.kernels.checks import Check
from semvid.launch.bench.kernels.report import Row, compared, summary, table
from semvid.launch.bench.options import PEERS, SHAPES, Options, Shape

CPU = torch.device("cpu")
SHORT = ["--repeats", "2", "--warmup", "0", "--device", "cpu"]
MIDDLE = Shape(name="middle", model="Wan2.1-T2V-14B", heads=4, head_dim=16, tokens=6000)


@pytest.fixture(scope="module")
def middle() -> workload.Workload:
    config = options.attention_config(Options(query_clusters=40, key_clusters=150), MIDDLE)
    return workload.make(MIDDLE, config, 0.3, 0, CPU)


@pytest.fixture(scope="module")
def toy() -> cases.Cases:
    config = options.attention_config(Options(), SHAPES["toy"])
    return cases.Cases(workload.make(SHAPES["toy"], config, 0.3, 0, CPU), dispatch.select("reference", CPU))


def run(args: list[str]) -> int:
    try:
        return cli.main(["bench", *args])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
@pytest.mark.parametrize("mean", [0.02, 0.1, 0.3, 0.7, 1.0])
def test_head_densities_have_the_wanted_mean_and_stay_uneven(shape: Shape, mean: float) -> None:
    density = workload.head_densities(shape, mean)
    assert density.shape == (shape.heads,)
    assert density.mean().item() == pytest.approx(mean, abs=1e-6)
    assert 0.02 <= density.min() <= density.max() <= 1
    if mean == 0.3:
        assert density.max() > 3 * density.min()


def test_a_models_own_heads_are_taken_as_recorded() -> None:
    # The first trace of Wan 14B has a mean of 0.3009 already.
    density = workload.head_densities(SHAPES["wan14b-720p"], 0.3009)
    assert density[:4].tolist() == pytest.approx([0.101, 0.104, 0.104, 0.59], abs=1e-3)


def test_clusters_are_as_uneven_as_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = workload.clustered_rows(30 * torch.randn(1, 1000, 16, generator=generator), 75_600, generator)
    assert (rows.dtype, rows.shape) == (torch.bfloat16, (1, 75_600, 16))
    generator.manual_seed(0)
    means = 30 * torch.randn(1, 1000, 16, generator=generator)
    sizes = reference.assign(rows, means).flatten().bincount(minlength=1000)
    assert sizes.float().std() / sizes.float().mean() > 0.7
    # What padding clusters to 64 and 128 keys wastes on Wan's own: 42-49 and 73-107 %.
    for multiple, low, high in ((64, 0.38, 0.50), (128, 0.73, 1.10)):
        assert low < (-(-sizes // multiple) * multiple).sum().item() / 75_600 - 1 < high


def test_the_map_has_the_wanted_densities_and_its_rows_differ(middle: workload.Workload) -> None:
    sizes = middle.queries.sizes, middle.keys.sizes
    found = reference.density(middle.block_map, *sizes)
    wanted = workload.head_densities(MIDDLE, 0.3)
    assert found.double().sub(wanted).abs().max() < 0.01
    selected = middle.block_map.selected
    taken = (selected * middle.keys.sizes[:, None, :]).sum(-1) / MIDDLE.tokens
    assert (taken.std(-1) / taken.mean(-1) > 0.1).all()
    assert not (selected & (middle.keys.sizes == 0)[:, None, :]).any()
    assert selected.any(-1).all()


def test_inputs_follow_from_the_seed_alone() -> None:
    config = options.attention_config(Options(), SHAPES["toy"])
    a, b, c = (workload.make(SHAPES["toy"], config, 0.3, seed, CPU) for seed in (1, 1, 2))
    assert torch.equal(a.q, b.q)
    assert torch.equal(a.block_map.selected, b.block_map.selected)
    assert not torch.equal(a.q, c.q)


@pytest.mark.parametrize(("Cq", "Ck"), [(1, 1), (5, 9), (16, 3)])
def test_pairs_are_counted_as_by_brute_force(Cq: int, Ck: int) -> None:
    generator = torch.Generator().manual_seed(Cq)
    q_sizes = torch.randint(0, 20, (2, Cq), generator=generator, dtype=torch.int32)
    k_sizes = torch.randint(0, 9, (2, Ck), generator=generator, dtype=torch.int32)
    selected = torch.rand(2, Cq, Ck, generator=generator) < 0.5
    computed = padded = halved = 0
    for h, i in itertools.product(range(2), range(Cq)):
        n = int(q_sizes[h, i])
        keys = sum(int(k_sizes[h, j]) for j in range(Ck) if selected[h, i, j])
        computed += n * keys
        tiles = -(-keys // 4)
        padded += -(-n // 8) * 8 * tiles * 4
        rest = n % 8
        halved += (n - rest + (0 if rest == 0 else 4 if rest <= 4 else 8)) * tiles * 4
    given = (BlockMap(selected), q_sizes, k_sizes)
    assert workload.computed_pairs(*given) == computed
    assert workload.padded_pairs(*given, rows=8, keys=4) == padded
    assert workload.padded_pairs(*given, rows=8, keys=4, halve=True) == halved


def test_flops_are_counted_per_computed_pair(toy: cases.Cases) -> None:
    w = toy.work
    computed = sum(
        w.block_map.selected[h, i, j].item()
        for h in range(2)
        for i, j in itertools.product(w.queries.labels[h, :50].tolist(), w.keys.labels[h].tolist())
    )
    rows = [torch.bincount(w.queries.labels[h, :50], minlength=w.queries.sizes.shape[1]) for h in range(2)]
    assert workload.computed_pairs(w.block_map, torch.stack(rows), w.keys.sizes) == computed
    assert toy.dense_flops == 4 * 64 * 2 * 500**2
    assert 0.25 < toy.flops / toy.dense_flops < 0.35
    assert toy.assign("k").useful_flops == 2 * 2 * 500 * 124 * 64


def test_percentiles_lie_between_neighbours() -> None:
    assert timing.percentile([5.0], 0.8) == 5
    assert timing.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert timing.percentile(list(map(float, range(11))), 0.2) == 2
    assert timing.percentile([1.0, 2.0], 1.0) == 2


def test_what_takes_long_is_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.03)
    calls = []
    times = timing.time_call(lambda: calls.append(time.sleep(0.01)), CPU, warmup=2, repeats=30)
    assert (times.repeats, len(calls)) == (5, 5 + 2 + 1)
    assert times.ms_20 <= times.median_ms <= times.ms_80
    assert times.median_ms >= 10
    assert (times.host_ms, times.waits, times.peak_bytes) == (None, None, None)
    assert timing.time_call(lambda: None, CPU, warmup=0, repeats=3).repeats == 3


def test_a_call_and_its_part_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.03)
    calls: list[str] = []

    def take(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    whole, part = (lambda: take("whole", 0.015)), (lambda: take("part", 0.005))
    extra = timing.time_extra(whole, part, CPU, warmup=1, repeats=30)
    assert extra.pairs == 5
    assert calls == ["whole", "part"] * (5 + 1 + 1)
    assert extra.ms_20 <= extra.median_ms <= extra.ms_80
    assert extra.median_ms == pytest.approx(10, abs=4)


def test_a_check_fails_on_nan_and_names_the_worst() -> None:
    assert not Check("x", math.nan, 1.0).passed
    assert checks.worst(Check("a", 0.5, 1.0), Check("b", 1e-3, 1e-3)).what == "b"
    assert checks.worst(Check("a", 0.9, 1.0), Check("b", math.nan, 1.0)).what == "b"


def test_every_op_of_the_reference_passes_its_check(toy: cases.Cases) -> None:
    for name, make in toy.sources().items():
        case = make()
        with checks.poisoned_memory():
            result = case.call()
        assert case.name == name
        assert case.check(result).passed, case.check(result)


def test_checks_find_what_is_wrong(toy: cases.Cases) -> None:
    w, plan = toy.work, toy.make_plan()
    out, lse = toy.attend(plan)
    gap = out.clone()
    gap[1, 321, 5] = math.nan
    assert not checks.check_rows(gap, lse, toy.truth).passed
    assert not checks.check_rows(out * 1.02, lse, toy.truth).passed
    assert not checks.check_rows(out, lse + 0.02, toy.truth).passed
    assert not checks.check_rows(out.roll(1, 1), lse, toy.truth).passed
    labels = reference.assign(w.k, w.k_starts)
    assert checks.check_labels(w.k, w.k_starts, labels).passed
    assert not checks.check_labels(w.k, w.k_starts, labels.roll(1, 1)).passed
    assert not checks.check_labels(w.k, w.k_starts, torch.where(labels == 3, 124, labels)).passed
    sums, counts = reference.cluster_sums(w.k, labels, 124)
    assert not checks.check_sums(w.k, labels, sums * 1.001, counts).passed
    assert not checks.check_sums(w.k, labels, sums, counts.roll(1, 1)).passed
    order = w.keys.permutation.order
    assert not checks.check_moved(w.k, order, w.k).passed
    assert not checks.check_moved(w.k, order, reference.gather_rows(w.k, order), scatter=True).passed


def test_the_check_of_norm_and_rotary_finds_what_is_wrong(toy: cases.Cases) -> None:
    given = workload.project(toy.work)
    assert given.q.shape == (1, 500, 2 * 64)
    rest = given.weight, workload.NORM_EPS, given.cosines, given.sines
    out = toy.ops.norm_rotary(given.q, *rest, 2)
    assert checks.check_turned(given.q, *rest, out).passed
    gap = out.clone()
    gap[1, 321, 5] = math.nan
    flat, back = torch.ones_like(given.weight), -given.sines
    for wrong in (
        gap,
        out.roll(1, 0),
        out.roll(1, 1),
        toy.ops.norm_rotary(given.q, flat, *rest[1:], 2),
        toy.ops.norm_rotary(given.q, *rest[:3], back, 2),
        toy.ops.norm_rotary(given.k, *rest, 2),
    ):
        assert not checks.check_turned(given.q, *rest, wrong).passed


def test_poison_shows_what_is_not_written_and_is_taken_away() -> None:
    before = torch.empty, torch.empty_like
    with checks.poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert (torch.empty_like(torch.zeros(2, dtype=torch.int32)) == -7777).all()
    assert (torch.empty, torch.empty_like) == before


def test_an_op_whose_check_fails_is_not_timed_and_the_exit_code_is_1(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("no such\nkernel")

    wrong = {"gather_rows": lambda x, order: x.clone(), "density": raises}
    wrong["assign"] = lambda x, centroids: torch.empty(x.shape[:2], dtype=torch.int32)
    ops = dispatch.select("reference", CPU)._replace(**wrong)
    monkeypatch.setattr(kernels, "select", lambda *_: ops)
    assert run(["kernels", *SHORT, "--peers", "none", "--out", "x", "--json"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    rows = {row["name"]: row for row in report["shapes"][0]["rows"]}
    assert report["state"] == "failed"
    for name in ("gather k", "assign q", "iteration k", "density"):
        assert f"toy: {name}" in report["failed"]
        assert rows[name]["median_ms"] is None
        assert f"{name}: not timed: " in err
    assert rows["gather k"]["problem"].startswith("its check failed: elements that differ: 1.0e+00")
    assert rows["density"]["problem"] == "RuntimeError: no such kernel"
    assert "out of range" in rows["assign q"]["problem"]
    for name in ("attention", "plan", "group k", "scatter out"):
        assert rows[name]["median_ms"] > 0
    assert "FAILED   toy: assign q" in err


def test_the_toy_runs_on_a_cpu_in_seconds(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kernels", *SHORT, "--out", "here", "--json", "--density", "0.4"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert json.loads((empty / "here/bench.json").read_text()) == report
    assert (report["state"], report["failed"], report["bench"]) == ("done", [], "kernels")
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"].startswith("CPU")
    [shape] = report["shapes"]
    assert (shape["shape"], shape["tokens"], shape["backend"]) == ("toy", 500, "reference")
    assert (shape["query_clusters"], shape["key_clusters"]) == (25, 124)
    assert shape["density"] == pytest.approx(0.4, abs=0.01)
    rows = {row["name"]: row for row in shape["rows"]}
    timed = {name for name, row in rows.items() if row["median_ms"] is not None}
    ops = {"assign k", "cluster_sums k", "iteration k", "top_p_map", "group k", "gather v", "plan", "attention"}
    ops |= {"norm_rotary", "scatter out", "permute all", "refresh", "reuse"}
    assert ops | {"sdpa-flash", "torch.gather k"} <= timed
    assert rows["eager norm_rotary"]["times_ours"] > 0
    # q and k in and out, bf16; a weight and two fp32 tables for each of the two.
    moved = 2 * (2 * 2 * 500 * 2 * 64 + 2 * 2 * 64 + 2 * 4 * 500 * 64)
    assert rows["norm_rotary"]["gb_s"] == pytest.approx(moved / rows["norm_rotary"]["median_ms"] / 1e6)
    for name in timed:
        assert rows[name]["check"]["passed"]
        assert rows[name]["ms_20"] <= rows[name]["median_ms"] <= rows[name]["ms_80"]
    assert rows["sdpa-cudnn"]["problem"] == "it needs an NVIDIA GPU"
    assert shape["dense_backend"] == "sdpa-flash"
    flash = rows["attention"]["of_dense"]["sdpa-flash"]
    assert flash == pytest.approx(rows["attention"]["useful_tflops"] / rows["sdpa-flash"]["useful_tflops"])
    assert shape["summary"]["attention_of_dense"] == {"sdpa-flash": flash}
    for name in ("refresh", "reuse"):
        paired = rows[name]["beside_attention"]
        assert shape["summary"][f"{name}_beside_attention"] == paired
        assert (paired["pairs"], paired["ms_20"] <= paired["median_ms"] <= paired["ms_80"]) == (2, True)
    assert rows["attention"]["beside_attention"] is None
    for word in ("toy: making inputs", "  attention  ", "of copy", "check", "reuse takes", "results  here/bench.json"):
        assert word in err
    found = sorted(path.name for path in (empty / "here").iterdir())
    assert found == ["bench.json", "toy.png"] if importlib.util.find_spec("matplotlib") else ["bench.json"]


def test_several_shapes_in_one_call(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Shape(name="other", model="Wan2.1-T2V-14B", heads=3, head_dim=32, tokens=257)
    monkeypatch.setitem(SHAPES, "other", other)
    monkeypatch.setattr(options, "CPU_SHAPES", ("toy", "other"))
    args = ["kernels", *SHORT, "--peers", "torch-rotary,torch-permute", "--out", "here", "--json"]
    assert run([*args, "--shape", "toy", "other", "toy"]) == 0
    out, err = capsys.readouterr()
    shapes = json.loads(out.splitlines()[-1])["shapes"]
    assert [(shape["shape"], shape["tokens"], shape["heads"]) for shape in shapes] == [
        ("toy", 500, 2),
        ("other", 257, 3),
    ]
    names = [[row["name"] for row in shape["rows"]] for shape in shapes]
    assert names[0] == names[1]
    assert all(row["check"]["passed"] and row["median_ms"] > 0 for shape in shapes for row in shape["rows"])
    for line in ("toy: 2 heads x 500 tokens x 64", "other: 3 heads x 257 tokens x 32"):
        assert line in err


def test_without_matplotlib_one_line_says_how_to_get_it(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert run(["kernels", *SHORT, "--peers", "none"]) == 0
    assert "no plot: matplotlib is missing (pip install matplotlib)" in capsys.readouterr().out
    [folder] = (empty / "semvid-jobs").iterdir()
    assert folder.name.startswith("bench-")
    assert [path.name for path in folder.iterdir()] == ["bench.json"]


BAD = [
    (["kernels", "--shape", "wan14b-720"], "--shape is 'wan14b-720'; accepted: wan1.3b-480p, "),
    (["kernels", "--shape", "wan14b-720"], "did you mean 'wan14b-720p'?"),
    (["kernels", "--device", "cpu", "--shape", "toy,wan14b-720p"], "which takes a GPU; accepted on a CPU: toy"),
    (["kernels", "--peers", "fa4"], "--peers is 'fa4'; accepted: all, none, sdpa-cudnn, "),
    (["kernels", "--peers", "none,fa3"], "--peers is 'none' beside other names"),
    (["kernels", "--device", "cpu", "--peers", "sdpa-cudnn"], "which can't run here: it needs an NVIDIA GPU"),
    (["kernels", "--density", "0.001"], "--density is 0.001; accepted: 0.02 .. 1"),
    (["kernels", "--density", "nan"], "--density is nan; accepted: 0.02 .. 1"),
    (["kernels", "--key-clusters", "0"], "--key-clusters is 0; accepted: 1 or more"),
    (["kernels", "--device", "cpu", "--query-clusters", "501"], "--query-clusters is 501; accepted: 1 .. 500"),
    (["kernels", "--repeats", "0"], "--repeats is 0; accepted: 1 or more"),
    (["kernels", "--warmup", "-1"], "--warmup is -1; accepted: 0 or more"),
    (["kernels", "--seed", "-1"], "--seed is -1; accepted: 0 .. 2^63 - 1"),
    (["kernels", "--shpe", "toy"], "unknown option '--shpe'; did you mean --shape?"),
    (["kernels", "toy"], "unknown word 'toy'; see semvid bench kernels --help"),
    (["kernel"], "invalid choice: 'kernel'"),
    (["kernels", "--device", "cpu", "--out", "/proc/semvid/x"], "--out is '/proc/semvid/x', which can't be written"),
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


def test_results_are_not_overwritten(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "bench.json").write_text("mine")
    assert run(["kernels", *SHORT, "--out", "."]) == 2
    assert "already holds a bench.json" in capsys.readouterr().err
    assert (empty / "bench.json").read_text() == "mine"


def test_bench_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "kernels" in capsys.readouterr().out
    assert run(["kernels", "--help"]) == 0
    # Lines may end within a name, at its hyphens.
    text = "".join(capsys.readouterr().out.split())
    assert all(name in text for name in [*SHAPES, *PEERS])


def test_ctrl_c_ends_with_130_and_leaves_what_was_measured(tmp_path: Path) -> None:
    args = ["bench", "kernels", "--device", "cpu", "--repeats", "1000000", "--peers", "none"]
    args += ["--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "semvid.launch.cli", *args], stderr=subprocess.PIPE, text=True)
    result = tmp_path / "out/bench.json"
    for _ in range(600):
        if result.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in shown
    report = json.loads(result.read_text())
    assert report["state"] == "interrupted"
    assert report["shapes"][0]["rows"][0]["name"] == "norm_rotary"


def test_every_peer_has_its_cases() -> None:
    assert set(peers._MAKERS) == set(PEERS)
    assert peers.version("sdpa-flash") == f"torch {torch.__version__}"


def test_a_peer_that_raises_becomes_one_line(
    toy: cases.Cases, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(ours: cases.Cases) -> Any:
        yield cases.Case(name="good", call=lambda: 1, check=lambda _: Check("x", 0, 0))
        yield cases.Case(name="wrong", call=lambda: 1, check=lambda _: Check("x", 1, 0))
        raise OSError("nvcc\nis missing")

    monkeypatch.setitem(peers._MAKERS, "flashinfer-fa3", half)
    asked = {"flashinfer-fa3": None, "torch-permute": None}
    rows = list(kernels._rows(toy, Options(repeats=2, warmup=0), asked))[len(toy.sources()) :]
    assert [row.name for row in rows] == ["good", "wrong", "flashinfer-fa3", "torch.sort k", "torch.gather k"]
    assert rows[1].problem == "its check failed: x: 1.0e+00 EXCEEDS 0.0e+00"
    assert rows[2].problem == "OSError: nvcc is missing"
    assert [rows[i].problem for i in (0, 3, 4)] == [None] * 3
    assert rows[0].times is not None
    assert rows[1].times is None
    assert "  flashinfer-fa3: OSError: nvcc is missing\n" in capsys.readouterr().err


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_peers_are_called_as_their_packages_want_it(toy: cases.Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stand-ins with the real packages' signatures and layouts, so that the adapters run without a GPU.
    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape == (1, 500, 2, 64)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    class Wrapper:
        def __init__(self, workspace: torch.Tensor, backend: str = "auto") -> None:
            assert backend in ("fa2", "fa3")

        def plan(
            self, block_map: Any, rows: Any, columns: Any, Hq: int, Hk: int, D: int, *, q_data_type: torch.dtype
        ) -> None:
            assert (Hq, Hk, D, q_data_type) == (2, 2, 64, torch.bfloat16)
            offsets = [torch.nn.functional.pad(x.cumsum(-1), (1, 0)).int() for x in (rows, columns)]
            self.planned = reference.plan(*offsets, BlockMap(block_map))

        def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return reference.attention(q, k, v, self.planned)[0]

    def euclid_assign_triton(x: torch.Tensor, centroids: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        assert (norms.shape, centroids.dtype) == (x.shape[:2], x.dtype)
        return reference.assign(x, centroids.float())

    def _euclid_iter(x: Any, norms: Any, centroids: Any) -> tuple[Any, Any, Any]:
        return centroids, None, euclid_assign_triton(x, centroids, norms)

    stub(monkeypatch, "fa3_fwd_interface", flash_attn_func=flash_attn_func)
    stub(monkeypatch, "flashinfer", VariableBlockSparseAttentionWrapper=Wrapper)
    stub(monkeypatch, "flash_kmeans")
    stub(monkeypatch, "flash_kmeans.assign_euclid_triton", euclid_assign_triton=euclid_assign_triton)
    stub(monkeypatch, "flash_kmeans.kmeans_triton_impl", _euclid_iter=_euclid_iter)
    ours = set(toy.sources())
    names = []
    for peer in ("fa3", "flashinfer-fa2", "flashinfer-fa3", "flash-kmeans", "sdpa-flash"):
        for case in peers.cases(peer, toy):
            assert case.check(case.call()).passed, case.name
            assert case.beside in ours
            names.append(case.name)
    assert names[:3] == ["fa3", "flashinfer-fa2 run", "flashinfer-fa2 plan"]
    assert "flash-kmeans iteration k" in names


def test_flex_attention_gets_the_tiles_that_the_map_touches(toy: cases.Cases) -> None:
    w = toy.work
    mask = peers.flex_mask(toy)
    touched, full = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2, 4, 4, dtype=torch.bool)
    for h in range(2):
        q_cluster = w.queries.labels[h][w.queries.permutation.order[h].long()].long()
        k_cluster = w.keys.labels[h][w.keys.permutation.order[h].long()].long()
        pairs = w.block_map.selected[h, q_cluster][:, k_cluster]
        for i, j in itertools.product(range(4), range(4)):
            tile = pairs[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            touched[h, i, j], full[h, i, j] = tile.any(), tile.all()
    assert torch.equal(mask.to_dense()[0].bool(), touched)
    assert torch.equal(mask.full_kv_num_blocks[0], full.sum(-1, dtype=torch.int32))
    [case] = peers.cases("flex", toy)
    assert case.check(case.call()).passed


def test_rows_are_compared_with_dense_copy_and_ours() -> None:
    def times(ms: float) -> timing.Times:
        return timing.Times(ms, ms, ms, 5, 0.1, False, 1 << 20)

    rows = [
        Row(name="attention", useful_flops=3 * 10**12, times=times(10)),
        Row(name="gather k", moved_bytes=10**9, times=times(1)),
        Row(name="refresh", times=times(15), extra=timing.Extra(4.5, 4.25, 4.75, 7)),
        Row(name="fa3", peer="fa3", useful_flops=10**13, beside="attention", dense=True, times=times(20)),
        Row(name="flex", peer="flex", problem="it is slow", beside="attention"),
    ]
    found = compared(rows, copy_gb_s=2000)
    assert (found[0]["useful_tflops"], found[0]["of_dense"]) == (300, {"fa3": 0.6})
    assert (found[1]["gb_s"], found[1]["of_copy"], found[1]["of_dense"]) == (1000, 0.5, {})
    assert (found[3]["times_ours"], found[4]["median_ms"]) == (2, None)
    assert summary(found)["refresh_beside_attention_ms"] == 5
    shape = {"shape": "s", "heads": 1, "tokens": 1, "head_dim": 1, "query_clusters": 1, "key_clusters": 1}
    shape |= {"query_sizes": [1, 1, 1], "key_sizes": [1, 1, 1], "density": 0.3, "head_densities": [0.3]}
    shape |= {"backend": "triton", "copy_gb_s": 2000, "rows": found, "summary": summary(found)}
    text = table(shape)
    assert "attention runs at 0.60 of fa3's rate" in text
    assert "refresh (2 iterations) takes 4.50 ms (4.25 - 4.75, 7 pairs) beside attention" in text
    assert not any("reuse takes" in line for line in text)
    assert "flex: not timed: it is slow" in text


@pytest.mark.gpu
def test_on_a_gpu_every_op_passes_its_check_and_is_timed(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["kernels", "--shape", "toy", "--backend", "triton", "--peers", "sdpa-flash,torch-permute", "--json"]
    assert run([*args, "--repeats", "5"]) == 0
    [shape] = json.loads(capsys.readouterr().out.splitlines()[-1])["shapes"]
    rows = {row["name"]: row for row in shape["rows"]}
    assert all(row["median_ms"] > 0 and row["peak_bytes"] >= 0 for row in rows.values())
    # No op of ours, nor the whole call, waits for the device.
    assert not any(row["waits"] for row in rows.values() if row["peer"] is None)
    assert rows["attention"]["executed_tflops"] > rows["attention"]["useful_tflops"]
