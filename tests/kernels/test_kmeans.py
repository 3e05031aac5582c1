"""Nearest centroids and cluster sums against the reference; labels tie-aware, or exactly where ties are exact."""

import math

import pytest
import torch
from torch import Tensor

from semvid.kernels import kmeans, permute, reference
from semvid.kernels.layout import Permutation
from tests.no_sync import no_sync

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# What rounding a centroid to the dtype may move it by, relative to its norm.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
KINDS = ["random", "skewed", "all in one", "few of many", "one token each"]


@pytest.fixture
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and spans at toy sizes; the real lengths run in the gpu tests."""
    monkeypatch.setattr(permute, "SORT_BLOCK", 64)
    monkeypatch.setattr(kmeans, "SPAN", 32)


def clustered(H: int, N: int, C: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens around C points, and centroids near these points."""
    points = torch.randn(H, C, D, device=device)
    member = torch.randint(C, (H, N, 1), device=device).expand(-1, -1, D)
    x = torch.empty(H, N, D, device=device).normal_(std=0.7).add_(points.gather(1, member)).to(dtype)
    return x, points.add_(torch.randn(H, C, D, device=device), alpha=0.1)


def assert_nearest(labels: Tensor, x: Tensor, centroids: Tensor) -> None:
    """Each label's centroid is the nearest, or as near as rounding of the centroids allows."""
    assert labels.dtype == torch.int32
    assert 0 <= int(labels.min()) <= int(labels.max()) < centroids.shape[1]
    distance = torch.cdist(x.double(), centroids.double())
    norm = centroids.double().norm(dim=-1)
    at = labels.long()[..., None]
    best, nearest = distance.min(-1)
    allowed = UNIT[x.dtype] * (norm.gather(1, at[..., 0]) + norm.gather(1, nearest))
    rounding = 2.0**-20 * (x.double().norm(dim=-1) + norm.amax()).square()
    assert torch.all(distance.gather(-1, at)[..., 0].square() <= (best + allowed).square() + rounding)
    assert (at[..., 0] != nearest).double().mean() < 0.02


