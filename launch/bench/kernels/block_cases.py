"""What a transformer block does beside attention, as cases: residual, gate, norm and modulation, and linear layers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from semvid.kernels import reference
from semvid.kernels.dispatch import Ops
from semvid.kernels.fp8 import MULTIPLE
from semvid.kernels.layout import Rows8
from semvid.launch.bench.kernels.case import Case
from semvid.launch.bench.kernels.checks import Check, worst
from semvid.launch.bench.workload import Workload
from semvid.runtime.models.random_block import FEED_FORWARD

EPS = 1e-6
SAMPLED = 64
# Two roundings to bf16, of which Triton's interpreter makes truncations.
ROUNDED_BOUND = 1e-2
# FP8 products against products of the same FP8 values in fp32; against those of what was quantised it is some 4 %.
PRODUCT_BOUND = 1e-2
# What FP8 itself loses, some 2.6 %.
FP8_BOUND = 4e-2
# A scale and a value that are one rounding apart.
QUANTIZED_BOUND = 2e-2


class Block(NamedTuple):
    """A block's tensors."""

    x: Tensor
    """bf16 [1, N, C]: hidden states; y likewise, what is added."""
    y: Tensor
    gate: Tensor
    """fp32 [1, 1, C]; gain and shift likewise."""
    gain: Tensor
    shift: Tensor
    inner: Tensor
    """bf16 [1, N, F]: feed-forward, before its activation."""
    weight: Tensor
    """bf16 [C, F], of the second feed-forward layer."""


def draw(work: Workload) -> Block:
    """Returns random tensors of the workload's tokens and width; F as the model has it."""
    H, N, D = work.q.shape
    width, device = H * D, work.q.device
    inner = FEED_FORWARD.get(width, 4 * width)
    generator = torch.Generator(device).manual_seed(width)

    def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    gate, gain, shift = (drawn(1, 1, width, dtype=torch.float32) for _ in range(3))
    return Block(
        drawn(1, N, width), drawn(1, N, width), gate, gain, shift, drawn(1, N, inner), 0.02 * drawn(width, inner)
    )


def ours(work: Workload, ops: Ops) -> Iterator[Case]:
    """Yields our ops' cases."""
    b = draw(work)
    row = b.x.numel() * b.x.element_size()
    yield Case(
        name="add_norm",
        call=lambda: ops.add_norm(b.x, b.y, b.gate, b.gain, b.shift, EPS),
        check=lambda out: _check_norm(b, out),
        moved_bytes=4 * row,
    )
    yield Case(
        name="add_gated",
        call=lambda: ops.add_gated(b.x, b.y, b.gate),
        check=lambda out: _check_sum(b, out),
        moved_bytes=3 * row,
    )
    yield Case(
        name="add_norm8",
        call=lambda: ops.add_norm8(b.x, b.y, b.gate, b.gain, b.shift, EPS),
        check=lambda out: _check_norm8(b, out),
        moved_bytes=3 * row + row // 2,
    )
    inner = b.inner.numel()
    yield Case(
        name="quantize_rows gelu",
        call=lambda: ops.quantize_rows(b.inner, gelu=True),
        check=lambda out: _check_rows(b, out),
        moved_bytes=3 * inner,
    )
    if all(size % MULTIPLE == 0 for size in b.weight.shape):
        weight, rows = ops.quantize_rows(b.weight), ops.quantize_rows(b.inner, gelu=True)
        yield Case(
            name="linear8",
            call=lambda: ops.linear8(rows, weight, None, torch.bfloat16),
            check=lambda out: _check_product(rows, weight, out),
            useful_flops=2 * inner * len(b.weight),
        )


def eager(work: Workload) -> Iterator[Case]:
    """Yields the lines of diffusers 0.42.1's WanTransformerBlock, and the layer in bf16 with its activation apart."""
    b = draw(work)

    def summed() -> Tensor:
        return (b.x.float() + b.y * b.gate).type_as(b.x)

    def normed() -> tuple[Tensor, Tensor]:
        total = summed()
        return total, (layer_norm(total.float(), total.shape[-1:], eps=EPS) * b.gain + b.shift).type_as(total)

    yield Case(name="eager add_norm", call=normed, check=lambda out: _check_norm(b, out), beside="add_norm")
    yield Case(name="eager add_gated", call=summed, check=lambda out: _check_sum(b, out), beside="add_gated")
    yield Case(
        name="eager gelu",
        call=lambda: gelu(b.inner, approximate="tanh"),
        check=lambda out: _check_gelu(b, out),
        beside="quantize_rows gelu",
    )
    inner = gelu(b.inner, approximate="tanh")
    yield Case(
        name="linear in bf16",
        call=lambda: linear(inner, b.weight),
        check=lambda out: _check_linear(inner, b.weight, out),
        useful_flops=2 * b.inner.numel() * len(b.weight),
        beside="linear8",
    )


def _sampled(x: Tensor) -> Tensor:
    """Returns some rows of [1, N, K], the first and the last among them: [S, K]."""
    rows = torch.linspace(0, x.shape[1] - 1, min(SAMPLED, x.shape[1]), device=x.device).round().long()
    return x[0, rows]


def _meant(rows: Rows8) -> Tensor:
    """Returns what some rows in FP8 mean, fp64 [S, K]; FP8 itself can't be indexed everywhere."""
    values = _sampled(rows.values.view(torch.uint8)).view(rows.values.dtype)
    return values.double() * _sampled(rows.scales).double()


def _error(what: str, found: Tensor, exact: Tensor, bound: float) -> Check:
    return Check(what, ((found.double() - exact.double()).norm() / exact.double().norm()).item(), bound)


def _check_sum(b: Block, out: object) -> Check:
    assert isinstance(out, Tensor)
    exact = _sampled(b.x).double() + _sampled(b.y).double() * b.gate[0].double()
    return _error("sum", _sampled(out), exact, ROUNDED_BOUND)


def _check_norm(b: Block, out: object) -> Check:
    assert isinstance(out, tuple)
    total, normed = out
    return worst(_check_sum(b, total), _error("norm", _sampled(normed), _normed(b, total), ROUNDED_BOUND))


def _check_norm8(b: Block, out: object) -> Check:
    assert isinstance(out, tuple)
    total, rows = out
    return worst(_check_sum(b, total), _error("norm in FP8", _meant(rows), _normed(b, total), FP8_BOUND))


def _normed(b: Block, total: Tensor) -> Tensor:
    exact = layer_norm(_sampled(total).double(), total.shape[-1:], eps=EPS)
    return exact * b.gain[0].double() + b.shift[0].double()


def _check_gelu(b: Block, out: object) -> Check:
    assert isinstance(out, Tensor)
    return _error("gelu", _sampled(out), gelu(_sampled(b.inner).double(), approximate="tanh"), ROUNDED_BOUND)


def _check_rows(b: Block, out: object) -> Check:
    assert isinstance(out, Rows8)
    found = _meant(out)
    expected = reference.quantize_rows(_sampled(b.inner), gelu=True)
    return _error("rows", found, expected.values.float() * expected.scales, QUANTIZED_BOUND)


def _check_product(rows: Rows8, weight: Rows8, out: object) -> Check:
    assert isinstance(out, Tensor)
    return _error("product", _sampled(out), _meant(rows) @ (weight.values.double() * weight.scales).T, PRODUCT_BOUND)


def _check_linear(x: Tensor, weight: Tensor, out: object) -> Check:
    assert isinstance(out, Tensor)
    return _error("product", _sampled(out), _sampled(x).double() @ weight.double().T, ROUNDED_BOUND)
