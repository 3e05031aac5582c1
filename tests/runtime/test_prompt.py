"""Prompt tokens as one more cluster: orders, counts and maps."""

import pytest
import torch

from semvid.kernels.layout import BlockMap
from semvid.kernels.reference import group
from semvid.parallel.exchange import Counts
from semvid.parallel.shard import Shard
from semvid.runtime.prompt import Prompt


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
