import pytest

from semvid.runtime.config import AttentionConfig
from semvid.runtime.schedule import Dense, Refresh, Reuse, decide, num_dense_steps

SVG2 = AttentionConfig()


def plan(config: AttentionConfig, steps: int, layer: int) -> list[object]:
    """The decisions of one layer over a whole job."""
    decisions: list[object] = []
    for step in range(steps):
        seen = any(not isinstance(d, Dense) for d in decisions)
        decisions.append(decide(config, step=step, steps=steps, layer=layer, has_clusters=seen))
    return decisions


@pytest.mark.parametrize(
    ("share", "steps", "dense"), [(0.2, 50, 10), (0.29, 100, 29), (0.2, 4, 0), (0.35, 40, 14), (1, 7, 7)]
)
def test_dense_steps_are_a_share_rounded_down(share: float, steps: int, dense: int) -> None:
    assert num_dense_steps(AttentionConfig(dense_steps=share), steps) == dense


def test_svg2_is_dense_first_then_seeded_then_warm_at_every_step() -> None:
    assert plan(SVG2, 50, 1) == [Dense()] * 10 + [Refresh(50, seeded=True)] + [Refresh(2, seeded=False)] * 39


def test_the_first_layers_stay_dense() -> None:
    assert plan(SVG2, 20, 0) == [Dense()] * 20
    assert isinstance(plan(AttentionConfig(dense_layers=2), 20, 1)[-1], Dense)
    assert isinstance(plan(AttentionConfig(dense_layers=2), 20, 2)[-1], Refresh)


def test_dense_method_is_dense_everywhere() -> None:
    assert plan(AttentionConfig(method="dense"), 9, 5) == [Dense()] * 9


def test_reuse_fills_the_steps_between_refreshes() -> None:
    config = AttentionConfig(dense_steps=0.2, refresh_every=3)
    seeded, warm, reuse = Refresh(50, seeded=True), Refresh(2, seeded=False), Reuse()
    assert plan(config, 10, 3) == [Dense(), Dense(), seeded, reuse, reuse, warm, reuse, reuse, warm, reuse]


def test_a_job_that_starts_in_the_middle_is_seeded_there() -> None:
    assert decide(SVG2, step=30, steps=50, layer=4, has_clusters=False) == Refresh(50, seeded=True)
