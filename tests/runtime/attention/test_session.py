import pytest
import torch

from semvid.kernels.dispatch import select
from semvid.runtime.attention.density import DensityMeter
from semvid.runtime.attention.session import Position, Session
from semvid.runtime.config import AttentionConfig
from semvid.runtime.device import resolve_device


@pytest.fixture
def session() -> Session:
    return Session(AttentionConfig(), select("reference", torch.device("cpu")), seed=0)


def run(session: Session, *passes: tuple[int, str]) -> list[bool]:
    """Enters each pass and tells whether what the job remembered was still there."""
    kept = []
    for step, branch in passes:
        session.enter(Position(step, 9, branch))
        kept.append(session.meter.dense_calls > 0)
        session.meter.count_dense()
    return kept


def test_memory_lasts_as_long_as_steps_go_forward(session: Session) -> None:
    assert run(session, (0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"), (3, "cond")) == [False] + [True] * 4


def test_a_step_that_comes_back_is_a_new_job(session: Session) -> None:
    assert run(session, (0, "cond"), (1, "cond"), (0, "cond"), (1, "cond")) == [False, True, False, True]


def test_a_branch_that_comes_back_in_one_step_is_a_new_job(session: Session) -> None:
    assert run(session, (0, "cond"), (0, "uncond"), (0, "cond"), (0, "uncond")) == [False, True, False, True]


def test_a_rank_of_one_branch_keeps_its_memory_and_begins_new_jobs(session: Session) -> None:
    passes = [(0, "uncond"), (1, "uncond"), (2, "uncond"), (0, "uncond"), (0, "uncond"), (1, "uncond")]
    assert run(session, *passes) == [False, True, True, False, False, True]


def test_counts_outlive_the_job_until_the_next_begins(session: Session) -> None:
    run(session, (0, "cond"), (1, "cond"))
    session.finish()
    assert session.meter.dense_calls == 2
    assert run(session, (5, "cond")) == [False]


def test_shared_clusters_are_those_of_the_conditional_branch_of_each_transformer() -> None:
    ops, names = select("reference", torch.device("cpu")), ["cond", "uncond", "cond-2", "uncond-2"]
    for share, expected in (("yes", ["cond", "cond", "cond-2", "cond-2"]), ("no", names)):
        made = Session(AttentionConfig(share_branches=share), ops, seed=0)
        found = []
        for branch in names:
            made.enter(Position(0, 9, branch))
            found.append(made.owner())
        assert found == expected


def test_attention_outside_a_forward_pass_is_refused(session: Session) -> None:
    with pytest.raises(RuntimeError, match="outside the transformer's forward pass"):
        session.here()


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device is 'cuda', but there is no usable NVIDIA GPU"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


def test_density_is_the_mean_over_the_calls_it_names() -> None:
    meter = DensityMeter()
    meter.count_dense()
    assert (meter.read().sparse, meter.read().overall) == (1.0, 1.0)
    meter.count_sparse(torch.tensor([0.2, 0.4]))
    before = meter.read()
    meter.count_sparse(torch.tensor([0.5, 0.7]))
    density = meter.read()
    assert (density.sparse_calls, density.dense_calls) == (2, 1)
    assert density.sparse == pytest.approx(0.45)
    assert density.overall == pytest.approx((0.3 + 0.6 + 1) / 3)
    assert density.minus(before).sparse == pytest.approx(0.6)
