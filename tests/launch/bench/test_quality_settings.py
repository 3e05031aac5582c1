"""Settings files of `semvid bench quality`: what a table says, what is refused, and one measured beside svg2."""

from pathlib import Path

import pytest

from semvid.launch import cli
from semvid.launch.bench.quality import run as quality
from semvid.launch.bench.quality.methods import chosen, config_of, methods
from semvid.launch.bench.quality.report import is_curve, summary
from semvid.launch.bench.quality.settings import bases, read_settings
from semvid.runtime.settings import resolve

TWO = """
[methods.few]
p = 0.3
key_clusters = 30

[methods.more]
base = "svg2"
family = "wide"
p = 0.8
clusters = [{ tokens = 1000, query = 10, key = 40 }]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text)
    return path


def test_a_table_is_laid_over_its_base(tmp_path: Path) -> None:
    built_in = methods(1620)
    few, more = read_settings(written(tmp_path, TWO), built_in)
    assert (few.name, few.family, more.name, more.family) == ("few", "own", "more", "wide")
    (first,) = [method for method in built_in if method.name == "ours-0.1"]
    ours, svg2 = config_of(first), resolve(None, {"video": {"prompt": "-"}}, preset="svg2").attention
    assert config_of(few) == type(ours)(**{**_options(ours), "p": 0.3, "key_clusters": 30})
    assert config_of(more).p == 0.8
    assert config_of(more).refresh_every == svg2.refresh_every
    assert [(row.query, row.key) for row in config_of(more).clusters] == [(10, 40)]
    assert chosen([*built_in, few, more], ["wide", "own"]) == [few, more]


@pytest.mark.parametrize("name", ["balanced", "quality", "turbo"])
def test_a_base_is_the_whole_preset(name: str, tmp_path: Path) -> None:
    (found,) = read_settings(written(tmp_path, f"[methods.a]\nbase = '{name}'"), methods(1620))
    assert config_of(found) == resolve(None, {"video": {"prompt": "-"}}, preset=name).attention
    assert name in bases()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[methods.a", "which is no valid TOML"),
        ("", "holds no method; accepted: tables [methods.NAME]"),
        ("[method.a]", "holds 'method'; accepted: tables [methods.NAME]"),
        ("[methods]\na = 1", "methods.a is 1; accepted: a table of options"),
        ("[methods.'a b']", "methods.a b is no name; accepted: letters, digits"),
        ("[methods.a-0.5]", "methods.a-0 holds a table; accepted: options. A name with a dot is quoted"),
        ("[methods.dense]", "methods.dense is the name of a built-in method or family; accepted: another name"),
        ("[methods.'ours-0.1']", "methods.ours-0.1 is the name of a built-in method or family"),
        ("[methods.a]\nbase = 'mine'", "methods.a.base is 'mine'; accepted: ours, svg2, balanced, quality, turbo"),
        ("[methods.a]\nfamily = 'noise'", "methods.a.family is 'noise'; accepted: ours, svg2, own, or a new name"),
        ("[methods.a]\np = 2", "methods.a: attention.p is 2.0; accepted: 0 < p <= 1"),
        ("[methods.a]\nkey_cluster = 9", "methods.a: unknown option 'attention.key_cluster'"),
        ("[methods.a]\ntail = 'none'", "methods.a: attention.selection is 'error'; accepted: mass"),
        ("[methods.a]\nkey_clusters = 5000", "method a: attention.key_clusters is 5000; accepted: 1 .. 1620"),
    ],
)
def test_what_is_not_accepted_is_said_in_one_line(
    text: str, message: str, empty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, text)
    assert cli.main(["bench", "quality", "--settings", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(empty.iterdir()) == []


def test_a_file_that_is_not_there_is_said(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "quality", "--settings", "nowhere.toml"]) == 2
    assert "--settings is 'nowhere.toml', which can't be read" in capsys.readouterr().err


def test_settings_are_measured_beside_built_in_methods(tiny_model: Path, tmp_path: Path) -> None:
    words = ("svg2-p0.9", "own", "wide")

    def options(text: str) -> quality.Options:
        size, path = "17x64x96", written(tmp_path, text)
        return quality.as_options(
            str(tiny_model), size, steps=5, prompts=1, methods=words, probe_every=2, device="cpu", settings=path
        )

    report, lines = quality.run(options(TWO), tmp_path / "q", lambda line: None)
    assert [run["method"] for run in report["runs"]] == ["dense", "svg2-p0.9", "few", "more"]
    assert [run["family"] for run in report["runs"]] == ["dense", "svg2", "own", "wide"]
    assert report["runs"][2]["attention"]["key_clusters"] == 30
    assert any(line.startswith("few ") for line in lines)

    again, _ = quality.run(options(TWO), tmp_path / "q", lambda line: pytest.fail(line))
    assert again["runs"] == report["runs"]
    with pytest.raises(ValueError, match="--out holds a run of few with another p; accepted: another folder or name"):
        quality.run(options(TWO.replace("p = 0.3", "p = 0.4")), tmp_path / "q", lambda line: None)


def test_goals_are_read_off_every_curve() -> None:
    def run(method: str, family: str, density: float, psnr: float | None) -> dict[str, object]:
        rest = {"attention": {}, "prompt": 0, "calls": [{"layer": 1, "recall": 0.5, "error": 0.1}], "ssim": 1.0}
        rest |= {"density_all_calls": 1.0, "latent_error": 0.1, "seconds": 1.0, "phase_ms": {"cluster": 10.0}}
        return {"method": method, "family": family, "density": density, "psnr": psnr, **rest}

    runs = [
        run("svg2-p0.9", "svg2", 0.4, 30.0),
        run("svg2-p0.7", "svg2", 0.2, 20.0),
        run("a", "wide", 0.1, 28.0),
        # Worse than a, at more: no point of the front, or 30 dB would be read twice.
        run("b", "wide", 0.2, 26.0),
        run("c", "wide", 0.3, 32.0),
        # Dense bit for bit.
        run("d", "wide", 0.9, None),
        run("alone", "own", 0.1, 28.0),
        run("x", "clusters", 0.1, 28.0),
        run("y", "clusters", 0.3, 32.0),
    ]
    goals = summary({"runs": runs})["goals"]
    assert list(goals) == ["wide"]
    drawn = [family for family in dict.fromkeys(str(run["family"]) for run in runs) if is_curve(family)]
    assert drawn == ["svg2", "wide", "own"]
    assert goals["wide"]["density_at_svg2s_psnr"] == pytest.approx(0.2)
    assert goals["wide"]["psnr_over_svg2s"] is None


def _options(config: object) -> dict[str, object]:
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__}  # type: ignore[attr-defined]
