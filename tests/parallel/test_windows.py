"""The direct exchange: threads stand for the ranks of one host, and their memory for the windows."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.dispatch import select
from semvid.kernels.layout import BlockMap, Plan, shared
from semvid.parallel import balance
from semvid.parallel.balance import Ints
from semvid.parallel.direct import ComingLoads, DirectExchange, Loads, plan_direct
from semvid.parallel.exchange import Counts
from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks
from semvid.parallel.ring import Attend, attend_through_windows
from semvid.parallel.shard import Shard
from semvid.parallel.windows import ROWS_STEP, Views, Windows
from semvid.runtime.models.predicted_memory import WAYS

OPS = select("reference", torch.device("cpu"))


class SharedMemory:
    """What `Windows` is on GPUs."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.threads = threading.Barrier(world)
        self.memory: Views | None = None
        self.lock = threading.Lock()

    def of(self, ranks: Ranks) -> "OneWindow":
        return OneWindow(self, ranks)


class OneWindow:
    def __init__(self, whole: SharedMemory, ranks: Ranks) -> None:
        self.whole, self.ranks = whole, ranks

    def views(self, q_rows: int, kv_rows: int, like: Tensor) -> Views:
        D, rows = like.shape[-1], (q_rows, kv_rows, kv_rows, q_rows)
        # Who grows the memory must not do so under the others.
        self.barrier()
        with self.whole.lock:
            found = self.whole.memory
            if found is None or tuple(x.blocks[0].shape[1] for x in found) != rows:
                blocks = [[torch.full((1, n, D), torch.nan) for _ in range(self.whole.world)] for n in rows]
                self.whole.memory = found = Views(*(shared(of_rank, like.device) for of_rank in blocks))
        self.barrier()
        assert self.whole.memory is found, "all ranks ask for the same"
        return found

    def barrier(self) -> None:
        self.whole.threads.wait(20)


class Case(NamedTuple):
    """Labels and map of a whole sequence."""

    labels: tuple[Tensor, Tensor]
    selected: Tensor

    def loads(self) -> tuple[Ints, Ints]:
        """Rows and keys, as `balance` reads them."""
        rows, keys = (OPS.group(side, C).offsets.diff(dim=1) for side, C in zip(self.labels, (4, 6), strict=True))
        return rows.numpy().astype("int64"), torch.where(self.selected, keys[:, None], 0).sum(-1).numpy()

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the selected pairs."""
        selected, (of_q, of_k) = self.selected, self.labels
        skipped = ~torch.stack([selected[h][of_q[h].long()][:, of_k[h].long()] for h in range(len(q))])
        scores = (q @ k.mT / q.shape[2] ** 0.5).masked_fill(skipped, -torch.inf)
        return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def case(H: int, N: int, seed: int) -> Case:
    """A draw of clusters; of every third, all tokens of each head are in one."""
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(C, (H, N), generator=generator, dtype=torch.int32) for C in (4, 6)]
    if seed % 3 == 2:
        labels = [side[:, :1].expand(H, N).contiguous() for side in labels]
    selected = torch.rand(H, 4, 6, generator=generator) < 0.5
    selected[..., 0] = True
    return Case((labels[0], labels[1]), selected)


def exchange_of(
    rank: int, world: int, whole: Case, x: list[Tensor], before: DirectExchange | None = None
) -> DirectExchange:
    """The exchange of one rank, from the labels of the whole sequence."""
    labels, selected = whole
    shards = [Shard(i, world, labels[0].shape[1]) for i in range(world)]
    clusters = selected.shape[1:]
    parts = [[side[:, s.first : s.first + s.tokens].contiguous() for s in shards] for side in labels]
    runs = [[OPS.group(part, C) for part in side] for side, C in zip(parts, clusters, strict=True)]
    counts = [torch.stack([one.offsets.diff(dim=1) for one in side]) for side in runs]
    computed = torch.where(selected, counts[1].sum(0)[:, None], 0).sum(-1).to(torch.int32)
    ranks = Ranks(Mesh(ulysses=world), rank)
    orders = runs[0][rank], runs[1][rank]
    return plan_direct(Counts(counts[0], counts[1], computed), orders, ranks, OPS, before=before)


@pytest.mark.parametrize(("world", "H", "N"), [(2, 5, 41), (3, 4, 30), (4, 1, 60), (4, 7, 5), (2, 1, 3)])
def test_rows_written_to_where_they_belong_give_what_one_rank_gives(
    world: int, H: int, N: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "TILE_ROWS", 4)
    generator = torch.Generator().manual_seed(world)
    q, k = (torch.randn(H, N, 8, generator=generator) for _ in range(2))
    v = torch.randn(N, H, 8, generator=generator).transpose(0, 1)
    # Refreshes: the clusters of each are others, its cuts those of the one before.
    refreshes, memory = [case(H, N, seed) for seed in range(4)], SharedMemory(world)

    def one(rank: int) -> list[Tensor]:
        shard, ranks = Shard(rank, world, N), Ranks(Mesh(ulysses=world), rank)
        mine = [x[:, shard.first : shard.first + shard.tokens] for x in (q, k, v)]
        results, exchange = [], None
        for number, whole in enumerate(refreshes):
            exchange = exchange_of(rank, world, whole, mine, exchange)
            assert exchange.pieces == balance.balance(*refreshes[max(0, number - 1)].loads(), world)[rank]
            selected = BlockMap(whole.selected[exchange.heads])
            attend = attention_by(reference.plan(exchange.q_offsets, exchange.k_offsets[0], selected))
            # Twice, as layers follow each other through the same memory.
            for factor in (1.0, 2.0):
                given = *mine[:2], factor * mine[2], exchange, attend, OPS, memory.of(ranks)
                results.append(attend_through_windows(*given))  # type: ignore[arg-type]
        return results

    with ThreadPoolExecutor(world) as pool:
        found = [torch.cat(parts, dim=1) for parts in zip(*pool.map(one, range(world)), strict=True)]
    for number, whole in enumerate(refreshes):
        exact = whole.exact(q, k, v)
        torch.testing.assert_close(found[2 * number], exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2 * number + 1], 2 * exact, rtol=1e-5, atol=1e-5)


def attention_by(plan: Plan) -> Attend:
    """The reference's attention over a plan, as an exchange calls it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, hop: int, out: Tensor | None) -> tuple[Tensor, Tensor]:
        assert hop == 0
        return reference.attention(q, k, v, plan, out=out)

    return attend


