"""The exchange: every op of a sharded call on several gloo ranks against the same call on one."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from semvid.kernels import permute
from semvid.kernels.dispatch import select
from semvid.kernels.layout import Tail
from semvid.parallel import balance
from semvid.parallel.direct import DirectExchange
from semvid.parallel.exchange import Exchange, flat_rows, layout
from semvid.parallel.maps import pack_bits
from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks, connect
from semvid.parallel.ring import attend_exchanged
from semvid.parallel.shard import Shard
from semvid.parallel.windows import open_windows
from semvid.runtime.attention.call import dense_attention, sparse_attention
from semvid.runtime.attention.refresh import made_ready, plans_of
from semvid.runtime.attention.schedule import Refresh, Reuse
from semvid.runtime.attention.session import Position, Session
from semvid.runtime.attention.state import Memory
from semvid.runtime.config import AttentionConfig
from tests.parallel.file_windows import FileWindows

FIRST, AGAIN = Refresh(3, seeded=True), Refresh(1, seeded=False)


def tokens(H: int, N: int, D: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [H, N, D] in well separated blobs; v lies as a transposed view, as a model's does."""
    generator = torch.Generator().manual_seed(17 * H + N)
    centers = 3 * torch.randn(H, 6, D, generator=generator)
    blob = torch.randint(6, (H, N), generator=generator)
    if kind == "one rank":
        # Neighbours in the sequence share a blob, so that most clusters live in one shard only.
        blob = blob.sort(dim=1).values
    if kind == "one cluster":
        blob[0] = 0
        centers[0] /= 50
    q, k = (centers.gather(1, blob[..., None].expand(-1, -1, D)) + torch.randn(H, N, D, generator=generator) / 4
            for _ in range(2))  # fmt: skip
    v = torch.randn(N, H, D, generator=generator).transpose(0, 1)
    return q.mul(0.7), k.mul(0.7), v


def session(
    ranks: Ranks, N: int, p: float, backend: str, device: torch.device, seed: int = 3, anchors: str = "no"
) -> Session:
    config = AttentionConfig(
        p=p, floor=0.05, query_clusters=min(N, 5), key_clusters=min(N, 7), anchors="yes" if anchors == "yes" else "no"
    )
    made = Session(config, select(backend, device), seed, ranks)
    if ranks.mesh.sequence > 1:
        made.shard = Shard(ranks.shard, ranks.mesh.sequence, N)
    return made