def make_labels(kind: str, H: int, N: int, C: int, device: torch.device) -> Tensor:
    labels = torch.randint(C, (H, N), device=device)
    if kind == "skewed":
        labels = torch.where(torch.rand(H, N, device=device) < 0.8, C // 2, labels)
    elif kind == "all in one":
        labels.fill_(C // 3)
    elif kind == "few of many":
        labels = labels // 16 * 16
    elif kind == "one token each":
        labels = torch.arange(N, device=device).expand(H, N) % C
    return labels.to(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("H", "N", "C", "D"), [(2, 257, 37, 64), (1, 63, 100, 128), (3, 100, 5, 48), (1, 1, 1, 16), (1, 256, 130, 128)]
)
def test_labels_are_nearest_but_for_rounding(
    H: int, N: int, C: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, centroids = clustered(H, N, C, D, dtype, device)
    assert_nearest(kmeans.assign(x, centroids), x, centroids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 9, 200])
def test_ties_go_to_the_smaller_index(C: int, dtype: torch.dtype, device: torch.device) -> None:
    # Small integers: every product and sum is exact, and with two values in 16 dimensions many distances are equal.
    x = torch.randint(-1, 2, (2, 257, 16), device=device).to(dtype)
    centroids = torch.randint(-1, 2, (2, C, 16), device=device).float()
    centroids[:, C // 2 :] = centroids[:, : C - C // 2].clone()
    assert torch.equal(kmeans.assign(x, centroids), reference.assign(x, centroids))


@pytest.mark.parametrize("C", [63, 64, 65, 129])
def test_every_centroid_is_its_own_nearest(C: int, device: torch.device) -> None:
    x = torch.randn(2, C, 64, device=device).bfloat16()
    own = torch.arange(C, device=device, dtype=torch.int32).expand(2, C)
    assert torch.equal(kmeans.assign(x, x.float()), own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distances_are_exact_for_the_rounded_centroids(dtype: torch.dtype, device: torch.device) -> None:
    # A mean far from zero and close clusters: a norm that is not the rounded centroid's moves many labels.
    x, centroids = clustered(1, 257, 60, 64, dtype, device)
    x, centroids = (x * 0.2 + 8).to(dtype), centroids * 0.2 + 8
    distance = torch.cdist(x.double(), centroids.to(dtype).double()).square()
    label = kmeans.assign(x, centroids).long()[..., None]
    rounding = 2.0**-20 * x.double().square().sum(-1).amax()
    assert torch.all(distance.gather(-1, label)[..., 0] <= distance.amin(-1) + rounding)


def test_padding_never_wins_over_far_centroids(device: torch.device) -> None:
    # The zero rows that pad the centroids would be nearest.
    x = torch.randn(1, 63, 64, device=device).bfloat16()
    centroids = torch.randn(1, 3, 64, device=device).add(50).bfloat16().float()
    assert torch.equal(kmeans.assign(x, centroids), reference.assign(x, centroids))


# The interpreter's argmax refuses NaN.
@pytest.mark.gpu
def test_labels_of_broken_tokens_stay_in_range(device: torch.device) -> None:
    x, centroids = clustered(1, 100, 5, 64, torch.bfloat16, device)
    x[0, 3], x[0, 7], x[0, 9] = torch.nan, torch.inf, -torch.inf
    labels = kmeans.assign(x, centroids)
    assert 0 <= int(labels.min()) <= int(labels.max()) < 5


@pytest.mark.usefixtures("_short_spans")
def test_tokens_may_be_strided(device: torch.device) -> None:
    x, centroids = clustered(3, 100, 7, 64, torch.bfloat16, device)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    labels = kmeans.assign(x, centroids)
    assert torch.equal(kmeans.assign(strided, centroids), labels)
    for one, other in zip(kmeans.cluster_sums(strided, labels, 7), kmeans.cluster_sums(x, labels, 7), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_short_spans")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "D"), [(1, 64), (63, 48), (100, 128), (257, 64)])
def test_sums_and_counts_are_the_references(N: int, D: int, kind: str, device: torch.device) -> None:
    x = torch.randn(2, N, D, device=device).bfloat16()
    labels = make_labels(kind, 2, N, 37, device)
    sums, counts = kmeans.cluster_sums(x, labels, 37)
    expected, expected_counts = reference.cluster_sums(x, labels, 37)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("_short_spans")
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_integers_are_exact(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randint(-8, 9, (1, 257, 64), device=device).to(dtype)
    labels = make_labels("skewed", 1, 257, 5, device)
    assert torch.equal(kmeans.cluster_sums(x, labels, 5)[0], reference.cluster_sums(x, labels, 5)[0])


@pytest.mark.usefixtures("_short_spans")
def test_sums_of_a_run_over_many_spans_are_exact(device: torch.device) -> None:
    # 20 spans of one run: more than the last pass adds at a time.
    x = torch.randint(-8, 9, (1, 650, 16), device=device).float()
    labels = torch.zeros(1, 650, dtype=torch.int32, device=device)
    labels[0, ::65] = 1
    assert torch.equal(kmeans.cluster_sums(x, labels, 2)[0], reference.cluster_sums(x, labels, 2)[0])


@pytest.mark.usefixtures("_short_spans")
def test_grouped_tokens_give_the_same_sums(device: torch.device) -> None:
    x = torch.randn(2, 100, 64, device=device).bfloat16()
    labels = make_labels("random", 2, 100, 9, device)
    for one, other in zip(
        kmeans.sums_by_runs(x, permute.group(labels, 9)), kmeans.cluster_sums(x, labels, 9), strict=True
    ):
        assert torch.equal(one, other)


def test_rows_of_one_column_are_summed_too(device: torch.device) -> None:
    x, labels = torch.randn(2, 257, 1, device=device), make_labels("random", 2, 257, 9, device)
    order = permute.group(labels, 9)
    torch.testing.assert_close(kmeans.sums_by_runs(x, order)[0], reference.sums_by_runs(x, order)[0])


def test_no_tokens_have_zero_sums(device: torch.device) -> None:
    sums, counts = kmeans.cluster_sums(
        torch.zeros(2, 0, 16, device=device), torch.zeros(2, 0, dtype=torch.int32, device=device), 3
    )
    assert torch.equal(sums, torch.zeros(2, 3, 16, device=device))
    assert torch.equal(counts, torch.zeros(2, 3, dtype=torch.int32, device=device))


def test_wrong_inputs_are_refused(device: torch.device) -> None:
    x = torch.zeros(2, 5, 16, device=device)
    with pytest.raises(ValueError, match=r"centroids must be float32 \[2, C, 16\], not torch.float32 \[2, 3, 32\]"):
        kmeans.assign(x, torch.zeros(2, 3, 32, device=device))
    with pytest.raises(ValueError, match="centroids must be float32"):
        kmeans.assign(x, torch.zeros(2, 3, 16, device=device, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="holds no centroid"):
        kmeans.assign(x, torch.zeros(2, 0, 16, device=device))
    with pytest.raises(ValueError, match="head dim is 24; accepted: multiples of 16 up to 256"):
        kmeans.assign(torch.zeros(2, 5, 24, device=device), torch.zeros(2, 3, 24, device=device))
    with pytest.raises(ValueError, match=r"x is torch.float64; accepted"):
        kmeans.assign(x.double(), torch.zeros(2, 3, 16, device=device))
    with pytest.raises(ValueError, match=r"labels must be int32 \[2, 5\]"):
        kmeans.cluster_sums(x, torch.zeros(2, 5, device=device, dtype=torch.int64), 3)
    four = torch.zeros(2, 4, device=device, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"order must be int32 \[2, 5\]"):
        kmeans.sums_by_runs(x, Permutation(four, four))


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "N"), [(40, 75600), (24, 118800)])
@pytest.mark.parametrize("C", [300, 1000])
def test_one_iteration_at_real_size(H: int, N: int, C: int, device: torch.device) -> None:
    x, centroids = clustered(H, N, C, 128, torch.bfloat16, device)
    labels = kmeans.assign(x, centroids)
    assert torch.equal(labels, kmeans.assign(x, centroids))
    sums, counts = kmeans.cluster_sums(x, labels, C)
    for one, other in zip((sums, counts), kmeans.cluster_sums(x, labels, C), strict=True):
        assert torch.equal(one, other)
    for h in (0, H - 1):
        rows = torch.cat([torch.arange(256), torch.randint(N, (2000,)), torch.arange(N - 256, N)]).to(device)
        assert_nearest(labels[h : h + 1, rows], x[h : h + 1, rows], centroids[h : h + 1])
        exact = torch.zeros(C, 128, device=device, dtype=torch.float64).index_add_(0, labels[h].long(), x[h].double())
        torch.testing.assert_close(sums[h].double(), exact, rtol=1e-5, atol=1e-2)
        assert torch.equal(counts[h].long(), torch.bincount(labels[h], minlength=C))


@pytest.mark.gpu
def test_addresses_past_two_to_the_31_are_right(device: torch.device) -> None:
    x = torch.randn(220, 80_000, 128, device=device, dtype=torch.bfloat16)
    centroids = torch.randn(220, 10, 128, device=device)
    labels = kmeans.assign(x, centroids)
    assert torch.equal(labels[-1:], kmeans.assign(x[-1:], centroids[-1:]))
    sums, _ = kmeans.cluster_sums(x, labels, 10)
    assert torch.equal(sums[-1:], kmeans.cluster_sums(x[-1:], labels[-1:], 10)[0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("D", "dtype"),
    [(D, torch.bfloat16) for D in (16, 32, 80, 96, 256)] + [(256, torch.float32)],
)
def test_labels_at_other_head_dims(D: int, dtype: torch.dtype, device: torch.device) -> None:
    x, centroids = clustered(2, 3000, 333, D, dtype, device)
    assert_nearest(kmeans.assign(x, centroids), x, centroids)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_uneven_clusters_at_real_size(kind: str, device: torch.device) -> None:
    x = torch.randn(4, 75600, 128, device=device).bfloat16()
    labels = make_labels(kind, 4, 75600, 1000, device)
    sums, counts = kmeans.cluster_sums(x, labels, 1000)
    assert torch.equal(counts, reference.cluster_sums(x, labels, 1000)[1])
    rows = labels[0].long()
    exact = torch.zeros(1000, 128, device=device, dtype=torch.float64).index_add_(0, rows, x[0].double())
    torch.testing.assert_close(sums[0].double(), exact, rtol=1e-4, atol=5e-2)


@pytest.mark.parametrize(("C", "D", "kind"), [(1, 16, torch.int32), (33, 24, torch.float32), (70, 128, torch.int32)])
def test_centroids_are_means_and_empty_clusters_keep_theirs(
    C: int, D: int, kind: torch.dtype, device: torch.device
) -> None:
    g = torch.Generator().manual_seed(C)
    sums, previous = (torch.randn(3, C, D, generator=g).to(device) for _ in range(2))
    counts = torch.randint(0, 5, (3, C), generator=g).to(device, kind)
    # As an empty cluster's are after sums of other rows.
    counts[1], sums[1] = 0, torch.nan
    expected = reference.centroids_of(sums, counts, previous)
    for h, c in [(0, 0), (1, C - 1), (2, C // 2)]:
        assert torch.equal(expected[h, c], sums[h, c] / counts[h, c] if counts[h, c] > 0 else previous[h, c])
    for ops in (reference, kmeans):
        place, out = previous.clone(), torch.full_like(sums, torch.nan)
        assert torch.equal(ops.centroids_of(sums, counts, previous), expected)
        assert ops.centroids_of(sums, counts, previous, out) is out
        assert ops.centroids_of(sums, counts, place, out=place) is place
        assert torch.equal(out, expected)
        assert torch.equal(place, expected)


def test_what_centroids_are_made_of_fits() -> None:
    x, counts = torch.zeros(2, 3, 16), torch.zeros(2, 3)
    for ops in (reference, kmeans):
        with pytest.raises(ValueError, match=r"counts must be int32 or float32 \[2, 3\], not torch.float64"):
            ops.centroids_of(x, counts.double(), x)
        with pytest.raises(ValueError, match=r"previous must be float32 \[2, 3, 16\], not torch.bfloat16"):
            ops.centroids_of(x, counts, x.bfloat16())
        with pytest.raises(ValueError, match="out must be contiguous, its strides are"):
            ops.centroids_of(x, counts, x, torch.zeros(3, 2, 16).transpose(0, 1))


@pytest.mark.parametrize("choice", [(16, 1), (32, 2), (128, 4)])
def test_sums_do_not_hang_on_how_many_rows_are_added_at_once(
    choice: tuple[int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "SPAN", 64)
    x = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.randint(5, (2, 300), generator=torch.Generator().manual_seed(1)).to(device, torch.int32)
    labels[1] = 3
    expected = reference.cluster_sums(x, labels, 7)
    monkeypatch.setattr(kmeans, "SUMMED", ((math.inf, *choice),))
    sums, counts = kmeans.cluster_sums(x, labels, 7)
    torch.testing.assert_close(sums, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, expected[1])


@pytest.mark.gpu
def test_an_iteration_never_waits_for_the_host(device: torch.device) -> None:
    x = torch.randn(4, 5000, 128, device=device, dtype=torch.bfloat16)
    centroids = torch.randn(4, 100, 128, device=device)
    with no_sync():
        labels = kmeans.assign(x, centroids)
        found = [kmeans.cluster_sums(x, labels, 100)]
        permutation = permute.group(labels, 100)
        found.append(kmeans.sums_by_runs(x, permutation))
        back = permute.scatter_rows(permute.gather_rows(x, permutation.order), permutation.order)
    assert torch.equal(back, x)
    sums, counts = reference.cluster_sums(x.float(), labels, 100)
    for mine in found:
        torch.testing.assert_close(mine[0], sums, rtol=1e-4, atol=1e-3)
        assert torch.equal(mine[1], counts)