def over_mean(whole: Case, exchange: DirectExchange) -> float:
    """The largest part's cost over the mean."""
    costs = [balance.cost(*whole.loads(), part) for part in exchange.parts]
    return max(costs) * len(costs) / sum(costs)


def test_a_refresh_waits_for_the_loads_of_the_one_before_and_not_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[ComingLoads] = []
    wait = ComingLoads.wait

    def noted(self: ComingLoads) -> Loads:
        waited.append(self)
        return wait(self)

    monkeypatch.setattr(ComingLoads, "wait", noted)
    x = [torch.randn(3, 10, 8) for _ in range(3)]
    first = exchange_of(0, 2, case(3, 20, 0), x)
    second = exchange_of(0, 2, case(3, 20, 1), x, first)
    assert waited == [first.loads, first.loads]
    # A reuse asks whether its own loads, which have come by then, were cut evenly.
    assert not first.is_uneven()
    assert second.imbalance() == pytest.approx(over_mean(case(3, 20, 1), second))
    assert second.is_uneven() == (second.imbalance() > 1 + balance.WHOLE_HEADS_TOLERANCE)
    assert set(waited[2:]) == {second.loads}
    del waited[2:]
    # Rows of another number are of another job.
    x = [torch.randn(3, 6, 8) for _ in range(3)]
    other = exchange_of(0, 2, case(3, 12, 1), x, second)
    assert waited[2:] == [other.loads]


def test_a_way_is_no_longer_than_predicted() -> None:
    H, N, x = 4, 24, [torch.randn(4, 12, 8) for _ in range(3)]
    # One cluster has everything: heads stay whole.
    whole = Case(case(H, N, 2).labels, torch.ones(H, 4, 6, dtype=torch.bool))
    exchange = exchange_of(1, 2, whole, x)
    assert all(piece.last - piece.first == N for piece in exchange.pieces)
    ways = exchange.queries, exchange.keys
    assert sum(part.nbytes for way in ways for part in way[1:]) == WAYS * H * N // 2


class Reserved:
    """Stands in for symmetric memory, this rank's for everyone's."""

    def __init__(self) -> None:
        self.handle, self.memory = self, torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int, device: torch.device) -> bool:
        grows = self.memory.numel() < size
        if grows:
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        return grows

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, start: int) -> Tensor:
        size = torch.Size(shape).numel()
        return self.memory.view(dtype)[start : start + size].view(shape)


def test_layers_cut_otherwise_share_views_with_room_for_each() -> None:
    windows = Windows(Ranks(Mesh(ulysses=2)))
    windows._inputs, windows._results = Reserved(), Reserved()  # type: ignore[assignment]
    like = torch.empty(1, 1, 4)
    first = windows.views(ROWS_STEP - 7, 2 * ROWS_STEP + 1, like)
    assert windows.views(5, 3 * ROWS_STEP, like) is first
    assert [view.blocks[0].shape[1] // ROWS_STEP for view in first] == [1, 3, 3, 1]
    places = [view.blocks[1].data_ptr() for view in first[:3]]
    sizes = [view.blocks[1].nbytes for view in first[:3]]
    assert [b - a for a, b in itertools.pairwise(places)] == sizes[:2]
    assert windows.views(ROWS_STEP + 1, 1, like) is not first