def run(made: Session, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Three calls of one layer: clusters seeded, refreshed, reused on other values; then a dense one."""
    if made.shard is not None:
        part = slice(made.shard.first, made.shard.first + made.shard.tokens)
        q, k, v = q[:, part], k[:, part], v[:, part]
    found = []
    for step, todo in enumerate((FIRST, AGAIN, Reuse())):
        made.enter(Position(step, 9, "cond"))
        found.append(sparse_attention(q, k, v * (step + 1), made, 0, todo))
    found.append(dense_attention(q, k, v, made) if made.shard else torch.softmax(q @ k.mT / q.shape[2] ** 0.5, -1) @ v)
    return found


CASES = [
    (5, 41, "blobs"),
    (3, 64, "one cluster"),
    (4, 30, "one rank"),
    (1, 9, "blobs"),
    (7, 5, "blobs"),
    (1, 1, "blobs"),
]


def _equals_one_rank(
    rank: int,
    world: int,
    meshes: list[Mesh],
    backend: str,
    cases: list[tuple[int, int, str]],
    masses: tuple[float, ...],
    anchors: str = "no",
    files: str | None = None,
) -> None:
    # Small tiles, so that toy heads are cut in many places.
    balance.TILE_ROWS, balance.TILE_OVERHEAD_KEYS = 4, 2
    # A sort of 1024 keys takes Triton's interpreter a second.
    permute.SORT_BLOCK = 16
    # Under NCCL every rank has a GPU, otherwise none has.
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    for mesh in meshes:
        ranks = connect(mesh)
        # One set for all cases: memory grows, and dense calls follow sparse ones through it.
        windows = FileWindows(ranks, files) if files else open_windows(ranks, device)
        assert (windows is not None) == (files is not None or (device.type == "cuda" and mesh.ring == 1))
        for (H, N, kind), p in itertools.product(cases, masses):
            q, k, v = (x.to(device) for x in tokens(H, N, 16, kind))
            alone = session(Ranks(), N, p, backend, device, anchors=anchors)
            expected = run(alone, q, k, v)
            made = session(ranks, N, p, backend, device, anchors=anchors)
            made.windows = windows  # type: ignore[assignment]
            shard = made.shard
            assert shard is not None
            part = slice(shard.first, shard.first + shard.tokens)
            for call, (whole, mine) in enumerate(zip(expected, run(made, q, k, v), strict=True)):
                name = f"{mesh} H={H} N={N} {kind} p={p} call {call} rank {rank}"
                assert mine.shape == (H, shard.tokens, 16), name
                torch.testing.assert_close(
                    mine, whole[:, part], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
            memory = made.cache.get(0, "cond")
            # The second refresh was cut by the loads of the first; the reuse after it has seen to that.
            assert isinstance(memory.exchange, DirectExchange if windows else Exchange)
            assert memory.counts is None
            # Orders are in the exchange's lists, or follow from the labels.
            for side in (memory.queries, memory.keys):
                assert (side.permutation.order.numel(), side.labels.dtype) == (0, torch.int16)
            assert made.meter.read().sparse == pytest.approx(alone.meter.read().sparse, rel=1e-6)
            if p == 1.0:
                torch.testing.assert_close(expected[1], expected[3] * 2, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("world", "meshes"),
    [
        (2, [Mesh(ulysses=2), Mesh(ring=2)]),
        (3, [Mesh(ulysses=3), Mesh(ring=3)]),
        (4, [Mesh(ulysses=4), Mesh(ring=2, ulysses=2)]),
    ],
)
def test_every_mesh_gives_what_one_rank_gives(world: int, meshes: list[Mesh], spawn: Callable[..., None]) -> None:
    # On four ranks 5 tokens make shards of 2, 2, 1 and 0: one is all padding.
    spawn(world, _equals_one_rank, meshes, "reference", CASES, (0.6, 1.0))


@pytest.mark.parametrize(("world", "backend"), [(2, "reference"), (3, "reference"), (4, "reference"), (2, "triton")])
@pytest.mark.parametrize("anchors", ["no", "yes"])
def test_windows_give_what_one_rank_gives(
    world: int, backend: str, anchors: str, tmp_path: Path, spawn: Callable[..., None]
) -> None:
    # In the interpreter a case takes ten seconds; the same on GPUs, below, has all of them.
    cases, masses = (CASES, (0.6, 1.0)) if backend == "reference" else ([(3, 11, "blobs")], (0.6,))
    spawn(world, _equals_one_rank, [Mesh(ulysses=world)], backend, cases, masses, anchors, str(tmp_path))


def _recuts(rank: int, world: int, folder: str) -> None:
    """Between two refreshes all queries go over to one cluster of one head: the reuse must not be cut as before."""
    balance.TILE_ROWS, balance.TILE_OVERHEAD_KEYS = 4, 2
    H, N = 3, 64
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(H, N, 16, generator=generator) for _ in range(3))
    ranks, cpu = connect(Mesh(ulysses=world)), torch.device("cpu")
    alone, made = session(Ranks(), N, 0.6, "reference", cpu), session(ranks, N, 0.6, "reference", cpu)
    made.windows = FileWindows(ranks, folder)  # type: ignore[assignment]
    assert made.shard is not None
    part = slice(made.shard.first, made.shard.first + made.shard.tokens)
    exchanges = []
    for step, todo in enumerate((FIRST, AGAIN, Reuse(), Reuse())):
        if step == 1:
            # One head attends to everything, the others to little.
            k, q = k.clone(), q * torch.tensor([0.01, 8.0, 8.0])[:, None, None]
        for one in (alone, made):
            one.enter(Position(step, 9, "cond"))
        whole = sparse_attention(q, k, v, alone, 0, todo)
        mine = sparse_attention(*(x[:, part] for x in (q, k, v)), made, 0, todo)
        torch.testing.assert_close(mine, whole[:, part], rtol=2e-5, atol=2e-5)
        exchange = made.cache.get(0, "cond").exchange  # type: ignore[union-attr]
        assert isinstance(exchange, DirectExchange)
        exchanges.append(exchange)
    seeded, early, own, kept = exchanges
    assert not seeded.is_uneven()
    assert early.parts == seeded.parts
    assert early.is_uneven()
    assert own.imbalance() < early.imbalance() - 0.1
    assert kept is own


def test_a_reuse_is_cut_anew_where_loads_have_changed(tmp_path: Path, spawn: Callable[..., None]) -> None:
    spawn(2, _recuts, str(tmp_path))


@pytest.mark.parametrize(
    ("world", "meshes"),
    [(2, [Mesh(ulysses=2), Mesh(ring=2)]), (3, [Mesh(ulysses=3)]), (4, [Mesh(ring=2, ulysses=2)])],
)
def test_anchors_travel_as_the_tokens_do(world: int, meshes: list[Mesh], spawn: Callable[..., None]) -> None:
    # On three and four ranks some bring no anchor of 5 clusters, or none of a single one.
    spawn(world, _equals_one_rank, meshes, "reference", CASES, (0.6,), "yes")


@pytest.mark.parametrize("C", [1, 7, 8, 9, 64, 1001])
def test_bits_hold_a_map(C: int) -> None:
    selected = torch.rand(3, 5, C, generator=torch.Generator().manual_seed(C)) < 0.5
    bits = pack_bits(selected)
    assert bits.shape == (3, 5, -(-C // 8))
    heads = torch.tensor([2, 0, 2])
    for backend in ("reference", "triton"):
        assert torch.equal(select(backend, bits.device).unpack_map(bits, heads, C), selected[heads])


def test_rows_lie_where_their_layout_says() -> None:
    x = torch.arange(2 * 5 * 3, dtype=torch.float32).view(2, 5, 3)
    for view in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x[:, 1:4]):
        head, token = layout(view)
        for h in range(2):
            for i in range(view.shape[1]):
                assert torch.equal(flat_rows(view)[0, h * head + i * token], view[h, i])


def test_rows_that_are_not_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 4 must lie whole in memory"):
        layout(torch.zeros(2, 4, 5).transpose(1, 2))


def test_the_kernels_serve_a_mesh_too(spawn: Callable[..., None]) -> None:
    spawn(2, _equals_one_rank, [Mesh(ring=2)], "triton", [(1, 9, "blobs")], (0.6,))


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_every_mesh_gives_what_one_rank_gives_over_nccl(backend: str, spawn: Callable[..., None]) -> None:
    world = torch.cuda.device_count()
    meshes = [Mesh(ulysses=world), Mesh(ring=world)]
    if world % 2 == 0 and world > 2:
        meshes.append(Mesh(ring=2, ulysses=world // 2))
    spawn(world, _equals_one_rank, meshes, backend, CASES, (0.6, 1.0), nccl=True)
    # Among thousands of tokens some are near-ties, which may fall the other way; with p = 1 nothing hangs on them.
    spawn(world, _equals_one_rank, meshes, backend, [(5, 4099, "blobs"), (3, 2048, "one rank")], (1.0,), nccl=True)


def _tail(memory: Memory, H: int, D: int) -> Tail:
    """Any stand-ins for the key clusters, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    k_mean, v_mean = (torch.randn(H, memory.keys.centroids.shape[1], D, generator=generator) for _ in range(2))
    return Tail(k_mean, v_mean, memory.keys.sizes.float().log())


def _tails(rank: int, world: int) -> None:
    balance.TILE_ROWS, balance.TILE_OVERHEAD_KEYS = 4, 2
    H, N, D = 5, 41, 16
    q, k, v = tokens(H, N, D, "blobs")
    alone = session(Ranks(), N, 0.5, "reference", torch.device("cpu"))
    ops = alone.ops
    run(alone, q, k, v)
    memory = made_ready(q, k, v, alone, alone.cache.get(0, "cond"))
    by_query, by_key = memory.queries.permutation.order, memory.keys.permutation.order
    grouped = [ops.gather_rows(x, order) for x, order in ((q, by_query), (k, by_key), (v, by_key))]
    out, _ = ops.attention(*grouped, plans_of(memory, alone)[0], tail=_tail(memory, H, D))
    expected = ops.scatter_rows(out, by_query)
    for mesh in (Mesh(ring=world), Mesh(ulysses=world)):
        ranks = connect(mesh)
        made = session(ranks, N, 0.5, "reference", torch.device("cpu"))
        run(made, q, k, v)
        mine = made.cache.get(0, "cond")
        exchange, plans, tail = mine.exchange, plans_of(mine, made), _tail(mine, H, D)
        of_pieces = Tail(*(part[exchange.heads] for part in tail))
        part = slice(made.shard.first, made.shard.first + made.shard.tokens)

        def attend(q: Tensor, k: Tensor, v: Tensor, hop: int, out: Tensor | None) -> tuple[Tensor, Tensor]:
            return ops.attention(q, k, v, plans[hop], tail=None if hop else of_pieces, out=out)  # noqa: B023

        found = attend_exchanged(q[:, part], k[:, part], v[:, part], exchange, attend, ops, ranks.sequence)
        torch.testing.assert_close(found, expected[:, part], rtol=2e-5, atol=2e-5)


def test_a_tail_is_added_in_one_hop(spawn: Callable[..., None]) -> None:
    spawn(2, _tails)
