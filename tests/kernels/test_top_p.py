"""The block map and its density against the reference; differences are allowed only where a rounded sum decides."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from semvid.kernels import kmeans, permute, reference, top_p
from semvid.kernels.layout import BlockMap, least_clusters
from tests.no_sync import no_sync


def make_inputs(H: int, Cq: int, Ck: int, D: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids with some strong matches, and uneven sizes, a tenth of them empty."""
    q, k = torch.randn(H, Cq, D, device=device), torch.randn(H, Ck, D, device=device)
    sizes = torch.randn(H, Ck, device=device).exp().mul(50).ceil()
    sizes[torch.rand(H, Ck, device=device) < 0.1] = 0
    return q * 2, k, sizes.to(torch.int32)


def assert_follows_rule(block_map: BlockMap, q: Tensor, k: Tensor, sizes: Tensor, p: float, floor: float) -> None:
    """Selected clusters weigh at least what the others do, reach p, and would not without the last; at least the floor.

    Checked in fp64, each comparison with the rounding of an fp32 sum.
    """
    H, Cq, Ck = block_map.selected.shape
    selected, occupied = block_map.selected, (sizes > 0)[:, None, :].expand(H, Cq, Ck)
    assert not (selected & ~occupied).any()
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1]) + sizes.double().log()[:, None, :]
    mass = torch.softmax(scores, -1)
    lightest = mass.masked_fill(~selected, math.inf).amin(-1)
    heaviest_left = mass.masked_fill(selected | ~occupied, 0).amax(-1)
    assert torch.all(lightest >= heaviest_left * (1 - 1e-4))
    taken = (mass * selected).sum(-1)
    rest = occupied.sum(-1) - selected.sum(-1)
    assert torch.all((taken >= p - 1e-4) | (rest == 0))
    least = torch.minimum(occupied.sum(-1), torch.tensor(math.ceil(round(floor * Ck, 6))))
    assert torch.all(selected.sum(-1) >= least)
    assert torch.all((taken - lightest < p + 1e-4) | (selected.sum(-1) == least))


@pytest.mark.parametrize(("p", "floor"), [(0.9, 0.1), (0.5, 0.0), (0.2, 0.4), (0.001, 0.0), (0.9999, 0.0), (0.7, 1.0)])
@pytest.mark.parametrize(("Cq", "Ck", "D"), [(5, 100, 64), (3, 63, 48), (2, 257, 128)])
def test_map_follows_the_rule_and_the_reference(
    Cq: int, Ck: int, D: int, p: float, floor: float, device: torch.device
) -> None:
    q, k, sizes = make_inputs(2, Cq, Ck, D, device)
    found = top_p.top_p_map(q, k, sizes, p, floor)
    assert found.selected.dtype == torch.bool
    assert_follows_rule(found, q, k, sizes, p, floor)
    expected = reference.top_p_map(q, k, sizes, p, floor)
    assert (found.selected != expected.selected).sum() <= 1 + found.selected.numel() // 1000


@pytest.mark.parametrize(("p", "floor"), [(0.5, 0.0), (0.25, 0.5), (0.3, 0.0), (0.1, 1.0)])
@pytest.mark.parametrize("Ck", [1, 8, 64])
def test_equal_masses_are_taken_by_index(Ck: int, p: float, floor: float, device: torch.device) -> None:
    q, k = torch.zeros(1, 3, 16, device=device), torch.randn(1, Ck, 16, device=device)
    sizes = torch.full((1, Ck), 5, dtype=torch.int32, device=device)
    found = top_p.top_p_map(q, k, sizes, p, floor).selected
    assert torch.equal(found, reference.top_p_map(q, k, sizes, p, floor).selected)
    count = max(math.ceil(p * Ck), math.ceil(floor * Ck))
    assert torch.equal(found, (torch.arange(Ck, device=device) < count).expand(1, 3, Ck))


@pytest.mark.parametrize(("slope", "expected"), [(0.0, [0, 1, 3, 4, 13]), (1.0, [13, 16, 17, 18, 19])])
def test_clusters_without_weight_fill_the_floor_by_score(
    slope: float, expected: list[int], device: torch.device
) -> None:
    # One key takes all the mass; the others' underflows to 0, and so does an empty cluster's, which is taken last.
    q, k = torch.full((1, 2, 16), 40.0, device=device), torch.full((1, 20, 16), -40.0, device=device)
    k += slope * torch.arange(20, device=device)[:, None]
    k[0, 13] = 40.0
    sizes = torch.full((1, 20), 3, dtype=torch.int32, device=device)
    sizes[0, 2] = 0
    found = top_p.top_p_map(q, k, sizes, 0.9, 0.25).selected
    assert torch.equal(found, reference.top_p_map(q, k, sizes, 0.9, 0.25).selected)
    assert found[0, 0].nonzero().flatten().tolist() == expected


