"""Variable-block attention against the fp32 reference: every shape of cluster, map, order, tail and precision."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from semvid.kernels import attention as module
from semvid.kernels import reference
from semvid.kernels.attention import Tile, attention, plan
from semvid.kernels.layout import BlockMap, Plan, Tail
from tests.no_sync import no_sync


class Case(NamedTuple):
    """One input of attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_offsets: Tensor
    k_offsets: Tensor
    selected: Tensor

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Case":
        return Case(*(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in self))

    def plan(self) -> Plan:
        return plan(self.q_offsets, self.k_offsets, BlockMap(self.selected))

    def reference(self, **options: Tensor | Tail | float | None) -> tuple[Tensor, Tensor]:
        whole = Plan(self.q_offsets, self.k_offsets, BlockMap(self.selected))
        return reference.attention(self.q.float(), self.k.float(), self.v.float(), whole, **options)


def cut(N: int, C: int, kind: str, g: torch.Generator) -> Tensor:
    """Returns offsets [C + 1] of N rows in C clusters: random bounds, skewed, single rows, or all in one."""
    if kind == "one":
        bounds = torch.tensor([0] * (C // 2) + [N] * (C - 1 - C // 2))
    elif kind == "singles":
        bounds = torch.arange(1, C).clamp(max=N)
    else:
        bounds = (torch.rand(C - 1, generator=g).pow(4 if kind == "skewed" else 1) * N).int().sort().values
    return torch.cat([torch.zeros(1), bounds, torch.full((1,), N)]).to(torch.int32)


def case(
    H: int, Nq: int, Nk: int, D: int, Cq: int, Ck: int, *, kind: str = "random", density: float = 0.4, seed: int = 0
) -> Case:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(H, n, D, generator=g) for n in (Nq, Nk, Nk))
    q_offsets = torch.stack([cut(Nq, Cq, kind, g) for _ in range(H)])
    k_offsets = torch.stack([cut(Nk, Ck, kind, g) for _ in range(H)])
    selected = torch.rand(H, Cq, Ck, generator=g) < density
    return Case(q, k, v, q_offsets, k_offsets, selected & (k_offsets.diff(dim=1) > 0)[:, None])


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """fp32 on both sides: rounding of sums in another order."""
    torch.testing.assert_close(got[0].float(), wanted[0], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(got[1], wanted[1], rtol=2e-5, atol=2e-6)


@pytest.fixture
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tile:
    """Tiles of 16 keys and lists of 48, so that small inputs take many of both; `lag` and `halve` as asked."""
    lag, halve = request.param
    tile = Tile(rows=32, keys=16, warps=4, stages=2, chunk=48, lag=lag, halve=halve)
    monkeypatch.setattr(module, "tile_for", lambda *_: tile)
    return tile


each_way = pytest.mark.parametrize("small_chunks", [(True, True), (False, False)], indirect=True)

SHAPES = [
    (1, 1, 1, 16, 1, 1, "random"),
    (2, 63, 100, 64, 5, 9, "random"),
    (1, 100, 257, 128, 3, 40, "skewed"),
    (2, 257, 63, 16, 7, 63, "singles"),
    (1, 300, 130, 32, 4, 6, "one"),
]


@pytest.mark.parametrize(("H", "Nq", "Nk", "D", "Cq", "Ck", "kind"), SHAPES)
def test_equals_reference(H: int, Nq: int, Nk: int, D: int, Cq: int, Ck: int, kind: str, device: torch.device) -> None:
    c = case(H, Nq, Nk, D, Cq, Ck, kind=kind, seed=Nq).to(device)
    assert_same(attention(c.q, c.k, c.v, c.plan()), c.reference())


@each_way
@pytest.mark.parametrize(("H", "Nq", "Nk", "D", "Cq", "Ck", "kind"), SHAPES[1:])
def test_equals_reference_over_many_tiles_and_chunks(
    H: int, Nq: int, Nk: int, D: int, Cq: int, Ck: int, kind: str, small_chunks: Tile, device: torch.device
) -> None:
    c = case(H, Nq, Nk, D, Cq, Ck, kind=kind, density=0.7, seed=Nq).to(device)
    assert_same(attention(c.q, c.k, c.v, c.plan()), c.reference())


@each_way
def test_every_number_of_keys_around_tiles_and_chunks(small_chunks: Tile, device: torch.device) -> None:
    """One head and one key cluster per length: 1 tile, its edges, 3 tiles (a chunk), its edges, and two chunks."""
    lengths = [1, 15, 16, 17, 32, 33, 47, 48, 49, 63, 64, 65, 96, 97]
    H, N = len(lengths), max(lengths)
    c = case(H, 5, N, 16, 1, 2).to(device)
    c.k_offsets[:, 1] = torch.tensor(lengths, device=device)
    c.selected[:] = torch.tensor([True, False], device=device)
    # What is not selected must not be read at all.
    for h, n in enumerate(lengths):
        c.k[h, n:], c.v[h, n:] = math.nan, math.nan
    got = attention(c.q, c.k, c.v, c.plan())
    assert_same(got, c._replace(k=c.k.nan_to_num(), v=c.v.nan_to_num()).reference())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [64, 128])
def test_low_precision_errs_no_more_than_twice_a_plain_run(dtype: torch.dtype, D: int, device: torch.device) -> None:
    c = case(2, 100, 257, D, 4, 20).to(device, dtype)
    got, lse = attention(c.q, c.k, c.v, c.plan())
    wanted, wanted_lse = c.reference()
    rows = [
        torch.searchsorted(c.q_offsets[h, 1:].contiguous(), torch.arange(100, device=device), right=True)
        for h in (0, 1)
    ]
    keys = [
        torch.searchsorted(c.k_offsets[h, 1:].contiguous(), torch.arange(257, device=device), right=True)
        for h in (0, 1)
    ]
    on = torch.stack([c.selected[h][rows[h]][:, keys[h]] for h in (0, 1)])
    scores = (c.q @ c.k.mT / math.sqrt(D)).masked_fill(~on, -math.inf)
    plain = (torch.softmax(scores, -1).nan_to_num() @ c.v).float()
    assert got.dtype == dtype
    assert (got.float() - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-5
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-4)


def test_a_full_map_is_dense_attention(device: torch.device) -> None:
    c = case(2, 100, 100, 64, 3, 9, density=2.0).to(device)
    wanted = torch.nn.functional.scaled_dot_product_attention(c.q, c.k, c.v)
    torch.testing.assert_close(attention(c.q, c.k, c.v, c.plan())[0], wanted, rtol=2e-5, atol=2e-6)


def test_a_query_cluster_that_selects_nothing_gets_zero_and_minus_infinity(device: torch.device) -> None:
    c = case(1, 60, 60, 16, 3, 4, density=2.0).to(device)
    c.q_offsets[0] = torch.tensor([0, 20, 50, 60])
    c.selected[0, 1] = False
    out, lse = attention(c.q, c.k, c.v, c.plan())
    assert (out[0, 20:50] == 0).all()
    assert (lse[0, 20:50] == -math.inf).all()
    assert_same((out, lse), c.reference())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_rows_that_are_not_selected_leave_no_trace(rubbish: float, dtype: torch.dtype, device: torch.device) -> None:
    c = case(1, 40, 150, 16, 1, 30, seed=3).to(device, dtype)
    clean = attention(c.q, c.k, c.v, c.plan())
    keys = torch.searchsorted(c.k_offsets[0, 1:].contiguous(), torch.arange(150, device=device), right=True)
    off = ~c.selected[0, 0][keys]
    c.k[0, off], c.v[0, off] = rubbish, rubbish
    assert 0 < off.sum() < 150
    for got, wanted in zip(attention(c.q, c.k, c.v, c.plan()), clean, strict=True):
        assert torch.equal(got, wanted)


def test_q_order_reads_and_writes_in_token_order(device: torch.device) -> None:
    c = case(2, 100, 63, 32, 5, 9).to(device)
    order = (
        torch.stack([torch.randperm(100, generator=torch.Generator().manual_seed(h)) for h in (0, 1)]).int().to(device)
    )
    got = attention(c.q, c.k, c.v, c.plan(), q_order=order)
    assert_same(got, c.reference(q_order=order))
    grouped = attention(reference.gather_rows(c.q, order), c.k, c.v, c.plan())
    assert torch.equal(got[0], reference.scatter_rows(grouped[0], order))


def test_q_may_be_a_view_across_heads(device: torch.device) -> None:
    c = case(3, 63, 40, 16, 2, 5).to(device)
    across = c.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not across.is_contiguous()
    assert torch.equal(attention(across, c.k, c.v, c.plan())[0], attention(c.q, c.k, c.v, c.plan())[0])


def tail_of(c: Case) -> Tail:
    """Returns the means of c's key clusters; NaN for empty ones, whose means nobody may read."""
    sizes = c.k_offsets.diff(dim=1)
    member = torch.zeros(*sizes.shape, c.k.shape[1], device=c.k.device)
    for h, j in (sizes > 0).nonzero().tolist():
        member[h, j, c.k_offsets[h, j] : c.k_offsets[h, j + 1]] = 1 / sizes[h, j]
    empty = (sizes == 0)[..., None]
    means = [(member @ x.float()).masked_fill(empty, math.nan) for x in (c.k, c.v)]
    return Tail(means[0], means[1], sizes.float().log())


@pytest.mark.parametrize(("kind", "Ck"), [("random", 9), ("skewed", 70), ("one", 70)])
def test_tail_enters_the_same_softmax(kind: str, Ck: int, device: torch.device) -> None:
    c = case(2, 100, 130, 32, 4, Ck, kind=kind, seed=1).to(device)
    # Nothing but the tail (with "one" it begins with a whole tile of empty clusters); and no tail.
    c.selected[0, 0], c.selected[1, 1] = False, c.k_offsets[1].diff() > 0
    tail = tail_of(c)
    known = Tail(tail.k_mean.nan_to_num(), tail.v_mean.nan_to_num(), tail.log_n)
    assert_same(attention(c.q, c.k, c.v, c.plan(), tail=tail), c.reference(tail=known))


@each_way
def test_tail_and_q_order_together_in_bf16(small_chunks: Tile, device: torch.device) -> None:
    c = case(1, 63, 100, 16, 3, 20).to(device, torch.bfloat16)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(0)).int()[None].to(device)
    tail = tail_of(c)
    known = Tail(tail.k_mean.nan_to_num(), tail.v_mean.nan_to_num(), tail.log_n)
    out, lse = attention(c.q, c.k, c.v, c.plan(), q_order=order, tail=tail)
    wanted, wanted_lse = c.reference(q_order=order, tail=known)
    torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-2, atol=1e-2)


