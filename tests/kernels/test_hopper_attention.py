"""Attention for Hopper against the Triton one and fp32. On a CPU: what is refused, and what is handed to the launch.

Gluon has no interpreter, so that the kernel itself runs on a Hopper GPU only.
"""

import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from semvid.kernels import attention as generic
from semvid.kernels import hopper_attention as module
from semvid.kernels import reference
from semvid.kernels.dispatch import missing
from semvid.kernels.hopper_attention import attention
from semvid.kernels.layout import BlockMap, Plan, Tail
from semvid.kernels.runs import plan
from tests.no_sync import no_sync

DTYPES = [torch.bfloat16, torch.float16]


class Case(NamedTuple):
    """One input of attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_offsets: Tensor
    k_offsets: Tensor
    selected: Tensor

    def plan(self) -> Plan:
        return plan(self.q_offsets, self.k_offsets, BlockMap(self.selected))

    def true(self, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
        whole = Plan(self.q_offsets, self.k_offsets, BlockMap(self.selected))
        k, v = self.k.float().nan_to_num(), self.v.float().nan_to_num()
        return reference.attention(self.q.float(), k, v, whole, tail=tail)


def cut(H: int, N: int, C: int, device: torch.device) -> Tensor:
    """Returns int32 [H, C + 1]: N rows in C clusters of very uneven sizes, one in five of them empty."""
    weights = torch.rand(H, C, device=device).pow(3) * (torch.rand(H, C, device=device) > 0.2) + 1e-9
    bounds = (weights.cumsum(1) / weights.sum(1, keepdim=True) * N).round().int().clamp(max=N)
    bounds[:, -1] = N
    return torch.cat([bounds.new_zeros(H, 1), bounds], 1)


def draw(
    H: int, Nq: int, Nk: int, D: int, Cq: int, Ck: int, density: float, dtype: torch.dtype, device: torch.device
) -> Case:
    """A random case; rows of k and v that nobody selects are NaN."""
    q_offsets, k_offsets = cut(H, Nq, Cq, device), cut(H, Nk, Ck, device)
    selected = (torch.rand(H, Cq, Ck, device=device) < density) & (k_offsets.diff(dim=1) > 0)[:, None]
    q, k, v = (torch.randn(H, n, D, device=device).to(dtype) for n in (Nq, Nk, Nk))
    cluster = torch.searchsorted(
        k_offsets[:, 1:].contiguous(), torch.arange(Nk, device=device).repeat(H, 1), right=True
    )
    unused = ~selected.any(1).gather(1, cluster.clamp(max=Ck - 1))
    k[unused], v[unused] = math.nan, math.nan
    return Case(q, k, v, q_offsets, k_offsets, selected)


def draw_tail(c: Case) -> Tail:
    """Random means; NaN for empty clusters, whose means nobody may read."""
    sizes = c.k_offsets.diff(dim=1).float()
    means = [torch.randn(*sizes.shape, c.q.shape[2], device=c.q.device) for _ in range(2)]
    for mean in means:
        mean[sizes == 0] = math.nan
    return Tail(*means, sizes.log())


def known(tail: Tail, dtype: torch.dtype) -> Tail:
    """The tail as the kernels may read it: rounded to q's dtype, and a number where none is defined."""
    return Tail(*(mean.nan_to_num().to(dtype).float() for mean in tail[:2]), tail.log_n)


def assert_no_worse(got: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor]) -> None:
    """`got` errs no more than 1.5 times as much as `other`, the Triton kernel in the same precision."""
    error, allowed = ((x[0].float() - true[0]).norm() for x in (got, other))
    assert error <= 1.5 * allowed + 1e-6 * true[0].norm() + 1e-6
    torch.testing.assert_close(got[1], true[1], rtol=2e-4, atol=2e-4)


@pytest.fixture
def gpu() -> torch.device:
    """A Hopper GPU, or the test is skipped with the reason."""
    device = torch.device("cuda")
    reason = missing("hopper", device)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    return device


