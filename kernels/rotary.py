"""RMS norm over all heads or each, rotary embedding and the move to [H, N, D] in one pass over queries or keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semvid.kernels.layout import check_rotary


def norm_rotary(x: Tensor, weight: Tensor, eps: float, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
    """Returns x normed, turned and split into heads, [B·H, N, D], in x's dtype; one read and one write of x.

    The norm is rounded to x's dtype before the turn, as it is when the two are separate.

    Args:
        x: [B, N, H·D], any floating dtype; D even.
        weight: [H·D], of the RMS norm across heads (Zhang, Sennrich 2019), as Wan has it; or [D], of that of each head,
            as HunyuanVideo has it.
        eps: added to the mean square.
        cosines: fp32 [N, D], each value twice (2i and 2i + 1), as diffusers keeps them.
        sines: likewise.
        heads: H.

    Raises:
        ValueError: D is no power of two where each head has its norm.
    """
    B, N, D = check_rotary(x, weight, cosines, sines, heads)
    x, weight = x.contiguous(), weight.contiguous()
    per_head = len(weight) < heads * D
    if per_head and D & (D - 1):
        raise ValueError(f"D is {D}; accepted: a power of two, with a norm of each head")
    out = torch.empty(B * heads, N, D, dtype=x.dtype, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(heads * D)
        _norm_rotary[(N, B)](
            x,
            weight,
            cosines.contiguous(),
            sines.contiguous(),
            out,
            N,
            eps,
            WIDTH=heads * D,
            D=D,
            BLOCK=block,
            PER_HEAD=per_head,
            num_warps=min(16, max(1, block // 512)),
        )
    return out


@triton.jit
def _norm_rotary(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, N, eps,
    WIDTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """One token of one batch entry, all heads."""
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + (b * N + n) * WIDTH + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if PER_HEAD:
        square = tl.sum(tl.reshape(wide * wide, (BLOCK // D, D)), axis=1)
        rate = tl.reshape(tl.broadcast_to(tl.rsqrt(square / D + eps)[:, None], (BLOCK // D, D)), (BLOCK,))
        weight = tl.load(weight_ptr + column % D).to(tl.float32)
    else:
        rate = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = (wide * rate * weight).to(x.dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(normed, (BLOCK // 2, 2)))
    pair = tl.arange(0, BLOCK // 2)
    angle = n * D + pair * 2 % D
    cosine = tl.load(cos_ptr + angle, mask=pair * 2 < WIDTH, other=0.0)
    sine = tl.load(sin_ptr + angle + 1, mask=pair * 2 < WIDTH, other=0.0)
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (BLOCK,))
    head = b * (WIDTH // D) + column // D
    tl.store(out_ptr + (head * N + n) * D + column % D, turned.to(x.dtype), mask=inside)
