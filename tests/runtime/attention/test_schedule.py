import pytest

from semvid.runtime.attention import schedule
from semvid.runtime.attention.schedule import Dense, Refresh, Refreshed, Reuse, decide, next_interval, num_dense_steps
from semvid.runtime.config import AttentionConfig

SVG2 = AttentionConfig()


def plan(config: AttentionConfig, steps: int, layer: int, drift: float = 0.0) -> list[object]:
    """The decisions of one layer over a whole job."""
    return [*schedule.plan(config, steps, layer + 1, drift)[layer]]


def refreshes(config: AttentionConfig, steps: int, drift: float = 0.0) -> list[int]:
    """The steps at which a layer refreshes."""
    return [step for step, what in enumerate(plan(config, steps, 1, drift)) if isinstance(what, Refresh)]


@pytest.mark.parametrize(
    ("share", "steps", "dense"), [(0.2, 50, 10), (0.29, 100, 29), (0.2, 4, 0), (0.35, 40, 14), (1, 7, 7)]
)
def test_dense_steps_are_a_share_rounded_down(share: float, steps: int, dense: int) -> None:
    assert num_dense_steps(AttentionConfig(dense_steps=share), steps) == dense


@pytest.mark.parametrize(("steps", "dense"), [(1, 0), (2, 1), (5, 2), (8, 3), (15, 3), (20, 4), (50, 10)])
def test_few_steps_have_their_least_of_dense_ones_but_no_more_than_half(steps: int, dense: int) -> None:
    assert num_dense_steps(AttentionConfig(dense_steps=0.2, least_dense_steps=3), steps) == dense


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
    assert decide(SVG2, step=30, steps=50, layer=4, last=None) == Refresh(50, seeded=True)


def test_intervals_grow_up_to_the_longest() -> None:
    config = AttentionConfig(refresh="growing", refresh_every=2, refresh_growth=1.5, refresh_most=7)
    assert refreshes(config, 50) == [10, 12, 15, 20, 27, 34, 41, 48]
    steady = AttentionConfig(refresh="growing", refresh_every=3, refresh_growth=1.0)
    assert refreshes(steady, 20) == [4, 7, 10, 13, 16, 19]


def test_drift_halves_intervals_and_its_absence_doubles_them() -> None:
    config = AttentionConfig(refresh="drift", refresh_every=4, drift=0.1, refresh_most=12)
    assert refreshes(config, 50, drift=0.0) == [10, 14, 22, 34, 46]
    assert refreshes(config, 50, drift=0.07) == [10, *range(14, 50, 4)]
    assert refreshes(config, 30, drift=0.2) == [6, 10, 12, *range(13, 30)]


def test_every_layer_and_branch_goes_by_its_own_drift() -> None:
    config = AttentionConfig(refresh="drift", refresh_every=4, drift=0.1)
    assert [next_interval(config, Refreshed(9, 4, drift)) for drift in (0.2, 0.1, 0.06, 0.04)] == [2, 4, 4, 8]
    assert next_interval(config, Refreshed(9, 1, 0.5)) == 1
    assert next_interval(config, Refreshed(9, 0, None)) == 4