class Recorder:
    """Stands for a kernel and keeps what a launch gave it."""

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        self.grid = grid
        return self

    def __call__(self, *inputs: Any, **constants: Any) -> None:
        self.inputs, self.constants = inputs, constants


@pytest.mark.parametrize(
    ("dtype", "D", "cut_off", "ordered"),
    [
        (torch.float32, 64, 0, False),
        (torch.bfloat16, 32, 0, False),
        (torch.bfloat16, 64, 4, False),
        (torch.bfloat16, 64, 0, True),
    ],
    ids=["fp32", "D 32", "address", "q_order"],
)
def test_what_it_cannot_take_goes_to_triton(
    dtype: torch.dtype, D: int, cut_off: int, ordered: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = draw(2, 5, 9, D, 2, 3, 1.0, torch.float32, device)
    q, k, v = (x.new_zeros(*x.shape[:2], D + 8, dtype=dtype)[..., cut_off : cut_off + D] for x in c[:3])
    order = torch.arange(5, dtype=torch.int32, device=device).expand(2, 5) if ordered else None
    asked = []
    monkeypatch.setattr(generic, "attention", lambda *given, **options: asked.append((given, options)))
    p = c.plan()
    attention(q, k, v, p, q_order=order, scale=0.3)
    assert asked == [((q, k, v, p), {"q_order": order, "tail": None, "scale": 0.3, "out": None})]


def test_wrong_inputs_are_refused_as_by_triton(device: torch.device) -> None:
    c = draw(2, 5, 9, 64, 2, 3, 1.0, torch.bfloat16, device)
    p = c.plan()
    with pytest.raises(ValueError, match=r"k and v must both be \[2, Nk, 64\]"):
        attention(c.q, c.k, c.v[:, :-1], p)
    with pytest.raises(ValueError, match=r"scale is -1\.0; it must be positive"):
        attention(c.q, c.k, c.v, p, scale=-1.0)
    with pytest.raises(ValueError, match=r"tail\.log_n must be fp32 \[2, 3\]"):
        attention(
            c.q, c.k, c.v, p, tail=Tail(*(torch.zeros(2, *size, device=device) for size in ((3, 64), (3, 64), (4,))))
        )
    with pytest.raises(ValueError, match="plan has 0 lists"):
        attention(c.q, c.k, c.v, p._replace(lists=()))
    with pytest.raises(ValueError, match="out must be contiguous"):
        attention(c.q, c.k, c.v, p, out=c.q.float())


def test_a_launch_is_given_boxes_strides_and_counts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # Heads inside: a row of K is H·D values from the next.
    c = draw(3, 50, 70, 64, 4, 5, 1.0, torch.bfloat16, device)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (c.k, c.v))
    kernel = Recorder()
    monkeypatch.setattr(module, "_attend", kernel)
    monkeypatch.setattr(module, "num_sms", lambda device: 7)
    out, lse = attention(c.q, k, v, c.plan())
    assert kernel.grid == (7,)
    q_desc, *boxes = kernel.inputs[:11]
    assert q_desc.base is c.q
    assert [box.block_shape[1] for box in boxes] == [64, 32, 16, 8, 64, 32, 16, 8, 64, 64]
    assert [box.base is x for box, x in zip(boxes, [k] * 4 + [v] * 4 + [k, v], strict=True)] == [True] * 10
    assert all(list(box.shape) == [3, 70, 64] and tuple(box.strides) == k.stride() for box in boxes)
    assert kernel.inputs[13] is out
    assert kernel.inputs[14] is lse
    # Nq, Nk, strides of K and V in 8 elements, blocks, Cq, Ck, runs, bits, tiles of the tail.
    assert kernel.inputs[-12:] == (50, 70, 8, 24, 8, 24, 12, 4, 5, 3, 3, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("block", range(5))
def test_random_cases_equal_triton_and_fp32(block: int, D: int, gpu: torch.device) -> None:
    pick = random.Random(block).choice
    for seed in range(40):
        sizes = pick([1, 2, 5]), pick([1, 63, 64, 65, 129, 500, 3000]), pick([1, 7, 64, 129, 1000, 5000]), D
        c = draw(*sizes, pick([1, 3, 17]), pick([1, 8, 61, 200]), pick([0.05, 0.3, 0.7, 1.1]), DTYPES[seed % 2], gpu)
        tail = draw_tail(c) if seed % 3 == 0 else None
        got, other = (op(c.q, c.k, c.v, c.plan(), tail=tail) for op in (attention, generic.attention))
        assert_no_worse(got, other, c.true(known(tail, c.q.dtype) if tail else None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_keys_and_rows_around_tiles_and_pieces(dtype: torch.dtype, gpu: torch.device) -> None:
    # A run of n keys is a piece of every size; 129 .. 140 end in a tile of their own.
    for n in [*range(1, 18), *range(60, 70), *range(124, 141), 255, 256, 257]:
        c = draw(1, 65 if n % 2 else 64, 2 * n, 128, 1, 1, 1.1, dtype, gpu)
        offsets = torch.tensor([[0, n // 2, n // 2 + n, 2 * n]], dtype=torch.int32, device=gpu)
        selected = torch.tensor([[[False, True, False]]], device=gpu)
        c = c._replace(k_offsets=offsets, selected=selected)
        c.k[:, : n // 2], c.v[:, n // 2 + n :] = math.nan, math.nan
        got, other = (op(c.q, c.k, c.v, c.plan()) for op in (attention, generic.attention))
        assert_no_worse(got, other, c.true())


@pytest.mark.gpu
@pytest.mark.parametrize("tail", [False, True])
def test_query_clusters_that_select_nothing(tail: bool, gpu: torch.device) -> None:
    c = draw(2, 300, 400, 64, 3, 9, 0.5, torch.bfloat16, gpu)
    largest = int(c.q_offsets[0].diff().argmax())
    c.selected[:, largest] = False
    stand_in = draw_tail(c) if tail else None
    out, lse = attention(c.q, c.k, c.v, c.plan(), tail=stand_in)
    other = generic.attention(c.q, c.k, c.v, c.plan(), tail=stand_in)
    assert_no_worse((out, lse), other, c.true(known(stand_in, c.q.dtype) if stand_in else None))
    if not tail:
        first, last = c.q_offsets[0, largest : largest + 2].tolist()
        assert bool((out[0, first:last] == 0).all())
        assert bool(lse[0, first:last].isneginf().all())


@pytest.mark.gpu
@pytest.mark.parametrize("row", [136, 200])
def test_strided_q_k_and_v(row: int, gpu: torch.device) -> None:
    # 136 is a multiple of the 8 values that TMA asks for, and of no more.
    c = draw(3, 333, 999, 128, 5, 40, 0.4, torch.bfloat16, gpu)
    wide = [torch.full((3, x.shape[1], row), math.nan, device=gpu, dtype=x.dtype) for x in c[:3]]
    for x, own in zip(wide, c[:3], strict=True):
        x[..., 8:136] = own
    strided = attention(*(x[..., 8:136] for x in wide), c.plan())
    packed = attention(c.q, c.k, c.v, c.plan())
    assert torch.equal(strided[0], packed[0])
    assert torch.equal(strided[1], packed[1])


@pytest.mark.gpu
def test_large_scores_do_not_overflow(gpu: torch.device) -> None:
    c = draw(1, 100, 1500, 64, 1, 20, 1.1, torch.bfloat16, gpu)
    # The highest score grows from tile to tile, then falls: alpha must act both ways.
    c = c._replace(k=c.k * (60 * (1 - (torch.linspace(0, 1, 1500, device=gpu) - 0.6).abs()))[:, None].bfloat16())
    got, other = (op(c.q, c.k, c.v, c.plan()) for op in (attention, generic.attention))
    true = c.true()
    assert (got[0].float() - true[0]).norm() <= 1.5 * (other[0].float() - true[0]).norm() + 1e-6
    torch.testing.assert_close(got[1], true[1], rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "N", "Cq", "Ck"), [(40, 75_600, 300, 1000), (24, 118_800, 400, 2000)])
def test_real_size_repeats_bit_for_bit_and_never_waits_for_the_host(
    H: int, N: int, Cq: int, Ck: int, gpu: torch.device
) -> None:
    c = draw(H, N, N, 128, Cq, Ck, 0.15, torch.bfloat16, gpu)
    tail = draw_tail(c)
    # Compiled and created what is made once.
    attention(c.q, c.k, c.v, c.plan())
    for options in ({}, {"tail": tail}):
        p = c.plan()
        first = attention(c.q, c.k, c.v, p, **options)
        with no_sync():
            again = [attention(c.q, c.k, c.v, p, **options) for _ in range(4)]
        assert all(torch.equal(x, y) for more in again for x, y in zip(more, first, strict=True))
        other = generic.attention(c.q, c.k, c.v, p, **options)
        # A cluster of each head against fp32, and everything against Triton.
        assert (first[0].float() - other[0].float()).norm() <= 4e-3 * other[0].float().norm()
        torch.testing.assert_close(first[1], other[1], rtol=1e-4, atol=1e-4)
    assert_rows_are_true(c, *attention(c.q, c.k, c.v, c.plan()))


def assert_rows_are_true(c: Case, out: Tensor, lse: Tensor) -> None:
    """Some rows of three query clusters of three heads against fp32."""
    H, Cq = c.selected.shape[:2]
    rows = torch.arange(c.k.shape[1], device=c.k.device)
    for h in (0, H // 2, H - 1):
        cluster = torch.searchsorted(c.k_offsets[h, 1:].contiguous(), rows, right=True)
        for i in (0, Cq // 2, Cq - 1):
            first, last = c.q_offsets[h, i : i + 2].tolist()
            some = rows[first:last][:: max(1, (last - first) // 16)]
            on = c.selected[h, i][cluster]
            scores = c.q[h, some].float() @ c.k[h, on].float().mT / math.sqrt(c.q.shape[2])
            true = scores.softmax(-1) @ c.v[h, on].float()
            torch.testing.assert_close(out[h, some].float(), true, rtol=2e-2, atol=3e-4)
            torch.testing.assert_close(lse[h, some], scores.logsumexp(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_addresses_past_two_to_the_31_are_right(gpu: torch.device) -> None:
    H, N = 220, 80_000
    q, k, v = (torch.randn(H, N, 128, device=gpu, dtype=torch.bfloat16) for _ in range(3))
    q_offsets = torch.tensor([[0, 0, 0]] * (H - 1) + [[0, 100, N]], dtype=torch.int32, device=gpu)
    k_offsets = torch.tensor([[0, 90, N]] * H, dtype=torch.int32, device=gpu)
    selected = torch.tensor([[[True, False], [True, False]]] * H, device=gpu)
    out, _ = attention(q, k, v, plan(q_offsets, k_offsets, BlockMap(selected)))
    true = (q[-1, -5:].float() @ k[-1, :90].float().mT / math.sqrt(128)).softmax(-1) @ v[-1, :90].float()
    torch.testing.assert_close(out[-1, -5:].float(), true, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_cuda_graph_attends_to_what_is_in_its_inputs(gpu: torch.device) -> None:
    c = draw(2, 4096, 4096, 128, 16, 60, 1.1, torch.bfloat16, gpu)
    attention(c.q, c.k, c.v, c.plan())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(c.q, c.k, c.v, c.plan())
    for _ in range(2):
        fresh = draw(2, 4096, 4096, 128, 16, 60, 0.3, torch.bfloat16, gpu)
        for old, new in zip(c, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        assert_no_worse(captured, generic.attention(*fresh[:3], fresh.plan()), fresh.true())