def greedy(q: Tensor, k: Tensor, sizes: Tensor, p: float, bias: Tensor) -> Tensor:
    """The rule with a bias, cluster by cluster in fp64: most weight a key first, until p of the weight is there."""
    per_key = (q.double() @ k.double().mT / math.sqrt(q.shape[-1]) + bias.double()[:, None]).exp()
    selected = torch.zeros(per_key.shape, dtype=torch.bool)
    for h, i in torch.cartesian_prod(*(torch.arange(n) for n in per_key.shape[:2])).tolist():
        weights = per_key[h, i] * sizes[h]
        taken = 0.0
        for j in per_key[h, i].argsort(descending=True).tolist():
            if sizes[h, j] > 0 and taken < p * weights.sum():
                selected[h, i, j] = True
                taken += float(weights[j])
    return selected


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_with_a_bias_the_most_weight_for_the_fewest_keys_is_taken(p: float, device: torch.device) -> None:
    q, k, sizes = make_inputs(2, 5, 63, 64, device)
    bias = torch.randn(2, 63, device=device)
    expected = greedy(q.cpu(), k.cpu(), sizes.cpu(), p, bias.cpu())
    assert torch.equal(reference.top_p_map(q, k, sizes, p, 0.0, bias).selected.cpu(), expected)
    assert torch.equal(top_p.top_p_map(q, k, sizes, p, 0.0, bias).selected.cpu(), expected)


def test_each_head_may_have_its_own_p(device: torch.device) -> None:
    q, k, sizes = make_inputs(3, 5, 63, 64, device)
    p = torch.tensor([0.2, 0.9, 1.0], device=device)
    for bias in (None, torch.zeros(3, 63, device=device)):
        for op in (top_p.top_p_map, reference.top_p_map):
            found = op(q, k, sizes, p, 0.1, bias).selected
            for h in range(3):
                alone = op(
                    q[h : h + 1], k[h : h + 1], sizes[h : h + 1], float(p[h]), 0.1, bias if bias is None else bias[:1]
                )
                assert torch.equal(found[h : h + 1], alone.selected)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("Ck", [1, 63, 100, 257])
