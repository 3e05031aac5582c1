import dataclasses
from pathlib import Path
from typing import Any

import pytest

from semvid.kernels import top_p
from semvid.kernels.limits import MAX_KEY_CLUSTERS, most_rows
from semvid.runtime import settings
from semvid.runtime.config import AttentionConfig, ClusterCounts, Config, check_tokens, cluster_counts, has_anchors
from semvid.runtime.settings import measured, resolve

PROMPT = {"video": {"prompt": "a ball"}}


def resolved(**tables: Any) -> Config:
    return resolve(tables, PROMPT)


def test_later_layers_win_over_earlier_ones() -> None:
    checkpoint = {"video": {"frames": 33, "height": 160, "width": 288}}
    file = {"preset": "svg2", "video": {"height": 320, "width": 320}, "attention": {"p": 0.8}}
    options = {"video": {"width": 640, "prompt": "a ball"}}
    config = resolve(file, options, checkpoint=checkpoint)
    assert (config.video.frames, config.video.height, config.video.width) == (33, 320, 640)
    assert (config.attention.p, config.attention.floor, config.video.fps) == (0.8, 0.1, 16)


def test_a_preset_on_the_command_line_replaces_the_files_attention() -> None:
    config = resolve({"preset": "svg2", "attention": {"p": 0.8}}, PROMPT, preset="dense")
    assert (config.preset, config.attention.method, config.attention.p) == ("dense", "dense", 0.9)


def test_the_svg2_preset_is_the_authors() -> None:
    a = resolved().attention
    assert (a.p, a.floor, a.dense_steps, a.dense_layers, a.first_iterations, a.iterations) == (0.9, 0.1, 0.2, 1, 50, 2)
    assert [cluster_counts(a, n) for n in (75_600, 118_800, 32_760)] == [(300, 1000), (400, 1000), (200, 1000)]


@pytest.mark.parametrize(("tokens", "counts"), [(1, (1, 1)), (16, (4, 16)), (1620, (44, 222)), (72_000, (300, 1000))])
def test_counts_shrink_with_the_square_root_below_the_table_and_never_exceed_the_tokens(
    tokens: int, counts: tuple[int, int]
) -> None:
    assert cluster_counts(resolved().attention, tokens) == counts


def test_a_table_row_in_the_middle_is_not_scaled() -> None:
    table = (ClusterCounts(tokens=100, query=5, key=10), ClusterCounts(tokens=1000, query=50, key=90))
    attention = AttentionConfig(clusters=table)
    assert [cluster_counts(attention, n) for n in (25, 120, 900, 9000)] == [(2, 5), (5, 10), (50, 90), (50, 90)]


