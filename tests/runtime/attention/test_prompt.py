"""Prompt tokens as one more cluster: orders, counts and maps."""

import math

import pytest
import torch
from torch import Tensor

from semvid.kernels.dispatch import select
from semvid.kernels.layout import BlockMap, Tail
from semvid.kernels.reference import group
from semvid.parallel.exchange import Counts
from semvid.parallel.shard import Shard
from semvid.runtime.attention.call import decision, sparse_attention
from semvid.runtime.attention.prompt import Prompt
from semvid.runtime.attention.refresh import made_ready, plans_of
from semvid.runtime.attention.session import Position, Session
from semvid.runtime.config import AttentionConfig
from tests.no_sync import no_sync

VIDEO, TEXT = 120, 7


@pytest.mark.parametrize(
    ("tokens", "ranks", "expected"),
    [(5, 1, [5]), (5, 2, [4, 1]), (3, 3, [3, 0, 0]), (8, 3, [3, 3, 2]), (0, 2, [0, 0])],
)
def test_ranks_share_the_text_rows_and_the_prompt_is_the_first_of_them(
    tokens: int, ranks: int, expected: list[int]
) -> None:
    prompts = [Prompt(tokens, Shard(rank, ranks, 8)) for rank in range(ranks)]
    assert prompts[0].of_shards() == expected
    assert [prompt.own for prompt in prompts] == expected


def test_the_prompt_is_the_last_cluster_of_an_order() -> None:
    permutation = group(torch.tensor([[1, 0, 1, 2], [2, 2, 0, 0]], dtype=torch.int32), 3)
    order, offsets = Prompt(2, Shard(0, 1, 6)).ordered(permutation)
    assert order.tolist() == [[1, 0, 2, 3, 4, 5], [2, 3, 0, 1, 4, 5]]
    assert offsets.tolist() == [[0, 1, 3, 4, 6], [0, 2, 2, 4, 6]]
    assert order.dtype == offsets.dtype == torch.int32


def test_the_prompt_is_computed_with_everything() -> None:
    prompt = Prompt(3, Shard(1, 2, 4))
    selected = prompt.selected(BlockMap(torch.zeros(1, 2, 3, dtype=torch.bool))).selected[0]
    assert selected.tolist() == [[False] * 3 + [True]] * 2 + [[True] * 4]
    assert prompt.sized(torch.tensor([[5, 6]], dtype=torch.int32)).tolist() == [[5, 6, 3]]
    # Two shards of 4 and 3 video tokens; a query cluster computes 5 of those 7 keys.
    queries, keys = torch.tensor([[[4]], [[3]]]).int(), torch.tensor([[[1, 3]], [[2, 1]]]).int()
    counts = prompt.counted(Counts(queries, keys, torch.tensor([[5]]).int()))
    assert counts.queries.tolist() == [[[4, 2]], [[3, 1]]]
    assert counts.keys.tolist() == [[[1, 3, 2]], [[2, 1, 1]]]
    assert counts.keys_computed.tolist() == [[8, 10]]
    assert counts.keys_computed.dtype == torch.int32


@pytest.mark.parametrize(("tokens", "ranks"), [(5, 1), (5, 2), (3, 3), (8, 3), (0, 2)])
def test_every_shards_prompt_tokens_are_counted(tokens: int, ranks: int) -> None:
    prompt, none = Prompt(tokens, Shard(0, ranks, 8)), torch.zeros(ranks, 1, 1, dtype=torch.int32)
    counts = prompt.counted(Counts(none, none, none[0]))
    assert counts.queries[:, 0, 1].tolist() == counts.keys[:, 0, 1].tolist() == prompt.of_shards()


@pytest.mark.gpu
def test_counting_the_prompt_never_waits_for_the_device() -> None:
    counts = Counts(*(torch.zeros(shape, dtype=torch.int32, device="cuda") for shape in ((2, 3, 4), (2, 3, 5), (3, 4))))
    with no_sync():
        found = Prompt(7, Shard(1, 2, 8)).counted(counts)
    assert found.queries[:, 0, 4].tolist() == found.keys[:, 0, 5].tolist() == Prompt(7, Shard(1, 2, 8)).of_shards()