def test_scale(device: torch.device) -> None:
    c = case(1, 63, 63, 16, 2, 5).to(device)
    assert_same(attention(c.q, c.k, c.v, c.plan(), scale=0.7), c.reference(scale=0.7))


@each_way
def test_large_scores_do_not_overflow(small_chunks: Tile, device: torch.device) -> None:
    c = case(1, 20, 90, 16, 1, 5, density=2.0).to(device)
    # The highest score grows from tile to tile, then falls: alpha must act both ways.
    height = 60 * (1 - (torch.linspace(0, 1, 90, device=device) - 0.6).abs())
    c = c._replace(k=c.k * height[:, None])
    got, wanted = attention(c.q, c.k, c.v, c.plan()), c.reference()
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-5)


def test_no_rows(device: torch.device) -> None:
    c = case(1, 0, 10, 16, 2, 2).to(device)
    out, lse = attention(c.q, c.k, c.v, c.plan())
    assert out.shape == (1, 0, 16)
    assert lse.shape == (1, 0)


def test_rejects_what_it_cannot_compute(device: torch.device) -> None:
    c = case(1, 8, 8, 16, 2, 2).to(device)
    with pytest.raises(ValueError, match="make it with this backend's plan"):
        attention(c.q, c.k, c.v, reference.plan(c.q_offsets, c.k_offsets, BlockMap(c.selected)))
    with pytest.raises(ValueError, match=r"scale is -1\.0; it must be positive"):
        attention(c.q, c.k, c.v, c.plan(), scale=-1.0)
    with pytest.raises(ValueError, match="head dim 24; accepted"):
        attention(*(x.repeat(1, 1, 2)[..., :24] for x in c[:3]), c.plan())
    many = torch.zeros(1, 1, 16, device=device).expand(1, (1 << 30) + 1, 16)
    with pytest.raises(ValueError, match=r"k has 1073741825 rows; accepted: at most 1073741824 in 2 clusters"):
        attention(c.q, many, many, c.plan())
    with pytest.raises(ValueError, match=r"q_order must be int32 \[1, 8\]"):
        attention(c.q, c.k, c.v, c.plan(), q_order=torch.arange(8, device=device)[None])
    with pytest.raises(ValueError, match=r"tail.v_mean must be fp32 \[1, 2, 16\]"):
        attention(c.q, c.k, c.v, c.plan(), tail=tail_of(c)._replace(v_mean=c.v))