def test_fixed_counts_override_the_table_and_may_not_exceed_the_tokens() -> None:
    attention = AttentionConfig(query_clusters=7, key_clusters=100)
    assert cluster_counts(attention, 100) == (7, 100)
    with pytest.raises(ValueError, match=r"attention.key_clusters is 100; accepted: 1 .. 99, the tokens"):
        cluster_counts(attention, 99)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"checkpoint_steps": -1}, "job.checkpoint_steps is -1; accepted: 0 or more"),
        ({"checkpoint_seconds": -0.5}, "job.checkpoint_seconds is -0.5; accepted: 0 or more"),
        ({"checkpoint_steps": 2.5}, "job.checkpoint_steps is 2.5; accepted: a whole number"),
        ({"checkpoints": 2}, "unknown option 'job.checkpoints'; accepted: checkpoint_steps, checkpoint_seconds"),
    ],
)
def test_checkpoints_that_cannot_be_are_refused(job: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(job=job)
    assert resolved(job={"checkpoint_steps": 0, "checkpoint_seconds": 0}).job.checkpoint_steps == 0


def test_toml_written_is_read_back_equal(tmp_path: Path) -> None:
    config = resolved(attention={"query_clusters": 3, "p": 1.0}, video={"guidance": 2})
    (tmp_path / "job.toml").write_text(settings.to_toml(config))
    assert settings.resolved(tmp_path / "job.toml") == config
    assert resolve(settings.read_toml(tmp_path / "job.toml", "--config"), {}) == config


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"vidoe": {}}, r"unknown option 'vidoe'.*did you mean 'video'\?"),
        ({"video": {"promt": "x"}}, r"unknown option 'video.promt'.*did you mean 'prompt'\?"),
        ({"attention": {"p": 0}}, r"attention.p is 0.0; accepted: 0 < p <= 1"),
        ({"attention": {"p": 1.01}}, r"attention.p is 1.01; accepted: 0 < p <= 1"),
        ({"attention": {"p": float("nan")}}, r"attention.p is nan"),
        ({"attention": {"p": "high"}}, r"attention.p is 'high'; accepted: a number"),
        ({"attention": {"floor": -0.1}}, r"attention.floor is -0.1; accepted: 0 .. 1"),
        ({"attention": {"query_clusters": 0}}, r"attention.query_clusters is 0; accepted: 1 or more"),
        ({"attention": {"key_clusters": -4}}, r"attention.key_clusters is -4; accepted: 1 .. 8192"),
        ({"attention": {"iterations": True}}, r"attention.iterations is True; accepted: a whole number"),
        ({"attention": {"clusters": []}}, r"attention.clusters is \[\]; accepted: at least one row"),
        ({"attention": {"clusters": [{"tokens": 9, "query": 0, "key": 1}]}}, r"attention.clusters.query is 0"),
        ({"attention": {"method": "magic"}}, r"attention.method is 'magic'; accepted: dense, clusters"),
        ({"attention": 3}, r"attention is 3; accepted: a table"),
        ({"attention": {"key_clusters": 8193}}, r"attention.key_clusters is 8193; accepted: 1 .. 8192"),
        (
            {"attention": {"clusters": [{"tokens": 9, "query": 1, "key": 9000}]}},
            r"attention.clusters.key is 9000; accepted: 1 .. 8192",
        ),
        ({"attention": {"density": 0}}, r"attention.density is 0.0; accepted: 0 < density <= 1"),
        ({"attention": {"density": 0.2, "head_floor": 0.3}}, r"attention.head_floor is 0.3; accepted: 0 .. 0.2"),
        ({"attention": {"selection": "error"}}, r"attention.selection is 'error'; accepted: mass; error needs"),
        ({"attention": {"tail": "third"}}, r"attention.tail is 'third'; accepted: none, first, second"),
        ({"attention": {"anchors": "on"}}, r"attention.anchors is 'on'; accepted: no, yes, auto"),
        ({"attention": {"refresh_growth": 0.5}}, r"attention.refresh_growth is 0.5; accepted: 1 or more"),
        ({"attention": {"refresh": "drift", "refresh_every": 30}}, r"attention.refresh_most is 25; accepted: 30"),
        ({"attention": {"drift": 0}}, r"attention.drift is 0.0; accepted: 0 < drift <= 1"),
        ({"attention": {"share_branches": True}}, r"attention.share_branches is True; accepted: no, yes"),
        ({"model": {"dtype": "bf15"}}, r"model.dtype is 'bf15'; accepted: auto, bf16.*did you mean 'bf16'\?"),
        ({"video": {"seed": -1}}, r"seed is -1; accepted: 0 .. 2\^63 - 1"),
        ({"video": {"steps": 0}}, r"steps is 0; accepted: 1 or more"),
        ({"video": {"guidance": float("inf")}}, r"guidance is inf"),
        ({"preset": "svg3"}, r"--preset is 'svg3'; accepted: balanced, dense.*did you mean 'svg2'\?"),
        ({"preset": 3}, r"preset is 3; accepted"),
    ],
)
def test_bad_values_are_refused_by_name(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(tables, PROMPT)


def test_as_many_key_clusters_are_accepted_as_the_kernels_take() -> None:
    assert top_p.MAX_KEY_CLUSTERS == MAX_KEY_CLUSTERS
    attention = AttentionConfig(key_clusters=2000)
    check_tokens(attention, most_rows(2001))
    with pytest.raises(ValueError, match=r"attention.key_clusters is 2000 for 1048577 tokens; accepted: fewer for"):
        check_tokens(attention, most_rows(2001) + 1)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt is .* accepted: a text"):
        resolve(None, {"video": {"prompt": prompt}})


def test_a_preset_file_holds_attention_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[attention]\np = 0.5\n")
    assert resolve(None, PROMPT, preset=str(path)).attention.p == 0.5
    path.write_text("[video]\nframes = 5\n")
    with pytest.raises(ValueError, match="a preset holds"):
        resolve(None, PROMPT, preset=str(path))
    path.write_text("p = = 1")
    with pytest.raises(ValueError, match="no valid TOML"):
        resolve(None, PROMPT, preset=str(path))


def test_a_density_below_what_stand_ins_cost_is_refused() -> None:
    attention = AttentionConfig(tail="first", density=0.1, key_clusters=20)
    check_tokens(attention, 201)
    with pytest.raises(ValueError, match=r"attention.density is 0.1; accepted: more than 0.1000: so much do the stand"):
        check_tokens(attention, 200)
    check_tokens(AttentionConfig(density=0.1, key_clusters=20), 200)
    # Nothing is left for them.
    check_tokens(AttentionConfig(tail="first", density=1.0, key_clusters=200), 200)
    # 20 stand-ins a row; 10 rows of 200 keys and 10 of 20 stand-ins.
    both = AttentionConfig(tail="first", anchors="yes", density=0.155, key_clusters=20, query_clusters=10)
    with pytest.raises(ValueError, match=r"0.1550: so much do the stand-ins of 20 .* and the anchors of 10 query clus"):
        check_tokens(both, 200)
    check_tokens(dataclasses.replace(both, density=0.16), 200)
    # Where text is in the sequence, "auto" has no anchors to pay for.
    auto = dataclasses.replace(both, anchors="auto")
    check_tokens(auto, 200, joint=True)
    with pytest.raises(ValueError, match="and the anchors of 10 query clusters cost"):
        check_tokens(auto, 200)


@pytest.mark.parametrize(
    ("asked", "alone", "joint"), [("no", False, False), ("yes", True, True), ("auto", True, False)]
)
def test_auto_has_anchors_where_the_sequence_is_video_alone(asked: Any, alone: bool, joint: bool) -> None:
    attention = AttentionConfig(anchors=asked)
    assert (has_anchors(attention, joint=False), has_anchors(attention, joint=True)) == (alone, joint)
    everything = dataclasses.replace(attention, p=1.0)
    assert not has_anchors(everything, joint=False)
    assert has_anchors(dataclasses.replace(everything, density=0.5), joint=False) == alone
    assert not has_anchors(dataclasses.replace(attention, density=1.0), joint=False)


def test_a_preset_may_say_where_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("measured = 'here'\n[attention]\np = 0.5\n")
    assert resolve(None, PROMPT, preset=str(path)).attention.p == 0.5
    assert (measured(str(path)), measured("dense"), measured(str(tmp_path / "gone.toml"))) == ("here", None, None)


def test_a_checkpoint_may_name_its_preset() -> None:
    checkpoint = {"preset": "balanced", "video": {"steps": 7}}
    assert resolve(None, PROMPT, checkpoint=checkpoint).preset == "balanced"
    assert resolve({"preset": "dense"}, PROMPT, checkpoint=checkpoint).preset == "dense"
    assert resolve(None, PROMPT, checkpoint=checkpoint, preset="svg2").attention.tail == "none"
    with pytest.raises(ValueError, match="preset is 3; accepted: balanced, dense, quality, svg2, turbo"):
        resolve(None, PROMPT, checkpoint={"preset": 3})


@pytest.mark.parametrize(("name", "floor"), [("quality", 0.2), ("balanced", 0.1), ("turbo", 0.02)])
def test_our_presets_differ_in_their_floor_and_say_where_they_were_measured(name: str, floor: float) -> None:
    found = resolve(None, PROMPT, preset=name).attention
    assert (found.floor, found.p, found.anchors) == (floor, 0.05, "auto")
    assert (found.tail, found.selection, found.share_branches) == ("second", "error", "yes")
    assert dataclasses.replace(found, floor=0.1) == resolve(None, PROMPT, preset="balanced").attention
    assert found.clusters == resolve(None, PROMPT, preset="svg2").attention.clusters
    assert "the demo model" in (measured(name) or "")
