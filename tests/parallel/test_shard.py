"""Shards: every token in exactly one, padding at the end, and back."""

import pytest
import torch

from semvid.parallel.shard import Shard, pad

SIZES = [1, 2, 7, 8, 63, 100, 257]


def shards(ranks: int, total: int) -> list[Shard]:
    return [Shard(rank, ranks, total) for rank in range(ranks)]


@pytest.mark.parametrize("total", SIZES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_shards_without_their_padding_are_the_whole(total: int, ranks: int, dim: int) -> None:
    shape = [3, 3, 3]
    shape[dim] = total
    x = torch.arange(9 * total).view(shape) + 1
    parts = [(shard, shard.split(x, dim)) for shard in shards(ranks, total)]
    tokens = [part.narrow(dim, 0, shard.tokens) for shard, part in parts]
    assert torch.equal(torch.cat(tokens, dim), x)
    for shard, part in parts:
        assert part.shape[dim] == shard.rows == -(-total // ranks)
        assert not part.narrow(dim, shard.tokens, shard.rows - shard.tokens).any()


@pytest.mark.parametrize("total", SIZES)
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_every_rank_knows_every_shard(total: int, ranks: int) -> None:
    counts = [shard.tokens for shard in shards(ranks, total)]
    assert sum(counts) == total
    assert all(shard.all_tokens() == counts for shard in shards(ranks, total))
    assert [shard.first for shard in shards(ranks, total)] == [sum(counts[:rank]) for rank in range(ranks)]


def test_the_last_shards_may_be_all_padding() -> None:
    # Five tokens on four ranks: 2, 2, 1, 0.
    last = Shard(3, 4, 5)
    assert last.all_tokens() == [2, 2, 1, 0]
    assert (last.first, last.tokens, last.rows) == (5, 0, 2)
    part = last.split(torch.ones(2, 5, 3, dtype=torch.bfloat16), 1)
    assert (part.shape, part.dtype) == ((2, 2, 3), torch.bfloat16)
    assert not part.any()


@pytest.mark.parametrize("rows", [0, 4, 6])
def test_another_length_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"dimension 1 has {rows} rows, the sequence has 5"):
        Shard(0, 2, 5).split(torch.zeros(5, rows), 1)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_one_rank_gathers_what_it_split(dim: int) -> None:
    x = torch.randn(7, 7, 7, generator=torch.Generator().manual_seed(0))
    alone = Shard(0, 1, 7)
    assert torch.equal(alone.gather(alone.split(x, dim), dim, None), x)


def test_gathered_padding_falls_away() -> None:
    alone = Shard(0, 1, 5)
    assert torch.equal(alone.gather(pad(torch.ones(2, 5), 1, 8), 1, None), torch.ones(2, 5))


def test_what_needs_no_padding_is_not_copied() -> None:
    x = torch.zeros(2, 5)
    assert pad(x, 1, 5) is x
