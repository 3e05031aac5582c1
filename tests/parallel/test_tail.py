"""Stand-ins: what they weigh, and their means under labels that are kept."""

import math

import torch

from semvid.kernels.dispatch import select
from semvid.parallel.kmeans import means_of, refine, refine_with
from semvid.parallel.seeding import random_tokens
from semvid.parallel.tail import LEAST_SPREAD, squares, stand_ins, weigh

OPS = select("reference", torch.device("cpu"))
H, N, D = 2, 300, 16


def made() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(H, N, D, generator=generator) for _ in range(3))


def test_weights_follow_their_formula() -> None:
    q, k, v = made()
    starts = [random_tokens(x, C, (0,), N) for x, C in ((q, 5), (k, 9))]
    found = refine_with([q, k], starts, 3, OPS, riders=[v, squares(k)])
    queries, keys = found.clusters
    weights = weigh(queries, keys, found.sums[1])
    for h in range(H):
        of_queries = sum(
            int(n) * float(c.square().sum()) for n, c in zip(queries.sizes[h], queries.centroids[h], strict=True)
        )
        for j in range(9):
            rows = k[h][keys.labels[h] == j]
            spread = float((rows - rows.mean(0)).square().sum(-1).mean()) / D
            factor = 0.5 * spread * of_queries / N / D
            assert math.isclose(weights.log_n[h, j], math.log(len(rows)) + factor, rel_tol=1e-4)
            assert math.isclose(weights.bias[h, j], factor + math.log(spread), rel_tol=1e-3, abs_tol=1e-4)
            torch.testing.assert_close(found.sums[0][h, j], v[h][keys.labels[h] == j].sum(0), rtol=1e-4, atol=1e-4)


def test_empty_clusters_weigh_nothing_and_equal_keys_little() -> None:
    q, k, _ = made()
    k = k[:, :1].expand(H, N, D).contiguous()
    starts = [q[:, :2].contiguous(), torch.cat([k[:, :1], torch.full((H, 1, D), 50.0)], 1)]
    found = refine_with([q, k], starts, 1, OPS, riders=[squares(k)])
    weights = weigh(*found.clusters, found.sums[0])
    assert weights.log_n[:, 1].tolist() == [-math.inf] * H
    assert torch.isfinite(weights.bias).all()
    spread = LEAST_SPREAD * k[:, 0].square().sum(-1) / D
    assert (weights.bias[:, 0] < spread.log() + 1e-3).all()


def test_means_of_kept_clusters_are_those_of_todays_rows() -> None:
    q, k, v = made()
    (keys,) = refine([k], [random_tokens(k, 9, (0,), N)], 2, OPS)
    of_q, of_v = means_of([q, v], keys, OPS)
    for h in range(H):
        for j in range(9):
            rows = keys.labels[h] == j
            torch.testing.assert_close(of_q[h, j], q[h][rows].mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(of_v[h, j], v[h][rows].mean(0), rtol=1e-4, atol=1e-5)
    tail = stand_ins(of_q, of_v, torch.zeros(H, 9), torch.tensor([1, 1, 0]))
    assert torch.equal(tail.k_mean, of_q[[1, 1, 0]])


def test_changed_labels_are_counted_over_all_xs() -> None:
    q, k, _ = made()
    starts = [q[:, :4].contiguous(), k[:, :4].contiguous()]
    first = refine_with([q, k], starts, 1, OPS)
    again = refine_with([q, k], starts, 1, OPS, before=[side.labels for side in first.clusters])
    assert first.changed is None
    assert again.changed is not None
    assert int(again.changed) == 0
    before = [side.labels.clone() for side in first.clusters]
    before[0][0, :7] += 1
    before[1][1, 5] -= 1
    assert int(refine_with([q, k], starts, 1, OPS, before=before).changed) == 8
