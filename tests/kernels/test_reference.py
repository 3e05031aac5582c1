"""Every op of the reference against brute force: explicit loops and the plain formulas, in fp64 on the CPU."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.layout import BlockMap, Plan, Tail
from semvid.kernels.reference import softmax

# Unit roundoff of fp32: a dot product of D terms is within (D + 1)·u·Σ|x_d·y_d| of the exact one.
U = 2.0**-24
SIZES = (1, 63, 100, 257)
# Where tokens fall: over all clusters; one in the first, none in the second, the rest beyond; all in the last but one.
LAYOUTS = ("spread", "lonely", "one")
NQ_NK = ((1, 1), (1, 257), (63, 100), (100, 63), (257, 257))
H, D, CQ, CK = 2, 16, 5, 7


class Draw:
    """Random data, the same on every device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(20)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device, dtype)

    def labels(self, layout: str, heads: int, N: int, C: int) -> Tensor:
        if layout == "one":
            return self.integers(C - 2, C - 1, heads, N, dtype=torch.int32)
        labels = self.integers(0 if layout == "spread" else 2, C, heads, N, dtype=torch.int32)
        if layout == "lonely":
            labels[:, N // 2] = 0
        return labels

    def blocks(self, heads: int, Cq: int, Ck: int, share: float = 0.4) -> Tensor:
        return (torch.rand(heads, Cq, Ck, generator=self.generator) < share).to(self.device)


@pytest.fixture
def draw(device: torch.device) -> Draw:
    return Draw(device)


class Scene(NamedTuple):
    """The inputs of one attention call, all in token order."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_labels: Tensor
    k_labels: Tensor
    selected: Tensor


def scene_of(draw: Draw, Nq: int, Nk: int, layout: str = "spread", dtype: torch.dtype = torch.float32) -> Scene:
    q, k, v = (draw.normal(H, N, D, dtype=dtype) for N in (Nq, Nk, Nk))
    q_labels, k_labels = draw.labels(layout, H, Nq, CQ), draw.labels(layout, H, Nk, CK)
    return Scene(q, k, v, q_labels, k_labels, draw.blocks(H, CQ, CK))


def attend(scene: Scene, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of the reference in token order."""
    _, Cq, Ck = scene.selected.shape
    queries, keys = reference.group(scene.q_labels, Cq), reference.group(scene.k_labels, Ck)
    plan = reference.plan(queries.offsets, keys.offsets, BlockMap(scene.selected))
    k, v = reference.gather_rows(scene.k, keys.order), reference.gather_rows(scene.v, keys.order)
    return reference.attention(scene.q, k, v, plan, q_order=queries.order, **options)


def brute_attention(scene: Scene, scale: float | None = None, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) in fp64 and token order, query by query over the keys whose label it selects."""
    q, k, v = (x.double().cpu() for x in scene[:3])
    q_labels, k_labels, selected = (x.tolist() for x in scene[3:])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:2])
    for h, i in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        chosen = selected[h][q_labels[h][i]]
        seen = [j for j, label in enumerate(k_labels[h]) if chosen[label]]
        keys, values, bias = k[h, seen], v[h, seen], torch.zeros(len(seen), dtype=torch.float64)
        if tail is not None:
            k_mean, v_mean, log_n = (x[h].double().cpu() for x in tail)
            extra = [c for c, is_on in enumerate(chosen) if not is_on and log_n[c] > -math.inf]
            keys, values = torch.cat([keys, k_mean[extra]]), torch.cat([values, v_mean[extra]])
            bias = torch.cat([bias, log_n[extra]])
        if len(bias) == 0:
            lse[h, i] = -math.inf
            continue
        scores = (keys * q[h, i]).sum(-1) * scale + bias
        weights = torch.exp(scores - scores.max())
        lse[h, i] = scores.max() + torch.log(weights.sum())
        out[h, i] = (weights[:, None] * values).sum(0) / weights.sum()
    return out, lse


def dense_attention(scene: Scene) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) in fp64 and token order over all keys."""
    q, k, v = (x.double().cpu() for x in scene[:3])
    weights = torch.exp(torch.einsum("hid,hjd->hij", q, k) / math.sqrt(q.shape[-1]))
    return torch.einsum("hij,hjd->hid", weights, v) / weights.sum(-1, keepdim=True), weights.sum(-1).log()


def brute_tail(scene: Scene) -> Tail:
    """Returns each key cluster's means and log size, token by token; an empty cluster has means that would show."""
    k, v = scene.k.double().cpu(), scene.v.double().cpu()
    k_mean, v_mean = torch.full((H, CK, D), 7.0), torch.full((H, CK, D), 1e3)
    log_n = torch.full((H, CK), -math.inf)
    for h, labels in enumerate(scene.k_labels.tolist()):
        for c in set(labels):
            own = [j for j, label in enumerate(labels) if label == c]
            k_mean[h, c], v_mean[h, c], log_n[h, c] = k[h, own].mean(0), v[h, own].mean(0), math.log(len(own))
    return Tail(*(x.to(scene.q.device) for x in (k_mean, v_mean, log_n)))


def assert_near(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Compares in fp64 (NaN never passes, infinities must agree); 1e-5 covers fp32 on data of size about 1."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), e.double().cpu(), rtol=rtol, atol=atol)


def hold_at_once(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    """Makes the reference go in chunks of this many pairs."""
    for name in ("CPU_PAIRS_AT_ONCE", "GPU_PAIRS_AT_ONCE"):
        monkeypatch.setattr(softmax, name, pairs)


def runs_of(labels: list[int], C: int) -> list[list[int]]:
    """Returns the tokens of each cluster, in token order."""
    runs: list[list[int]] = [[] for _ in range(C)]
    for i, label in enumerate(labels):
        runs[label].append(i)
    return runs


@pytest.mark.parametrize("pairs_at_once", [1, 100, 1 << 26])
@pytest.mark.parametrize("N", SIZES)
def test_assign_is_exact_on_small_integers_and_ties_go_to_the_smaller_index(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, N: int, pairs_at_once: int
) -> None:
    hold_at_once(monkeypatch, pairs_at_once)
    x, centroids = draw.integers(-3, 4, H, N, 3), draw.integers(-3, 4, H, 12, 3)
    centroids[:, 7] = centroids[:, 2]
    labels = reference.assign(x, centroids)
    assert labels.dtype == torch.int32
    expected = []
    for tokens, means in zip(x.tolist(), centroids.tolist(), strict=True):
        distances = [[sum((a - b) ** 2 for a, b in zip(t, c, strict=True)) for c in means] for t in tokens]
        expected.append([d.index(min(d)) for d in distances])
    assert labels.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [1, 2, 300])
@pytest.mark.parametrize("N", SIZES)
def test_assign_takes_the_nearest_centroid_but_for_ties_within_rounding(
    draw: Draw, N: int, C: int, dtype: torch.dtype
) -> None:
    x, centroids = draw.normal(H, N, D, dtype=dtype), draw.normal(H, C, D)
    labels = reference.assign(x, centroids).long().cpu()
    tokens, means = x.double().cpu(), centroids.double().cpu()
    distances = torch.stack([(tokens - means[:, c : c + 1]).square().sum(-1) for c in range(C)], dim=-1)
    # A closeness errs by at most e = (D + 2)·u·(Σ|x_d·c_d| + ‖c‖²/2). A distance is ‖x‖² less twice the closeness, and
    # two are compared: the chosen one exceeds the least by at most 4·e.
    sizes = torch.stack([(tokens * means[:, c : c + 1]).abs().sum(-1) for c in range(C)], dim=-1)
    error = (D + 2) * U * (sizes + means.square().sum(-1)[:, None] / 2).amax(-1)
    chosen = distances.gather(-1, labels[..., None])[..., 0]
    assert (chosen <= distances.amin(-1) + 4 * error).all()


@pytest.mark.parametrize("N", SIZES)
def test_assign_leaves_far_centroids_empty(draw: Draw, N: int) -> None:
    centroids = draw.normal(H, CK, D) + 100
    centroids[:, 4] = 0
    assert (reference.assign(draw.normal(H, N, D), centroids) == 4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", SIZES)
def test_cluster_sums_add_and_count_the_tokens_of_each_cluster(
    draw: Draw, N: int, layout: str, dtype: torch.dtype
) -> None:
    x, labels = draw.normal(H, N, D, dtype=dtype), draw.labels(layout, H, N, CK)
    sums, counts = reference.cluster_sums(x, labels, CK)
    assert (sums.dtype, counts.dtype) == (torch.float32, torch.int32)
    for h in range(H):
        runs = runs_of(labels[h].tolist(), CK)
        assert counts[h].tolist() == [len(run) for run in runs]
        for c, run in enumerate(runs):
            own = x[h].double().cpu()[run]
            assert ((sums[h, c].double().cpu() - own.sum(0)).abs() <= N * U * own.abs().sum(0)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", SIZES)
def test_group_makes_each_cluster_one_run_in_token_order(draw: Draw, N: int, layout: str) -> None:
    labels = draw.labels(layout, H, N, CK)
    order, offsets = reference.group(labels, CK)
    assert (order.dtype, offsets.dtype) == (torch.int32, torch.int32)
    assert offsets.shape == (H, CK + 1)
    for h in range(H):
        runs = runs_of(labels[h].tolist(), CK)
        assert order[h].tolist() == [i for run in runs for i in run]
        assert offsets[h].tolist() == [sum(map(len, runs[:c])) for c in range(CK + 1)]
        assert sorted(order[h].tolist()) == list(range(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", SIZES)
def test_scatter_rows_undoes_gather_rows(draw: Draw, N: int, dtype: torch.dtype) -> None:
    x, order = draw.normal(H, N, D, dtype=dtype), reference.group(draw.labels("spread", H, N, CK), CK).order
    grouped = reference.gather_rows(x, order)
    scattered = reference.scatter_rows(x, order)
    for h in range(H):
        for i, token in enumerate(order[h].tolist()):
            assert torch.equal(grouped[h, i], x[h, token])
            assert torch.equal(scattered[h, token], x[h, i])
    assert grouped.dtype == scattered.dtype == dtype
    assert torch.equal(reference.scatter_rows(grouped, order), x)
    assert torch.equal(reference.gather_rows(scattered, order), x)


def test_gather_rows_takes_any_rows_in_any_number(draw: Draw) -> None:
    x, order = draw.normal(H, 5, D), torch.tensor([[4, 4, 0], [1, 2, 4]], dtype=torch.int32, device=draw.device)
    expected = [[x[h, i].tolist() for i in order[h].tolist()] for h in range(H)]
    assert reference.gather_rows(x, order).tolist() == expected


def chosen_of(scores: list[float], sizes: list[int], p: float, floor: float, device: torch.device) -> list[int]:
    """Returns what one query cluster of one head selects when its scores (D = 1) are these."""
    queries = torch.ones(1, 1, 1, device=device)
    keys = torch.tensor(scores, device=device).view(1, -1, 1)
    k_sizes = torch.tensor([sizes], dtype=torch.int32, device=device)
    selected = reference.top_p_map(queries, keys, k_sizes, p, floor).selected
    assert selected.dtype == torch.bool
    assert selected.shape == (1, 1, len(scores))
    return selected[0, 0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("p", [1e-6, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("Ck", [1, 10, 63, 100, 257])
def test_top_p_map_takes_the_fewest_heaviest_clusters_that_reach_p(draw: Draw, Ck: int, p: float, floor: float) -> None:
    queries, keys = 2 * draw.normal(H, 3, D), draw.normal(H, Ck, D)
    sizes = draw.integers(0, 300, H, Ck, dtype=torch.int32)
    sizes[:, Ck // 2] = 1
    sizes[:, ::10] += 5000
    sizes[:, 3::4] = 0
    selected = reference.top_p_map(queries, keys, sizes, p, floor).selected.cpu()
    scores = torch.einsum("hid,hjd->hij", queries.double().cpu(), keys.double().cpu()) / math.sqrt(D)
    weights = sizes.double().cpu()[:, None] * torch.exp(scores)
    mass = weights / weights.sum(-1, keepdim=True)
    least = math.ceil(Fraction(str(floor)) * Ck)
    # Σ|q_d·k_d|/√D stays below 20, so a score errs by (D + 2)·u·20 = 2e-5, a mass by twice that part of itself.
    near = 1e-4
    for h in range(H):
        occupied = {j for j, n in enumerate(sizes[h].tolist()) if n > 0}
        for i in range(3):
            on = set(selected[h, i].nonzero()[:, 0].tolist())
            taken, skipped = (sorted(mass[h, i, j].item() for j in part) for part in (on, occupied - on))
            assert on <= occupied
            assert len(on) >= min(least, len(occupied))
            assert sum(taken) >= p - near
            assert not skipped or skipped[-1] <= taken[0] * (1 + near)
            if p == 1.0:
                assert on == occupied
            elif len(on) > max(least, 1):
                assert sum(taken[1:]) < p + near


def test_top_p_map_stops_at_the_cluster_that_reaches_p_exactly_and_ties_go_by_index(device: torch.device) -> None:
    # Four equal masses are 0.25 without rounding.
    assert chosen_of([0.0] * 4, [1] * 4, 0.25, 0.0, device) == [0]
    assert chosen_of([0.0] * 4, [1] * 4, 0.5, 0.0, device) == [0, 1]
    assert chosen_of([0.0] * 4, [1] * 4, 0.51, 0.0, device) == [0, 1, 2]
    assert chosen_of([0.0] * 300, [1] * 300, 1e-6, 0.01, device) == [0, 1, 2]


def test_top_p_map_weighs_clusters_by_their_size(device: torch.device) -> None:
    assert chosen_of([0.0, 0.0, 0.0], [1, 9, 2], 0.5, 0.0, device) == [1]
    # 2·e > 5 > 1·e: a larger score does not make up for a smaller cluster.
    assert chosen_of([1.0, 0.0, 1.0], [1, 5, 2], 0.1, 0.0, device) == [2]
    assert chosen_of([1.0, 0.0, 1.0], [1, 6, 2], 0.1, 0.0, device) == [1]


@pytest.mark.parametrize(
    ("floor", "Ck", "expected"),
    [(0.0, 10, 1), (0.1, 10, 1), (0.11, 10, 2), (0.1, 1000, 100), (0.07, 100, 7), (0.29, 100, 29), (1.0, 10, 10)],
)
def test_top_p_map_keeps_at_least_the_floor_rounded_up(
    device: torch.device, floor: float, Ck: int, expected: int
) -> None:
    # The last cluster holds nearly all mass, the others fall by index; 0.07·100 is 7.000000000000001 in fp64.
    scores = [-0.01 * j for j in range(Ck - 1)] + [20.0]
    assert chosen_of(scores, [1] * Ck, 0.5, floor, device) == [*range(expected - 1), Ck - 1]


def test_top_p_map_counts_the_floor_in_all_clusters_but_selects_only_occupied_ones(device: torch.device) -> None:
    sizes = [0, 4, 0, 4, 0, 4, 0, 4]
    assert chosen_of([8.0, 0, 8.0, -1, 8.0, -2, 8.0, -3], sizes, 1e-6, 0.25, device) == [1, 3]
    assert chosen_of([8.0, 0, 8.0, -1, 8.0, -2, 8.0, -3], sizes, 1e-6, 1.0, device) == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("scores", "sizes", "expected"),
    [([0.0, 5.0, -200.0, -300.0], [5, 0, 5, 5], [0, 2]), ([0.0, -300.0, -200.0], [5, 5, 5], [0, 2])],
)
def test_top_p_map_fills_the_floor_by_mass_even_where_mass_underflows(
    device: torch.device, scores: list[float], sizes: list[int], expected: list[int]
) -> None:
    assert chosen_of(scores, sizes, 0.9, 0.5, device) == expected


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_top_p_map_with_p_one_takes_every_occupied_cluster_even_where_mass_underflows(
    device: torch.device, floor: float
) -> None:
    scores, sizes = [0.0, -300.0, 1.0, -1000.0], [5, 1, 0, 1]
    assert chosen_of(scores, sizes, 1.0, floor, device) == [0, 1, 3]
    assert chosen_of(scores, sizes, 0.99, 0.0, device) == [0]


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_top_p_map_selects_nothing_where_no_cluster_holds_a_key(device: torch.device, p: float, floor: float) -> None:
    assert chosen_of([0.0, 1.0, 2.0], [0, 0, 0], p, floor, device) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("Nq", "Nk"), NQ_NK)
def test_density_is_the_share_of_token_pairs_computed(draw: Draw, Nq: int, Nk: int, layout: str) -> None:
    q_labels, k_labels = draw.labels(layout, H, Nq, CQ), draw.labels(layout, H, Nk, CK)
    selected = draw.blocks(H, CQ, CK)
    q_sizes, k_sizes = (reference.group(x, C).offsets.diff() for x, C in ((q_labels, CQ), (k_labels, CK)))
    shares = reference.density(BlockMap(selected), q_sizes, k_sizes)
    assert shares.dtype == torch.float32
    for h, on in enumerate(selected.tolist()):
        pairs = sum(on[a][b] for a in q_labels[h].tolist() for b in k_labels[h].tolist())
        assert shares[h].item() == pytest.approx(pairs / (Nq * Nk), rel=U)


def test_density_is_one_for_the_full_map_and_zero_for_the_empty_map_or_no_tokens(draw: Draw) -> None:
    full, none = (BlockMap(draw.blocks(H, 3, 4, share)) for share in (2.0, -1.0))
    # 10^10 pairs a block: more than int32 counts.
    q_sizes, k_sizes = (draw.integers(100_000, 200_000, H, C, dtype=torch.int32) for C in (3, 4))
    assert reference.density(full, q_sizes, k_sizes).tolist() == [1.0] * H
    assert reference.density(none, q_sizes, k_sizes).tolist() == [0.0] * H
    assert reference.density(full, 0 * q_sizes, k_sizes).tolist() == [0.0] * H


def test_plan_keeps_the_runs_and_the_map_and_adds_no_lists(draw: Draw) -> None:
    q_offsets, k_offsets = (reference.group(draw.labels("spread", H, 63, C), C).offsets for C in (CQ, CK))
    block_map = BlockMap(draw.blocks(H, CQ, CK))
    plan = reference.plan(q_offsets, k_offsets, block_map)
    assert plan.q_offsets is q_offsets
    assert plan.k_offsets is k_offsets
    assert plan.block_map is block_map
    assert plan.lists == ()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("Nq", "Nk"), NQ_NK)
def test_attention_covers_exactly_the_selected_blocks(draw: Draw, Nq: int, Nk: int, layout: str) -> None:
    scene = scene_of(draw, Nq, Nk, layout)
    out, lse = attend(scene)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert_near((out, lse), brute_attention(scene))


@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("pairs_at_once", [1, 800])
def test_attention_in_chunks_of_rows_gives_the_same(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, pairs_at_once: int, with_tail: bool
) -> None:
    scene = scene_of(draw, 100, 63)
    tail = brute_tail(scene) if with_tail else None
    hold_at_once(monkeypatch, pairs_at_once)
    assert_near(attend(scene, tail=tail), brute_attention(scene, tail=tail))


@pytest.mark.parametrize("N", SIZES)
def test_attention_without_q_order_takes_and_returns_grouped_queries(draw: Draw, N: int) -> None:
    scene = scene_of(draw, N, N)
    queries, keys = reference.group(scene.q_labels, CQ), reference.group(scene.k_labels, CK)
    plan = reference.plan(queries.offsets, keys.offsets, BlockMap(scene.selected))
    q = reference.gather_rows(scene.q, queries.order)
    k, v = reference.gather_rows(scene.k, keys.order), reference.gather_rows(scene.v, keys.order)
    out, lse = reference.attention(q, k, v, plan)
    expected_out, expected_lse = brute_attention(scene)
    for h, tokens in enumerate(queries.order.tolist()):
        assert_near((out[h], lse[h]), (expected_out[h, tokens], expected_lse[h, tokens]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", SIZES)
def test_attention_with_the_full_map_is_dense(draw: Draw, N: int, layout: str) -> None:
    scene = scene_of(draw, N, N, layout)
    assert_near(attend(scene._replace(selected=draw.blocks(H, CQ, CK, 2.0))), dense_attention(scene))


@pytest.mark.parametrize("N", SIZES)
def test_attention_with_the_map_of_p_one_is_dense(draw: Draw, N: int) -> None:
    scene = scene_of(draw, N, N)
    q_centroids, k_centroids = draw.normal(H, CQ, D), draw.normal(H, CK, D)
    k_labels = reference.assign(scene.k, k_centroids)
    _, k_sizes = reference.cluster_sums(scene.k, k_labels, CK)
    selected = reference.top_p_map(q_centroids, k_centroids, k_sizes, p=1.0, floor=0.0).selected
    q_labels = reference.assign(scene.q, q_centroids)
    scene = scene._replace(q_labels=q_labels, k_labels=k_labels, selected=selected)
    assert_near(attend(scene), dense_attention(scene))


@pytest.mark.parametrize("N", SIZES)
def test_attention_of_a_row_that_selects_no_key_is_zero_with_lse_minus_infinity(draw: Draw, N: int) -> None:
    scene = scene_of(draw, N, N, "lonely")
    # Query cluster 0 selects nothing, cluster 3 only a key cluster without keys; the others select all.
    selected = draw.blocks(H, CQ, CK, 2.0)
    selected[:, [0, 3]] = False
    selected[:, 3, 1] = True
    scene = scene._replace(selected=selected)
    out, lse = attend(scene)
    blind = (scene.q_labels == 0) | (scene.q_labels == 3)
    assert blind.any()
    assert (out[blind] == 0).all()
    assert (lse[blind] == -math.inf).all()
    assert_near((out, lse), brute_attention(scene))


def test_attention_over_no_keys_is_zero_with_lse_minus_infinity(draw: Draw) -> None:
    scene = scene_of(draw, 63, 0)
    out, lse = attend(scene)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize("with_tail", [False, True])
def test_attention_multiplies_scores_by_scale_or_one_over_root_d(
    draw: Draw, scale: float | None, with_tail: bool
) -> None:
    scene = scene_of(draw, 63, 100)
    tail = brute_tail(scene) if with_tail else None
    expected = brute_attention(scene, scale=D**-0.5 if scale is None else scale, tail=tail)
    assert_near(attend(scene, scale=scale, tail=tail), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_tail", [False, True])
def test_attention_rounds_only_the_output_to_a_narrow_dtype(draw: Draw, dtype: torch.dtype, with_tail: bool) -> None:
    scene = scene_of(draw, 100, 63, dtype=dtype)
    tail = brute_tail(scene) if with_tail else None
    # A scale that is no power of two: multiplying by it rounds.
    out, lse = attend(scene, tail=tail, scale=0.3)
    expected_out, expected_lse = brute_attention(scene, tail=tail, scale=0.3)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_near([lse], [expected_lse])
    # Half a unit in the last place, and the fp32 error beside it.
    assert_near([out], [expected_out], rtol=torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("sign", ["both", "negative", "positive"])
def test_attention_stands_scores_far_beyond_the_range_of_exp(draw: Draw, sign: str) -> None:
    q, k = draw.integers(-10, 11, H, 63, D), draw.integers(-10, 11, H, 100, D)
    if sign != "both":
        q, k = q.abs() + 1, (k.abs() + 1) * (1 if sign == "positive" else -1)
    scene = scene_of(draw, 63, 100)._replace(q=q, k=k)
    # Scores are whole numbers up to 2000, exact in fp32; an lse of that size rounds by 6e-5, and exp with it.
    assert_near(attend(scene, scale=1.0), brute_attention(scene, scale=1.0), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("Nq", "Nk"), NQ_NK)
def test_tail_is_one_extra_column_for_each_occupied_cluster_not_selected(
    draw: Draw, Nq: int, Nk: int, layout: str
) -> None:
    scene = scene_of(draw, Nq, Nk, layout)
    tail = brute_tail(scene)
    assert_near(attend(scene, tail=tail), brute_attention(scene, tail=tail))


@pytest.mark.parametrize("share", [-1.0, 0.4, 2.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", SIZES)
def test_tail_makes_sparse_equal_dense_where_clusters_hold_identical_keys_and_values(
    draw: Draw, N: int, layout: str, share: float
) -> None:
    scene = scene_of(draw, N, N, layout)
    k_of_cluster, v_of_cluster = draw.normal(H, CK, D), draw.normal(H, CK, D)
    k, v = (reference.gather_rows(x, scene.k_labels) for x in (k_of_cluster, v_of_cluster))
    scene = scene._replace(k=k, v=v, selected=draw.blocks(H, CQ, CK, share))
    assert_near(attend(scene, tail=brute_tail(scene)), dense_attention(scene))


def test_tail_changes_nothing_where_every_occupied_cluster_is_selected(draw: Draw) -> None:
    scene = scene_of(draw, 63, 100, "lonely")
    scene = scene._replace(selected=(reference.group(scene.k_labels, CK).offsets.diff() > 0)[:, None].repeat(1, CQ, 1))
    assert_near(attend(scene, tail=brute_tail(scene)), dense_attention(scene))


def test_tail_of_empty_clusters_leaves_a_row_without_keys_at_minus_infinity(draw: Draw) -> None:
    scene = scene_of(draw, 63, 100)._replace(selected=draw.blocks(H, CQ, CK, -1.0))
    tail = brute_tail(scene)._replace(log_n=torch.full((H, CK), -math.inf, device=draw.device))
    out, lse = attend(scene, tail=tail)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def parts_of(draw: Draw, N: int, num_parts: int, dtype: torch.dtype = torch.float32) -> tuple[Scene, list[Any]]:
    """Returns a scene, and (out, lse) of brute force over each part of a random split of its key clusters."""
    scene = scene_of(draw, N, N)
    owner = draw.integers(0, num_parts, H, CQ, CK, dtype=torch.int32)
    parts = [brute_attention(scene._replace(selected=owner == part)) for part in range(num_parts)]
    return scene, [(out.to(draw.device, dtype), lse.float().to(draw.device)) for out, lse in parts]


@pytest.mark.parametrize("N", SIZES)
def test_merge_of_any_split_of_the_keys_is_the_whole(draw: Draw, N: int) -> None:
    scene, (a, b) = parts_of(draw, N, 2)
    out, lse = reference.merge(*a, *b)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert_near((out, lse), dense_attention(scene))


def test_merge_takes_parts_in_any_order(draw: Draw) -> None:
    scene, (a, b, c) = parts_of(draw, 100, 3)
    for x, y, z in ((a, b, c), (c, a, b), (b, c, a)):
        assert_near(reference.merge(*reference.merge(*x, *y), *z), dense_attention(scene))


def test_merge_of_attention_over_a_map_and_its_complement_is_dense(draw: Draw) -> None:
    scene = scene_of(draw, 100, 257)
    merged = reference.merge(*attend(scene), *attend(scene._replace(selected=~scene.selected)))
    assert_near(merged, dense_attention(scene))


def test_merge_weighs_parts_whose_lse_is_beyond_the_range_of_exp(draw: Draw) -> None:
    out_a, out_b = draw.normal(H, 63, D), draw.normal(H, 63, D)
    lse_a = draw.integers(-1000, 1001, H, 63)
    # a has three times the weight of b.
    out, lse = reference.merge(out_a, lse_a, out_b, lse_a - math.log(3))
    # An lse of size 1000 rounds by 3e-5.
    assert_near([out], [(3 * out_a.double() + out_b.double()) / 4], atol=2e-4)
    assert_near([lse], [lse_a.double() + math.log(4 / 3)], atol=2e-4)


def test_merge_ignores_a_side_without_keys(draw: Draw) -> None:
    out, lse = draw.normal(H, 63, D), draw.normal(H, 63)
    no_out, no_lse = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    assert_near(reference.merge(out, lse, no_out, no_lse), (out, lse), rtol=0, atol=0)
    assert_near(reference.merge(no_out, no_lse, out, lse), (out, lse), rtol=0, atol=0)
    assert_near(reference.merge(no_out, no_lse, no_out, no_lse), (no_out, no_lse), rtol=0, atol=0)


def test_merge_rounds_only_the_output_to_a_narrow_dtype(draw: Draw) -> None:
    _, ((out_a, lse_a), (out_b, lse_b)) = parts_of(draw, 100, 2, torch.bfloat16)
    out, lse = reference.merge(out_a, lse_a, out_b, lse_b)
    weight = torch.sigmoid(lse_a.double() - lse_b.double())[..., None]
    expected = out_a.double() * weight + out_b.double() * (1 - weight)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert_near([out], [expected], rtol=torch.finfo(torch.bfloat16).eps / 2)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def index(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


NOT_ROWS = (rows(5, 4), index(2, 5, 4))
TAKES_ROWS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "assign": ("x", lambda x: reference.assign(x, rows(2, 3, 4))),
    "cluster_sums": ("x", lambda x: reference.cluster_sums(x, index(2, 5), 3)),
    "gather_rows": ("x", lambda x: reference.gather_rows(x, index(2, 5))),
    "scatter_rows": ("x", lambda x: reference.scatter_rows(x, index(2, 5))),
    "top_p_map": ("q_centroids", lambda x: reference.top_p_map(x, rows(2, 3, 4), index(2, 3), 0.9, 0.1)),
    "attention": ("q", lambda x: reference.attention(x, rows(2, 6, 4), rows(2, 6, 4), plan_of(2))),
}


def plan_of(heads: int) -> Plan:
    return Plan(index(heads, 3), index(heads, 4), BlockMap(index(heads, 2, 3, dtype=torch.bool)))


@pytest.mark.parametrize("x", NOT_ROWS, ids=["two dimensions", "integers"])
@pytest.mark.parametrize("op", TAKES_ROWS)
def test_refuses_what_is_not_floating_rows(op: str, x: Tensor) -> None:
    name, call = TAKES_ROWS[op]
    message = f"{name} must be a floating [H, N, D] tensor, not {x.dtype} {list(x.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: reference.cluster_sums(rows(2, 5, 4), index(2, 5, dtype=torch.int64), 3),
            r"labels must be int32 \[2, 5\], not torch.int64 \[2, 5\]",
        ),
        (lambda: reference.cluster_sums(rows(2, 5, 4), index(2, 6), 3), r"labels must be int32 \[2, 5\], not .*2, 6\]"),
        (lambda: reference.group(index(2, 5, dtype=torch.int64), 3), r"labels must be int32 .* not torch.int64"),
        (
            lambda: reference.top_p_map(rows(2, 2, 4), rows(2, 3, 4), index(2, 4), 0.9, 0.1),
            r"k_sizes must be int32 \[2, 3\], not torch.int32 \[2, 4\]",
        ),
        (
            lambda: reference.top_p_map(rows(2, 2, 4), rows(2, 3, 4), rows(2, 3), 0.9, 0.1),
            r"k_sizes must be int32 \[2, 3\], not torch.float32",
        ),
    ],
)
def test_refuses_an_index_of_another_dtype_or_shape(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_map": BlockMap(rows(2, 2, 3))}, r"block_map must be bool \[H, Cq, Ck\], not torch.float32"),
        ({"q_offsets": index(2, 2)}, r"q_offsets must be int32 \[2, 3\], not torch.int32 \[2, 2\]"),
        ({"q_offsets": index(2, 3, dtype=torch.int64)}, r"q_offsets must be int32 \[2, 3\], not torch.int64"),
        ({"k_offsets": index(1, 4)}, r"k_offsets must be int32 \[2, 4\], not torch.int32 \[1, 4\]"),
        ({"k_offsets": rows(2, 4)}, r"k_offsets must be int32 \[2, 4\], not torch.float32"),
    ],
)
def test_plan_refuses_runs_that_do_not_fit_the_map(changes: dict[str, Any], message: str) -> None:
    inputs = plan_of(2)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        reference.plan(inputs.q_offsets, inputs.k_offsets, inputs.block_map)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": rows(2, 6, 8)}, r"k and v must both be \[2, Nk, 4\], not \[2, 6, 8\] and \[2, 6, 4\]"),
        ({"k": rows(1, 6, 4), "v": rows(1, 6, 4)}, r"k and v must both be \[2, Nk, 4\], not \[1, 6, 4\]"),
        ({"k": rows(6, 4), "v": rows(6, 4)}, r"k and v must both be \[2, Nk, 4\], not \[6, 4\]"),
        ({"v": rows(2, 7, 4)}, r"k and v must both be \[2, Nk, 4\], not \[2, 6, 4\] and \[2, 7, 4\]"),
        (
            {"k": rows(2, 6, 4, dtype=torch.bfloat16)},
            r"share a dtype, not torch.float32, torch.bfloat16, torch.float32",
        ),
        ({"v": rows(2, 6, 4, dtype=torch.float16)}, r"share a dtype, not torch.float32, torch.float32, torch.float16"),
        ({"plan": plan_of(3)}, "the plan is for 3 heads, q has 2"),
    ],
)
def test_attention_refuses_inputs_that_do_not_fit_each_other(changes: dict[str, Any], message: str) -> None:
    inputs = {"q": rows(2, 5, 4), "k": rows(2, 6, 4), "v": rows(2, 6, 4), "plan": plan_of(2)} | changes
    with pytest.raises(ValueError, match=message):
        reference.attention(**inputs)