def test_nothing_stands_in_for_the_prompt() -> None:
    tail = Prompt(3, Shard(0, 1, 4)).stood_in(Tail(torch.ones(2, 5, 4), torch.ones(2, 5, 6), torch.ones(2, 5)))
    assert (tail.k_mean.shape, tail.v_mean.shape) == ((2, 6, 4), (2, 6, 6))
    assert tail.log_n.tolist() == [[1.0] * 5 + [-math.inf]] * 2
    assert not tail.k_mean[:, 5].any()
    assert not tail.v_mean[:, 5].any()


def joint(**attention: object) -> Session:
    settings = {"dense_steps": 0.0, "dense_layers": 0, "query_clusters": 4, "key_clusters": 9, "floor": 0.0} | attention
    session = Session(AttentionConfig(**settings), select("reference", torch.device("cpu")), 0)
    session.enter(Position(0, 10, "cond"))
    session.prompt = Prompt(TEXT, Shard(0, 1, 8))
    return session


def qkv(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, VIDEO + TEXT, 16, generator=generator)
    # The prompt's rows are far from the video's: they would move every mean that they were in.
    return tuple(torch.cat([x[:, :VIDEO], x[:, VIDEO:] + 5], 1) for x in (q, k, v))


def expected(x: tuple[Tensor, Tensor, Tensor], session: Session) -> Tensor:
    """Attention over the selected tokens and the means of the other clusters of keys."""
    memory, (q, k, v) = made_ready(*x, session, session.cache.get(1, "cond")), x
    ones = torch.nn.functional.one_hot(memory.keys.labels.long(), 9).float()
    k_mean, v_mean = (ones.mT @ y[:, :VIDEO] / ones.sum(1)[..., None] for y in (k, v))
    of_rows = memory.queries.labels.long()[..., None].expand(-1, -1, 9)
    chosen = plans_of(memory, session)[0].block_map.selected[:, :4, :9].gather(1, of_rows)
    chosen = torch.cat([chosen, torch.ones(2, TEXT, 9, dtype=torch.bool)], 1)
    tokens = chosen.gather(2, memory.keys.labels.long()[:, None].expand(-1, VIDEO + TEXT, -1))
    allowed = torch.cat([tokens, torch.ones(2, VIDEO + TEXT, TEXT, dtype=torch.bool), ~chosen], 2)
    scores = torch.cat([q @ k.mT / 4, q @ k_mean.mT / 4 + memory.log_n[:, None]], 2)
    return scores.masked_fill(~allowed, -math.inf).softmax(2) @ torch.cat([v, v_mean], 1)


@pytest.mark.parametrize("tail", ["first", "second"])
def test_stand_ins_of_a_joint_sequence_are_of_its_video_tokens(tail: str) -> None:
    session = joint(p=0.3, tail=tail, selection="error", refresh_every=5)
    x, y = qkv(0), qkv(1)
    found = sparse_attention(*x, session, 1, decision(session, 1))
    torch.testing.assert_close(found, expected(x, session), rtol=1e-4, atol=1e-5)
    memory = made_ready(*x, session, session.cache.get(1, "cond"))
    selected = plans_of(memory, session)[0].block_map.selected
    assert 0 < selected[:, :4, :9].float().mean() < 0.9
    # Pairs, counted one by one: a stand-in is as much as a token.
    cost = torch.where(selected, session.prompt.sized(memory.keys.sizes)[:, None], 1).sum(-1)
    pairs = (cost * session.prompt.sized(memory.queries.sizes)).sum(-1)
    torch.testing.assert_close(memory.density, pairs / (VIDEO + TEXT) ** 2)
    session.enter(Position(1, 10, "cond"))
    # The labels stay, the means are those of the new rows.
    torch.testing.assert_close(
        sparse_attention(*y, session, 1, decision(session, 1)), expected(y, session), rtol=1e-4, atol=1e-5
    )


def test_branches_with_prompts_of_their_own_share_nothing() -> None:
    session = joint(share_branches="yes", p=0.5)
    sparse_attention(*qkv(0), session, 1, decision(session, 1))
    session.enter(Position(0, 10, "uncond"))
    with pytest.raises(ValueError, match="attention.share_branches is 'yes', but each branch has its prompt"):
        decision(session, 1)
