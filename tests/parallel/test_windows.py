"""The direct exchange: threads stand for the ranks of one host, and their memory for the windows."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.dispatch import select
from semvid.kernels.layout import BlockMap
from semvid.parallel import balance
from semvid.parallel.exchange import Counts, Exchange, layout, plan_exchange
from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks
from semvid.parallel.ring import attend_through_windows
from semvid.parallel.shard import Shard
from semvid.parallel.windows import View

OPS = select("reference", torch.device("cpu"))


class SharedMemory:
    """What `Windows` is on GPUs."""

    def __init__(self, world: int) -> None:
        self.threads = threading.Barrier(world)
        self.memory: dict[int, View] = {}
        self.lock = threading.Lock()

    def of(self, ranks: Ranks) -> "OneWindow":
        return OneWindow(self, ranks)


class OneWindow:
    def __init__(self, shared: SharedMemory, ranks: Ranks) -> None:
        self.shared, self.ranks = shared, ranks

    def views(self, q_rows: int, kv_rows: int, like: Tensor) -> list[View]:
        world, D = self.ranks.mesh.sequence, like.shape[-1]
        with self.shared.lock:
            for rank in range(world):
                if rank not in self.shared.memory:
                    sizes = (q_rows, kv_rows, kv_rows, q_rows)
                    self.shared.memory[rank] = View(*(torch.full((1, n, D), torch.nan) for n in sizes))
        views = [self.shared.memory[rank] for rank in range(world)]
        assert views[0].queries.shape[1] == q_rows
        assert views[0].keys.shape[1] == kv_rows
        return views

    def barrier(self) -> None:
        self.shared.threads.wait(20)


def exchange_of(
    rank: int, world: int, labels: tuple[Tensor, Tensor], selected: Tensor, x: list[Tensor]
) -> tuple[Exchange, Ranks]:
    """The direct exchange of one rank, from the labels of the whole sequence."""
    shards = [Shard(i, world, labels[0].shape[1]) for i in range(world)]
    clusters = selected.shape[1:]
    parts = [[side[:, s.first : s.first + s.tokens].contiguous() for s in shards] for side in labels]
    runs = [[OPS.group(part, C) for part in side] for side, C in zip(parts, clusters, strict=True)]
    counts = [torch.stack([one.offsets.diff(dim=1) for one in side]) for side in runs]
    computed = torch.where(selected, counts[1].sum(0)[:, None], 0).sum(-1).to(torch.int32)
    ranks = Ranks(Mesh(ulysses=world), rank)
    orders = runs[0][rank], runs[1][rank]
    layouts = layout(x[0]), layout(x[1]), layout(x[2])
    return plan_exchange(Counts(counts[0], counts[1], computed), orders, layouts, ranks, OPS, direct=True), ranks


@pytest.mark.parametrize(("world", "H", "N"), [(2, 5, 41), (3, 4, 30), (4, 1, 60), (4, 7, 5), (2, 1, 3)])
def test_rows_written_to_where_they_belong_give_what_one_rank_gives(
    world: int, H: int, N: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "TILE_ROWS", 4)
    generator = torch.Generator().manual_seed(world)
    q, k = (torch.randn(H, N, 8, generator=generator) for _ in range(2))
    v = torch.randn(N, H, 8, generator=generator).transpose(0, 1)
    labels = tuple(torch.randint(C, (H, N), generator=generator, dtype=torch.int32) for C in (4, 6))
    selected = torch.rand(H, 4, 6, generator=generator) < 0.5
    selected[..., 0] = True
    skipped = ~torch.stack([selected[h][labels[0][h].long()][:, labels[1][h].long()] for h in range(H)])
    scores = (q @ k.mT / 8**0.5).masked_fill(skipped, -torch.inf)
    exact = torch.softmax(scores, -1).nan_to_num(0.0) @ v
    shared = SharedMemory(world)

    def one(rank: int) -> Tensor:
        shard = Shard(rank, world, N)
        mine = [x[:, shard.first : shard.first + shard.tokens] for x in (q, k, v)]
        exchange, ranks = exchange_of(rank, world, (labels[0], labels[1]), selected, mine)
        plan = reference.plan(exchange.q_offsets, exchange.hops[0].offsets, BlockMap(selected[exchange.heads]))
        results = []
        # Twice, as layers follow each other through the same memory.
        for factor in (1.0, 2.0):
            results.append(
                attend_through_windows(
                    *mine[:2],
                    factor * mine[2],
                    exchange,
                    lambda q, k, v, hop, out: reference.attention(q, k, v, plan, out=out),
                    OPS,
                    shared.of(ranks),  # type: ignore[arg-type]
                )
            )
        torch.testing.assert_close(results[1], 2 * results[0])
        return results[0]

    with ThreadPoolExecutor(world) as pool:
        found = torch.cat(list(pool.map(one, range(world))), dim=1)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
