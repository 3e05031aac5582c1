"""The plan of attention against a plain reading of the map."""

import pytest
import torch
from torch import Tensor

from semvid.kernels.layout import BlockMap, Plan
from semvid.kernels.limits import cluster_bits, most_rows
from semvid.kernels.runs import ITEM_ROWS, Lists, plan
from tests.no_sync import no_sync


def offsets_of(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).to(torch.int32)


def random_case(H: int, Cq: int, Ck: int, seed: int, density: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q_offsets, k_offsets and a map over clusters of skewed sizes, about a quarter of them empty."""
    g = torch.Generator().manual_seed(seed)
    q_sizes = (torch.rand(H, Cq, generator=g).pow(3) * 400).int() * (torch.rand(H, Cq, generator=g) > 0.25)
    k_sizes = (torch.rand(H, Ck, generator=g).pow(4) * 60).int() * (torch.rand(H, Ck, generator=g) > 0.25)
    selected = (torch.rand(H, Cq, Ck, generator=g) < density) & (k_sizes > 0)[:, None]
    return offsets_of(q_sizes), offsets_of(k_sizes), selected


def made(q_offsets: Tensor, k_offsets: Tensor, selected: Tensor, device: torch.device) -> tuple[Plan, Lists]:
    """Returns the plan, and its lists on the CPU."""
    whole = plan(q_offsets.to(device), k_offsets.to(device), BlockMap(selected.to(device)))
    return whole, Lists(*(x.cpu() for x in whole.lists))


def rows_of_runs(lists: Lists, k_offsets: Tensor, h: int, i: int) -> tuple[list[int], int]:
    """Returns the key rows that query cluster i of head h walks, and the number of runs."""
    runs, keys, bits = int(lists.num_runs[h, i]), int(lists.num_keys[h, i]), cluster_bits(k_offsets.shape[1] - 1)
    words = lists.runs[h, i, :runs].tolist()
    bounds = [*(word >> bits for word in words), keys]
    firsts = [int(k_offsets[h, word % (1 << bits)]) for word in words]
    rows = [n - bounds[r] + firsts[r] for r in range(runs) for n in range(bounds[r], bounds[r + 1])]
    return rows, runs


def rows_of_map(k_offsets: Tensor, on: Tensor) -> tuple[list[int], int]:
    """Returns the key rows of the selected clusters, ascending, and how many runs of consecutive rows they form."""
    bounds = k_offsets.tolist()
    rows = [row for j in on.nonzero().flatten().tolist() for row in range(bounds[j], bounds[j + 1])]
    return rows, sum(row - 1 != before for before, row in zip([-2, *rows], rows, strict=False))


@pytest.mark.parametrize(("H", "Cq", "Ck"), [(1, 1, 1), (2, 5, 63), (3, 7, 100), (1, 3, 1), (2, 2, 130)])
def test_runs_list_exactly_the_selected_rows(H: int, Cq: int, Ck: int, device: torch.device) -> None:
    q_offsets, k_offsets, selected = random_case(H, Cq, Ck, seed=Ck)
    _, lists = made(q_offsets, k_offsets, selected, device)
    for h in range(H):
        for i in range(Cq):
            assert rows_of_runs(lists, k_offsets, h, i) == rows_of_map(k_offsets[h], selected[h, i])


def test_more_clusters_than_one_block(device: torch.device) -> None:
    q_offsets, k_offsets, selected = random_case(1, 2, 2100, seed=5)
    _, lists = made(q_offsets, k_offsets, selected, device)
    for i in range(2):
        assert rows_of_runs(lists, k_offsets, 0, i) == rows_of_map(k_offsets[0], selected[0, i])


def test_neighbours_and_clusters_around_an_empty_one_join(device: torch.device) -> None:
    k_offsets = offsets_of(torch.tensor([[0, 4, 0, 0, 3, 5, 1, 0]]))
    selected = torch.tensor([[[0, 1, 0, 0, 1, 0, 1, 0]]]).bool()
    _, lists = made(torch.tensor([[0, 9]]).int(), k_offsets, selected, device)
    assert rows_of_runs(lists, k_offsets, 0, 0) == ([0, 1, 2, 3, 4, 5, 6, 12], 2)


def test_every_other_cluster_fills_the_list_to_its_last_place(device: torch.device) -> None:
    k_offsets = offsets_of(torch.ones(1, 33, dtype=torch.int32))
    selected = (torch.arange(33) % 2 == 0)[None, None]
    _, lists = made(torch.tensor([[0, 1]]).int(), k_offsets, selected, device)
    assert lists.runs.shape[2] == 17 == int(lists.num_runs[0, 0])
    assert rows_of_runs(lists, k_offsets, 0, 0) == (list(range(0, 33, 2)), 17)


def test_a_full_map_is_one_run_and_an_empty_row_none(device: torch.device) -> None:
    q_offsets, k_offsets, selected = random_case(1, 2, 40, seed=1)
    selected[0, 0], selected[0, 1] = k_offsets[0].diff() > 0, False
    _, lists = made(q_offsets, k_offsets, selected, device)
    assert lists.num_runs.tolist() == [[1, 0]]
    assert lists.num_keys.tolist() == [[int(k_offsets[0, -1]), 0]]


def test_a_selected_empty_cluster_adds_nothing(device: torch.device) -> None:
    k_offsets = offsets_of(torch.tensor([[3, 0, 2]]))
    selected = torch.tensor([[[False, True, True]]])
    _, lists = made(torch.tensor([[0, 4]]).int(), k_offsets, selected, device)
    assert rows_of_runs(lists, k_offsets, 0, 0) == ([3, 4], 1)


@pytest.mark.parametrize(("H", "Cq"), [(1, 1), (5, 7), (1, 260)])
def test_heads_go_by_work_and_clusters_by_length(H: int, Cq: int, device: torch.device) -> None:
    q_offsets, k_offsets, selected = random_case(H, Cq, 20, seed=H)
    if H > 2:
        # Equal work must go by index, to the last bit the same every time.
        q_offsets[2], k_offsets[2], selected[2] = q_offsets[1], k_offsets[1], selected[1]
    _, lists = made(q_offsets, k_offsets, selected, device)
    sizes = q_offsets.diff(dim=1).tolist()
    keys = torch.einsum("hik,hk->hi", selected.int(), k_offsets.diff(dim=1)).tolist()
    work = [sum(s * n for s, n in zip(sizes[h], keys[h], strict=True)) for h in range(H)]
    heads = sorted(range(H), key=lambda h: -work[h])
    order = [(h, i) for h in heads for i in sorted(range(Cq), key=lambda i, h=h: -keys[h][i])]
    assert lists.order.tolist() == [h * Cq + i for h, i in order]
    items = [-(-sizes[h][i] // ITEM_ROWS) for h, i in order]
    assert lists.first_item.tolist() == [sum(items[:n]) for n in range(H * Cq + 1)]


def test_no_query_cluster_at_all(device: torch.device) -> None:
    _, lists = made(torch.zeros(2, 1).int(), torch.tensor([[0, 3]] * 2).int(), torch.ones(2, 0, 1).bool(), device)
    assert lists.first_item.tolist() == [0]


def test_starts_reach_to_the_last_bit(device: torch.device) -> None:
    Ck = 2000
    N = most_rows(Ck)
    assert N == 1 << 20
    k_offsets = torch.linspace(0, N, Ck + 1, dtype=torch.float64).round().int()[None]
    # All but the next to last: the last run starts at its highest possible place but for one cluster.
    selected = (torch.arange(Ck) != Ck - 2)[None, None]
    _, lists = made(torch.tensor([[0, 1]]).int(), k_offsets, selected, device)
    assert rows_of_runs(lists, k_offsets, 0, 0) == rows_of_map(k_offsets[0], selected[0, 0])
    assert (lists.runs[0, 0, :2] >= 0).all()


def test_memory_at_wan_14b_720p_is_under_64_mb(device: torch.device) -> None:
    H, Cq, Ck = 2, 3, 10
    whole, lists = made(*random_case(H, Cq, Ck, seed=0), device)
    assert sum(x.numel() for x in lists) == H * Cq * (Ck // 2) + 4 * H * Cq + 1
    assert all(x.dtype == torch.int32 for x in whole.lists)
    # With 2000 key clusters, twice as many as the preset's.
    assert 4 * (40 * 300 * 1000 + 4 * 40 * 300 + 1) < 64e6


def test_rejects_offsets_of_another_number_of_clusters(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"k_offsets must be int32 \[1, 4\]"):
        made(torch.tensor([[0, 1]]).int(), torch.tensor([[0, 1]]).int(), torch.ones(1, 1, 3).bool(), device)


@pytest.mark.gpu
def test_real_size_without_sync_and_the_same_twice(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    k_sizes = torch.rand(40, 1000, generator=g).pow(2).mul(228).int()
    q_sizes = torch.rand(40, 300, generator=g).pow(2).mul(756).int()
    share = torch.linspace(0.1, 0.9, 40)[:, None, None]
    selected = ((torch.rand(40, 300, 1000, generator=g) < share) & (k_sizes > 0)[:, None]).to(device)
    q_offsets, k_offsets = offsets_of(q_sizes).to(device), offsets_of(k_sizes).to(device)
    plan(q_offsets, k_offsets, BlockMap(selected))
    with no_sync():
        first, second = (plan(q_offsets, k_offsets, BlockMap(selected)) for _ in range(2))
    lists, again = Lists(*first.lists), Lists(*second.lists)
    assert sum(x.nbytes for x in lists) < 64e6
    for name in ("num_runs", "num_keys", "order", "first_item"):
        assert torch.equal(getattr(lists, name), getattr(again, name))
    on_cpu = Lists(*(x.cpu() for x in lists))
    for h, i in [(0, 0), (7, 299), (39, 150)]:
        assert rows_of_runs(on_cpu, k_offsets.cpu(), h, i) == rows_of_map(k_offsets[h].cpu(), selected[h, i].cpu())
