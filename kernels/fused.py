"""What stands between the linear layers of a block, in one pass each: residual, gate, norm, modulation; rows in FP8."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semvid.kernels.dispatch import interpreted
from semvid.kernels.layout import FP8_LARGEST, Rows8, check_per_row, check_rows, check_same, new_rows8


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Returns x + gate · y, computed in fp32, in x's dtype; two reads and one write.

    Args:
        x: [B, N, C], any floating dtype.
        y: likewise, of x's dtype.
        gate: [C], [1 or B, 1, C] or [B, N, C], any floating dtype; None: 1.
    """
    return _launch(x, y, gate, None, None, 0.0, None, None)


def add_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns s = x + gate · y and LayerNorm(s) · gain + shift, both in x's dtype; one read and one write of each.

    s is rounded to x's dtype before the norm, as it is when the two are separate; the rest is fp32.

    Args:
        x: [B, N, C], any floating dtype.
        y: likewise, of x's dtype; None: s is x itself.
        gate: as `add_gated`.
        gain: [C], [1 or B, 1, C] or [B, N, C], any floating dtype: the norm's weight, or 1 + the modulation's scale.
        shift: likewise: the norm's bias, or the modulation's shift.
        eps: added to the variance.
    """
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _launch(x, y, gate, gain, shift, eps, normed, None), normed


def add_norm8(
    x: Tensor, y: Tensor | None, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Rows8]:
    """Returns s as `add_norm` does, and its normed rows in FP8: those that `quantize_rows` makes of `add_norm`'s.

    What is normed is not written in x's dtype and read again.

    Args:
        x: [B, N, C], any floating dtype.
        y: as `add_norm`; gate, gain, shift and eps likewise.
        gate: of y.
        gain: of the norm.
        shift: of the norm.
        eps: added to the variance.
    """
    normed = new_rows8(x)
    return _launch(x, y, gate, gain, shift, eps, None, normed), normed


def quantize_rows(x: Tensor, *, gelu: bool = False) -> Rows8:
    """Returns x by rows in FP8 (e4m3), each with the scale that makes its largest magnitude 448.

    One read and half a write.

    Args:
        x: [..., K], any floating dtype.
        gelu: apply GELU (tanh approximation, arXiv 1606.08415) first, in fp32.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out, (rows, width) = new_rows8(x), flat.shape
    if flat.numel():
        block = triton.next_power_of_2(width)
        sizes = {"WIDTH": width, "BLOCK": block, "num_warps": _warps(block)}
        # Triton's interpreter loses the carry into the exponent when it casts to FP8.
        _quantize[(rows,)](flat, *out, LARGEST=FP8_LARGEST, GELU=gelu, ROUND=interpreted(), **sizes)
    return out


def _launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    normed: Tensor | None,
    rows: Rows8 | None,
) -> Tensor:
    """Returns s, and writes its norm where there is room for it."""
    B, N, C = check_rows("x", x)
    check_same("y", y, x)
    x = x.contiguous()
    y = None if y is None else y.contiguous()
    total = x if y is None else x.new_empty(x.shape)
    named = (("gate", gate), ("gain", gain), ("shift", shift))
    spread = [None if t is None else check_per_row(name, t, x) for name, t in named]
    if x.numel():
        block = triton.next_power_of_2(C)
        _add_norm[(N, B)](
            x,
            y,
            *spread,
            total,
            normed,
            *((None, None) if rows is None else rows),
            N,
            eps,
            *(stride for t in spread for stride in ((0, 0) if t is None else t.stride()[:2])),
            LARGEST=FP8_LARGEST,
            WIDTH=C,
            BLOCK=block,
            # Triton's interpreter loses the carry into the exponent when it casts to FP8.
            ROUND=interpreted(),
            num_warps=_warps(block),
        )
    return total


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit
def _add_norm(
    x_ptr, y_ptr, gate_ptr, gain_ptr, shift_ptr, total_ptr, normed_ptr, values_ptr, scales_ptr, N, eps,
    gate_b, gate_n, gain_b, gain_n, shift_b, shift_n,
    LARGEST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One token of one batch entry. A pointer that is None leaves its part out."""
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = (b * N + n) * WIDTH + column
    x = tl.load(x_ptr + row, mask=inside, other=0.0)
    total = x.to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + row, mask=inside, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            y *= tl.load(gate_ptr + b * gate_b + n * gate_n + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (total + y).to(x.dtype)
        tl.store(total_ptr + row, rounded, mask=inside)
        total = rounded.to(tl.float32)
    if gain_ptr is not None:
        mean = tl.sum(total, axis=0) / WIDTH
        centred = tl.where(inside, total - mean, 0.0)
        rate = tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
        gain = tl.load(gain_ptr + b * gain_b + n * gain_n + column, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + b * shift_b + n * shift_n + column, mask=inside, other=0.0).to(tl.float32)
        normed = (centred * rate * gain + shift).to(x.dtype)
        if normed_ptr is not None:
            tl.store(normed_ptr + row, normed, mask=inside)
        if values_ptr is not None:
            values, scale = _in_fp8(normed.to(tl.float32), LARGEST, ROUND)
            tl.store(values_ptr + row, values.to(values_ptr.dtype.element_ty), mask=inside)
            tl.store(scales_ptr + b * N + n, scale)


@triton.jit
def _quantize(
    x_ptr, values_ptr, scales_ptr, LARGEST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        # x / 2 · (1 + tanh u) is x · sigmoid(2 u).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    values, scale = _in_fp8(x, LARGEST, ROUND)
    tl.store(values_ptr + row * WIDTH + column, values.to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _in_fp8(x, LARGEST: tl.constexpr, ROUND: tl.constexpr):
    """Returns a row over its scale, fp32 in the range of FP8, and the scale."""
    largest = tl.max(tl.abs(x), axis=0)
    scale = tl.where(largest > 0, largest / LARGEST, 1.0)
    scaled = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    if ROUND:
        # To 3 bits after the point, ties to even, as a GPU's cast does.
        bits = scaled.to(tl.int32, bitcast=True)
        scaled = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return scaled, scale