def test_each_head_may_have_its_own_floor(Ck: int, biased: bool, p: float, device: torch.device) -> None:
    q, k, sizes = make_inputs(5, 5, Ck, 64, device)
    bias = torch.randn(5, Ck, device=device) if biased else None
    floors = [0.0, 1e-4, 0.07, 0.5, 1.0]
    of_heads = torch.tensor(floors, device=device)
    expected = reference.top_p_map(q, k, sizes, p, of_heads, bias).selected
    assert torch.equal(top_p.top_p_map(q, k, sizes, p, of_heads, bias).selected, expected)
    for op in (top_p.top_p_map, reference.top_p_map):
        for h, floor in enumerate(floors):
            one = slice(h, h + 1)
            alone = op(q[one], k[one], sizes[one], p, floor, bias if bias is None else bias[one])
            assert torch.equal(expected[one], alone.selected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("p", [0.0, torch.zeros(3)])
def test_with_p_zero_the_floor_alone_selects(p: float | Tensor, biased: bool, device: torch.device) -> None:
    q, k, sizes = make_inputs(3, 5, 100, 64, device)
    p = p.to(device) if isinstance(p, Tensor) else p
    sizes[2] = 0
    sizes[2, 40:44] = 7
    bias = torch.randn(3, 100, device=device) if biased else None
    for op in (top_p.top_p_map, reference.top_p_map):
        for floor, least in ((0.0, 0), (0.07, 7), (0.0701, 8), (1.0, 100)):
            counts = op(q, k, sizes, p, floor, bias).selected.sum(-1)
            assert torch.equal(counts, (sizes > 0).sum(-1).clamp(max=least)[:, None].expand(3, 5))


@pytest.mark.parametrize("Ck", [1, 7, 100, 222, 1000, 4097, 8192])
def test_a_floor_keeps_the_same_count_as_a_number_and_as_a_tensor(Ck: int, device: torch.device) -> None:
    shares = [Fraction(k, Ck) for k in range(0, Ck + 1, max(1, Ck // 50))]
    shares += [Fraction(k, 1000) for k in range(0, 1001, 7)]
    counts = [math.ceil(share * Ck) for share in shares]
    floors = [float(share) for share in shares]
    as_tensor = least_clusters(torch.tensor(floors, device=device), len(floors), Ck, device)
    assert as_tensor.tolist() == counts
    assert [least_clusters(floor, 1, Ck, device).item() for floor in floors] == counts


def test_equal_weights_of_unequal_sizes_are_taken_by_index(device: torch.device) -> None:
    q, k = torch.zeros(1, 2, 16, device=device), torch.randn(1, 4, 16, device=device)
    sizes = torch.tensor([[5, 1, 1, 3]], dtype=torch.int32, device=device)
    for op in (top_p.top_p_map, reference.top_p_map):
        found = op(q, k, sizes, 0.65, 0.0, torch.zeros(1, 4, device=device)).selected
        assert found[0].tolist() == [[True, True, True, False]] * 2


def test_budgets_of_other_shapes_are_refused(device: torch.device) -> None:
    q, k, sizes = make_inputs(2, 3, 10, 64, device)
    for op in (top_p.top_p_map, reference.top_p_map):
        with pytest.raises(ValueError, match=r"p must be fp32 \[2\], not torch.float32 \[3\]"):
            op(q, k, sizes, torch.ones(3, device=device) / 2, 0.1)
        for floor in (torch.ones(3, device=device), torch.ones(2, device=device).double()):
            with pytest.raises(ValueError, match=r"floor must be fp32 \[2\], not torch.float"):
                op(q, k, sizes, 0.5, floor)
        with pytest.raises(ValueError, match=r"bias must be fp32 \[2, 10\], not torch.float64"):
            op(q, k, sizes, 0.5, 0.1, torch.ones(2, 10, device=device).double())


def test_a_floor_above_the_number_of_clusters_with_tokens_takes_them_all(device: torch.device) -> None:
    q, k, sizes = make_inputs(1, 5, 63, 64, device)
    sizes[0, :60] = 0
    assert torch.equal(top_p.top_p_map(q, k, sizes, 0.1, 0.5).selected, (sizes > 0)[:, None].expand(1, 5, 63))


@pytest.mark.parametrize("p", [1.0, 1.5])
def test_p_one_takes_every_cluster_with_tokens(p: float, device: torch.device) -> None:
    q, k, sizes = make_inputs(2, 3, 100, 64, device)
    assert torch.equal(top_p.top_p_map(q, k, sizes, p, 0.0).selected, (sizes > 0)[:, None].expand(2, 3, 100))


def test_a_floor_of_seven_hundredths_of_100_is_7(device: torch.device) -> None:
    # In floats 0.07 · 100 is 7.000000000000001.
    q, k, _ = make_inputs(1, 2, 100, 64, device)
    sizes = torch.ones(1, 100, dtype=torch.int32, device=device)
    assert top_p.top_p_map(q, k, sizes, 0.001, 0.07).selected.sum(-1).flatten().tolist() == [7, 7]


def test_without_tokens_nothing_is_selected(device: torch.device) -> None:
    q, k, sizes = make_inputs(1, 3, 63, 64, device)
    found = top_p.top_p_map(q, k, torch.zeros_like(sizes), 0.9, 0.1)
    assert not found.selected.any()
    assert top_p.density(found, torch.ones(1, 3, dtype=torch.int32, device=device), torch.zeros_like(sizes)).item() == 0


def test_one_cluster_with_tokens_is_always_taken(device: torch.device) -> None:
    q, k, sizes = make_inputs(1, 3, 63, 64, device)
    sizes = torch.zeros_like(sizes)
    sizes[0, 62] = 1
    assert top_p.top_p_map(q, k, sizes, 0.1, 0.0).selected.sum(-1).flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize(("Cq", "Ck"), [(1, 1), (5, 63), (100, 257), (17, 600)])
def test_density_counts_token_pairs_exactly(Cq: int, Ck: int, device: torch.device) -> None:
    block_map = BlockMap(torch.rand(3, Cq, Ck, device=device) < 0.4)
    # 2^40 pairs and more: neither fp32 nor int32 holds the sums.
    q_sizes = torch.randint(0, 1 << 20, (3, Cq), dtype=torch.int32, device=device)
    k_sizes = torch.randint(0, 1 << 20, (3, Ck), dtype=torch.int32, device=device)
    expected = reference.density(block_map, q_sizes, k_sizes)
    torch.testing.assert_close(top_p.density(block_map, q_sizes, k_sizes), expected, rtol=1e-7, atol=0)


def test_density_of_a_full_map_is_one(device: torch.device) -> None:
    sizes = torch.randint(0, 1 << 15, (2, 100), dtype=torch.int32, device=device)
    full = BlockMap(torch.ones(2, 100, 100, dtype=torch.bool, device=device))
    assert top_p.density(full, sizes, sizes).tolist() == [1.0, 1.0]


def test_wrong_inputs_are_refused(device: torch.device) -> None:
    q, k, sizes = make_inputs(2, 3, 10, 64, device)
    with pytest.raises(ValueError, match=r"k_centroids must be float32 \[2, C, 64\]"):
        top_p.top_p_map(q, k.half(), sizes, 0.9, 0.1)
    with pytest.raises(ValueError, match=r"k_sizes must be int32 \[2, 10\]"):
        top_p.top_p_map(q, k, sizes.long(), 0.9, 0.1)
    with pytest.raises(ValueError, match="head dim is 8; accepted"):
        top_p.top_p_map(q[..., :8], k[..., :8], sizes, 0.9, 0.1)
    with pytest.raises(ValueError, match=r"q_sizes must be int32 \[2, 3\]"):
        top_p.density(BlockMap(torch.zeros(2, 3, 10, dtype=torch.bool, device=device)), sizes, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "Cq", "Ck"), [(40, 300, 1000), (24, 400, 1000), (4, 300, 4096)])
@pytest.mark.parametrize(("p", "floor"), [(0.9, 0.1), (0.4, 0.0)])
def test_map_at_real_size(H: int, Cq: int, Ck: int, p: float, floor: float, device: torch.device) -> None:
    q, k, sizes = make_inputs(H, Cq, Ck, 128, device)
    found = top_p.top_p_map(q, k, sizes, p, floor)
    assert torch.equal(found.selected, top_p.top_p_map(q, k, sizes, p, floor).selected)
    assert_follows_rule(found, q, k, sizes, p, floor)
    expected = reference.top_p_map(q, k, sizes, p, floor)
    assert (found.selected != expected.selected).double().mean() < 1e-4
    q_sizes = torch.randint(0, 1000, (H, Cq), dtype=torch.int32, device=device)
    share = top_p.density(found, q_sizes, sizes)
    torch.testing.assert_close(share, reference.density(found, q_sizes, sizes), rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_the_map_never_waits_for_the_host(device: torch.device) -> None:
    q, k = torch.randn(4, 30, 128, device=device), torch.randn(4, 100, 128, device=device)
    sizes = torch.ones(4, 100, dtype=torch.int32, device=device)
    q_sizes, floors = torch.ones(4, 30, dtype=torch.int32, device=device), torch.rand(4, device=device)
    with no_sync():
        by_floor = top_p.top_p_map(q, k, sizes, 0.0, floors)
        found = top_p.top_p_map(q, k, sizes, 0.9, 0.1)
        share = top_p.density(found, q_sizes, sizes)
    for mine, (p, floor) in ((by_floor, (0.0, floors)), (found, (0.9, 0.1))):
        assert (mine.selected != reference.top_p_map(q, k, sizes, p, floor).selected).double().mean() < 1e-3
    torch.testing.assert_close(share, reference.density(found, q_sizes, sizes), rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_clusters_and_map_replay_from_a_cuda_graph(device: torch.device) -> None:
    x = torch.randn(4, 5000, 128, device=device, dtype=torch.bfloat16)
    centroids = torch.randn(4, 100, 128, device=device)

    def refresh() -> tuple[Tensor, ...]:
        labels = kmeans.assign(x, centroids)
        permutation = permute.group(labels, 100)
        sums, counts = kmeans.sums_by_runs(x, permutation)
        block_map = top_p.top_p_map(sums, sums, counts, 0.9, 0.1)
        rows = permute.gather_rows(x, permutation.order)
        return labels, *permutation, sums, counts, *block_map, top_p.density(block_map, counts, counts), rows

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        refresh()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = refresh()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for one, other in zip(replayed, refresh(), strict=True):
        assert torch.equal(one, other)
