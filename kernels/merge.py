"""Attention over two disjoint key sets joined by their lse, in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semvid.kernels.layout import check_rows

BLOCK_ROWS = 32


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention over the union of two disjoint key sets from the results over each: (out, lse).

    A side whose lse is -inf has no weight, whatever its out holds.

    Args:
        out_a: [H, N, D]; out_b likewise.
        lse_a: fp32 natural-log lse [H, N]; lse_b likewise. -inf: that part held no key.

    Raises:
        ValueError: the two sides differ in shape or dtype, or an lse is not fp32 [H, N].
    """
    H, N, D = check_rows("out_a", out_a)
    if out_b.shape != out_a.shape or out_b.dtype != out_a.dtype:
        raise ValueError(f"out_b must be {out_a.dtype} {list(out_a.shape)}, not {out_b.dtype} {list(out_b.shape)}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.dtype != torch.float32 or tuple(lse.shape) != (H, N):
            raise ValueError(f"{name} must be fp32 [{H}, {N}], not {lse.dtype} {list(lse.shape)}")
    out = torch.empty(H, N, D, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(H, N, dtype=torch.float32, device=out_a.device)
    if out.numel() > 0:
        _merge_kernel[(triton.cdiv(H * N, BLOCK_ROWS),)](
            out_a.contiguous(), lse_a.contiguous(), out_b.contiguous(), lse_b.contiguous(), out, lse, H * N, D,
            BLOCK=BLOCK_ROWS, BLOCK_D=triton.next_power_of_2(D),
        )  # fmt: skip
    return out, lse


@triton.jit
def _merge_kernel(out_a, lse_a, out_b, lse_b, out, lse, N, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(lse_a + row, mask=row < N, other=float("-inf"))
    b = tl.load(lse_b + row, mask=row < N, other=float("-inf"))
    high = tl.maximum(a, b)
    # Without a key on either side -inf - -inf would be NaN.
    shift = tl.where(high > float("-inf"), high, 0.0)
    weight_a, weight_b = tl.exp(a - shift), tl.exp(b - shift)
    total = weight_a + weight_b
    share = 1.0 / tl.where(total > 0, total, 1.0)
    dim = tl.arange(0, BLOCK_D)
    place = row[:, None] * D + dim[None, :]
    inside = (row < N)[:, None] & (dim < D)[None, :]
    x = tl.load(out_a + place, mask=inside & (weight_a > 0)[:, None], other=0.0).to(tl.float32)
    y = tl.load(out_b + place, mask=inside & (weight_b > 0)[:, None], other=0.0).to(tl.float32)
    merged = x * (weight_a * share)[:, None] + y * (weight_b * share)[:, None]
    tl.store(out + place, merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, high + tl.log(tl.where(total > 0, total, 1.0)), mask=row < N)
