"""Anchors: which rank brings which, where they lie, what they cost."""

import pytest
import torch

from semvid.kernels.dispatch import select
from semvid.kernels.layout import BlockMap
from semvid.parallel.anchors import Share, cost, counted, order_of, select_all, with_anchors
from semvid.parallel.exchange import Counts
from semvid.parallel.kmeans import refine
from semvid.parallel.seeding import random_tokens

OPS = select("reference", torch.device("cpu"))


@pytest.mark.parametrize(("ranks", "clusters"), [(1, 5), (2, 5), (4, 5), (3, 1), (8, 300)])
def test_every_cluster_has_one_rank_that_brings_its_anchor(ranks: int, clusters: int) -> None:
    shares = [Share(rank, ranks, clusters) for rank in range(ranks)]
    brought = [c for share in shares for c in range(share.first, share.first + share.number)]
    assert brought == list(range(clusters))
    assert all(0 <= share.number <= share.most for share in shares)


def test_anchors_lie_behind_the_tokens_in_their_cluster_and_in_one_of_their_own() -> None:
    q = torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(0))
    (queries,) = refine([q], [random_tokens(q, 5, (0,), 60)], 2, OPS)
    share = Share(1, 2, 5)
    rows, order = with_anchors(q, queries, share, OPS), order_of(queries, share, OPS)
    assert rows.shape == (2, 60 + 2 * 2, 16)
    torch.testing.assert_close(rows[:, 60:62], queries.centroids[:, 3:5])
    assert torch.equal(rows[:, 62:], rows[:, 60:62])
    sizes = queries.sizes + torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)
    assert torch.equal(order.offsets.diff()[:, :5], sizes)
    assert order.order[:, -2:].tolist() == [[62, 63]] * 2
    for h in range(2):
        run = order.order[h, order.offsets[h, 3] : order.offsets[h, 4]]
        assert int(run[-1]) == 60
        assert queries.labels[h, run[:-1].long()].tolist() == [3] * int(queries.sizes[h, 3])


def test_counts_have_the_rows_of_every_rank() -> None:
    queries = torch.arange(2 * 1 * 3, dtype=torch.int32).view(2, 1, 3)
    keys = torch.tensor([[[3, 0]], [[5, 4]]], dtype=torch.int32)
    found = counted(Counts(queries, keys, torch.tensor([[4, 8, 12]], dtype=torch.int32)))
    # Of three clusters rank 0 brings the anchors of two.
    assert found.queries.tolist() == [[[1, 2, 2, 2]], [[3, 4, 6, 1]]]
    assert found.keys_computed.tolist() == [[4, 8, 12, 12]]
    assert found.queries.dtype == found.keys_computed.dtype == torch.int32
    assert found.keys is keys


def test_the_cluster_of_anchors_computes_every_key_and_no_empty_cluster() -> None:
    some = BlockMap(torch.tensor([[[True, False, False]]]))
    found = select_all(some, torch.tensor([[7, 0, 3]], dtype=torch.int32))
    assert found.selected.tolist() == [[[True, False, False], [True, False, True]]]


def test_the_cost_is_a_row_of_all_keys_and_one_of_some_for_each() -> None:
    computed = torch.tensor([[10, 30], [0, 100]], dtype=torch.int32)
    assert cost(computed, 100).tolist() == pytest.approx([(40 + 200) / 1e4, (100 + 200) / 1e4])
