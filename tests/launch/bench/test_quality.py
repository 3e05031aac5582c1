"""`semvid bench quality`: a whole small run, going on with it, and what its figures mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from semvid.kernels.dispatch import select
from semvid.launch import cli
from semvid.launch.bench.quality import run as quality
from semvid.launch.bench.quality.baselines import by_blocks, by_exact_mass, exact_mass, fewest_keys
from semvid.launch.bench.quality.methods import chosen, config_of, methods
from semvid.launch.bench.quality.probe import compare, oracle_gap
from semvid.launch.bench.quality.report import goals
from semvid.runtime.attention.refresh import plans_of, refresh
from semvid.runtime.attention.schedule import Refresh
from semvid.runtime.attention.session import Position, Session
from semvid.runtime.config import AttentionConfig
from semvid.runtime.models import folder, published

SETTINGS = {"dense_steps": 0.0, "dense_layers": 0, "query_clusters": 5, "key_clusters": 12, "floor": 0.0, "p": 0.6}


def session(**attention: Any) -> Session:
    made = Session(AttentionConfig(**(SETTINGS | attention)), select("reference", torch.device("cpu")), 0)
    made.enter(Position(0, 10, "cond"))
    return made


def qkv(N: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 6, 16, generator=generator)
    q, k, v = (
        centers[:, torch.randint(6, (N,), generator=generator)] + torch.randn(3, N, 16, generator=generator)
        for _ in range(3)
    )
    return q, k, v


def test_a_small_run_reports_and_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    names = ("svg2-p0.9", "ours-0.1", "blocks-64-p0.9", "oracle-p0.9", "noise")
    options = quality.as_options(
        str(tiny_model), "17x64x96", steps=5, prompts=1, methods=names[:2], probe_every=2, device="cpu"
    )
    said: list[str] = []
    report, lines = quality.run(options, tmp_path / "q", said.append)
    assert [run["method"] for run in report["runs"]] == ["dense", *names[:2]]
    assert (len(said), report["tokens"], report["size"]) == (3, 120, "17x64x96")
    ours = report["runs"][2]
    assert 0 < ours["density"] < 1
    assert ours["psnr"] > 10
    # Two layers of three, two branches, of steps 1 and 3.
    assert [(call["step"], call["layer"], call["branch"]) for call in ours["calls"]] == [
        (step, layer, branch) for step in (1, 3) for branch in ("cond", "uncond") for layer in (1, 2)
    ]
    assert all(0 <= call["recall"] <= 1 for call in ours["calls"])
    assert {"seed", "cluster", "map", "means", "attend"} <= ours["phase_ms"].keys()
    assert any(line.startswith("ours-0.1 ") for line in lines)
    assert {path.suffix for path in (tmp_path / "q").iterdir()} == {".json", ".png", ".safetensors"}

    more = quality.as_options(str(tiny_model), "17x64x96", steps=5, prompts=1, methods=names, probe_every=2)
    again, _ = quality.run(more, tmp_path / "q", said.append)
    assert [run["method"] for run in again["runs"][3:]] == ["dense-other-backend", *names[2:4]]
    assert again["runs"][:3] == report["runs"]
    assert again["runs"][3]["density"] == 1.0
    assert json.loads((tmp_path / "q" / "quality.json").read_text()) == again

    other = quality.as_options(str(tiny_model), "17x64x96", steps=6, prompts=1, methods=names, probe_every=2)
    with pytest.raises(ValueError, match="--out holds a report of steps 5, not 6; accepted: another folder"):
        quality.run(other, tmp_path / "q", said.append)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "magic"], "--methods is 'magic'; accepted: noise, svg2, ours"),
        (["--size", "33x160"], "--size is '33x160'; accepted: frames x height x width, such as 33x160x288"),
        (["--size", "32x160x288"], "frames is 32; accepted: 4k + 1, nearest 29 and 33"),
        (["--prompts", "9"], "--prompts is 9; accepted: 1 .. 6"),
        (["--steps", "1"], "--steps is 1; accepted: 2 or more"),
        (["--probe-every", "0"], "--probe-every is 0; accepted: 1 or more"),
    ],
)
def test_bad_input_is_said_in_one_line(
    args: list[str], message: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "quality", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(empty.iterdir()) == []


def test_a_model_with_text_in_its_sequence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "inspect", lambda where: published.read("hunyuanvideo").geometry)
    options = quality.as_options("demo", "9x80x80", steps=2, prompts=1, device="cpu")
    with pytest.raises(ValueError, match="a model of HunyuanVideo .* has text in it; accepted: one of video tokens"):
        quality.check(options)


def test_every_method_is_a_setting_that_is_accepted() -> None:
    every = methods(1620)
    assert len({method.name for method in every}) == len(every)
    for method in every:
        config_of(method)
    assert [method.name for method in chosen(every, ["oracle", "svg2-p0.9"])] == ["svg2-p0.9", "oracle-p0.9"]


def test_exact_mass_is_the_softmax_summed_over_clusters() -> None:
    q, k, v = qkv()
    memory, _ = refresh(q, k, v, session(), 1, Refresh(3, seeded=True))
    weights = (q @ k.mT / 4).softmax(-1)
    found = exact_mass(q, k, memory.queries, memory.keys)
    for h, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(12)).tolist():
        rows, columns = memory.queries.labels[h] == i, memory.keys.labels[h] == j
        expected = weights[h][rows][:, columns].sum(1).mean() if rows.any() else torch.tensor(0.0)
        assert float(found[h, i, j]) == pytest.approx(float(expected), abs=1e-5)


def test_the_oracle_takes_the_fewest_keys_that_hold_p() -> None:
    mass = torch.tensor([[[0.5, 0.3, 0.1, 0.1]]])
    sizes = torch.tensor([[100, 10, 1, 0]], dtype=torch.int32)
    assert fewest_keys(mass, sizes, 0.3).selected.tolist() == [[[False, True, True, False]]]
    assert fewest_keys(mass, sizes, 0.6).selected.tolist() == [[[True, True, True, False]]]


def test_no_rule_needs_fewer_keys_than_the_oracle() -> None:
    q, k, v = qkv()
    memory, _ = refresh(q, k, v, session(), 1, Refresh(3, seeded=True))
    ratios = [x for of_rule in oracle_gap(q, k, memory).values() for x in of_rule.values() if x is not None]
    assert ratios
    assert all(0.99 < x < 3 for x in ratios)


@pytest.mark.parametrize("renew", [by_blocks(16), by_exact_mass])
def test_rivals_with_all_of_the_mass_are_dense(renew: Any) -> None:
    q, k, v = qkv()
    of_all = session(p=1.0)
    memory, _ = renew(q, k, v, of_all, 1, Refresh(1, seeded=True))
    order = [side.permutation.order for side in (memory.queries, memory.keys, memory.keys)]
    rows = [of_all.ops.gather_rows(x, by) for x, by in zip((q, k, v), order, strict=True)]
    out = of_all.ops.scatter_rows(of_all.ops.attention(*rows, plans_of(memory, of_all)[0])[0], order[0])
    recall, error = compare(q, k, v, out, memory, torch.arange(0, 150, 3))
    assert recall == pytest.approx(1.0, abs=1e-4)
    assert error < 1e-4


def test_recall_is_the_mass_on_selected_keys() -> None:
    q, k, v = qkv()
    some = session()
    memory, _ = refresh(q, k, v, some, 1, Refresh(3, seeded=True))
    recall, error = compare(q, k, v, torch.zeros_like(q), memory, torch.arange(150))
    mass = exact_mass(q, k, memory.queries, memory.keys)
    kept = torch.where(plans_of(memory, some)[0].block_map.selected, mass, 0.0).sum(-1)
    expected = (kept * memory.queries.sizes).sum(-1) / 150
    assert recall == pytest.approx(float(expected.mean()), abs=1e-4)
    assert error == pytest.approx(1.0)


def test_goals_are_read_off_the_front() -> None:
    names = ("method", "family", "density", "psnr", "error", "clustering_ms")

    def row(*values: Any) -> dict[str, Any]:
        return dict(zip(names, values, strict=True))

    rows = [
        row("svg2-p0.9", "svg2", 0.4, 30.0, 0.1, 200.0),
        row("a", "ours", 0.1, 28.0, 0.2, 10.0),
        row("b", "ours", 0.3, 32.0, 0.08, 30.0),
        row("c", "ours", 0.5, 36.0, 0.04, 20.0),
    ]
    found = goals(rows)
    assert found["density_of_svg2s"] == pytest.approx(0.2 / 0.4)
    assert found["psnr_over_svg2s"] == pytest.approx(4.0)
    assert found["error_of_svg2s"] == pytest.approx(0.6)
    assert found["clustering_of_svg2s"] == pytest.approx(0.1)
    assert goals(rows[:1] + rows[3:] + [row("d", "ours", 0.6, 37.0, 0.03, 20.0)])["density_of_svg2s"] is None
    assert goals(rows[1:]) == {}