def big_case(H: int, N: int, Cq: int, Ck: int, device: torch.device) -> Case:
    """Returns bf16 inputs of a real size: skewed clusters, heads from 10 to 89 % dense."""
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(H, N, 128, generator=g, device=device, dtype=torch.bfloat16) for _ in range(3))
    offsets = []
    for C in (Cq, Ck):
        edges = torch.rand(H, C, generator=g, device=device).pow(2).cumsum(1)
        bounds = (edges / edges[:, -1:] * N).round().to(torch.int32)
        offsets.append(torch.nn.functional.pad(bounds, (1, 0)))
    share = torch.linspace(0, 1, H, device=device).pow(2.2).mul(0.79).add(0.1)
    selected = torch.rand(H, Cq, Ck, generator=g, device=device) < share[:, None, None]
    return Case(q, k, v, offsets[0], offsets[1], selected & (offsets[1].diff(dim=1) > 0)[:, None])


def sampled(c: Case, h: int, i: int, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns some rows of query cluster i of head h, where they stand, and their fp32 out and lse."""
    first, last = c.q_offsets[h, i].item(), c.q_offsets[h, i + 1].item()
    rows = torch.arange(first, last, device=c.q.device)
    rows = rows[:: max(1, len(rows) // 16)]
    tokens = rows if order is None else order[h, rows].long()
    keys = torch.searchsorted(
        c.k_offsets[h, 1:].contiguous(), torch.arange(c.k.shape[1], device=c.q.device), right=True
    )
    on = c.selected[h, i][keys]
    scores = c.q[h, tokens].float() @ c.k[h, on].float().mT / math.sqrt(c.q.shape[2])
    return tokens, torch.softmax(scores, -1) @ c.v[h, on].float(), torch.logsumexp(scores, -1)


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "N", "Cq"), [(40, 75_600, 300), (24, 118_800, 400)])
def test_real_size(H: int, N: int, Cq: int, device: torch.device) -> None:
    """Sampled rows against fp32; without a host sync; the same bits twice."""
    c = big_case(H, N, Cq, 1000, device)
    order = torch.rand(H, N, device=device).argsort(-1).to(torch.int32)
    attention(c.q, c.k, c.v, c.plan(), q_order=order)
    with no_sync():
        out, lse = attention(c.q, c.k, c.v, c.plan(), q_order=order)
        again, lse_again = attention(c.q, c.k, c.v, c.plan(), q_order=order)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    for h in (0, H // 2, H - 1):
        for i in (0, 1, Cq // 2, Cq - 1):
            tokens, wanted, wanted_lse = sampled(c, h, i, order)
            torch.testing.assert_close(out[h, tokens].float(), wanted, rtol=2e-2, atol=2e-4)
            torch.testing.assert_close(lse[h, tokens], wanted_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_captured_in_a_graph(device: torch.device) -> None:
    """Plan and attention replay on new contents of the same shapes."""
    c = big_case(2, 4096, 16, 60, device)

    def whole() -> tuple[Tensor, Tensor]:
        return attention(c.q, c.k, c.v, c.plan())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        whole()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole()
    for seed in (1, 2):
        fresh = case(2, 4096, 4096, 128, 16, 60, seed=seed).to(device, torch.bfloat16)
        for old, new in zip(c, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        wanted = fresh.reference()
        torch.testing.assert_close(captured[0].float(), wanted[0], rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(captured[1], wanted[1], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("block", range(10))
def test_many_random_cases(block: int, device: torch.device) -> None:
    g = torch.Generator().manual_seed(block)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    for seed in range(30):
        dtype = [torch.bfloat16, torch.float16, torch.float32][seed % 3]
        Nq, Nk, D = pick(1, 63, 129, 500, 900), pick(1, 64, 257, 1000, 20_000), pick(16, 32, 64, 128)
        c = case(
            *(pick(1, 2, 5), Nq, Nk, D, pick(1, 3, 17), pick(1, 8, 61, 200)),
            kind=["random", "skewed", "singles", "one"][pick(0, 1, 2, 3)],
            density=pick(1, 3, 7, 11) / 10,
            seed=seed,
        ).to(device, dtype)
        options = {"tail": tail_of(c)} if seed % 5 == 0 else {}
        known = {"tail": Tail(*(x.nan_to_num(neginf=-math.inf) for x in t))} if (t := options.get("tail")) else {}
        got, wanted = attention(c.q, c.k, c.v, c.plan(), **options), c.reference(**known)
        close = {"rtol": 2e-2, "atol": 1e-2} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(got[0].float(), wanted[0], **close)
        torch.testing.assert_close(got[1], wanted[1], **close)
