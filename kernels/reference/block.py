"""What a transformer block does beside attention: norms, rotary embedding, modulation, residuals, FP8 layers."""

import torch
from torch import Tensor

from semvid.kernels.layout import FP8, FP8_LARGEST, Rows8, check_per_row, check_rotary, check_rows, check_same


def norm_rotary(x: Tensor, weight: Tensor, eps: float, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
    """Returns x normed, turned and split into heads, [B·H, N, D], in x's dtype.

    Each pair (x1, x2) of a head's channels is turned by its token's angle (RoPE, arXiv 2104.09864). The norm is rounded
    to x's dtype before the turn.

    Args:
        x: [B, N, H·D], any floating dtype; D even.
        weight: [H·D], of the RMS norm across heads (Zhang, Sennrich 2019), as Wan has it; or [D], of that of each head,
            as HunyuanVideo has it.
        eps: added to the mean square.
        cosines: fp32 [N, D], each value twice (2i and 2i + 1), as diffusers keeps them.
        sines: likewise.
        heads: H.
    """
    _, N, D = check_rotary(x, weight, cosines, sines, heads)
    split = (-1, heads * D // len(weight), len(weight))
    normed = torch.nn.functional.rms_norm(x.unflatten(2, split[1:]), split[2:], weight, eps)
    normed = normed.flatten(2).unflatten(2, (heads, D)).transpose(1, 2)
    x1, x2 = normed.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosines[:, 0::2], sines[:, 1::2]
    turned = torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)
    return turned.to(x.dtype).reshape(-1, N, D)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Returns x + gate · y, computed in fp32, in x's dtype.

    Args:
        x: [B, N, C], any floating dtype.
        y: likewise, of x's dtype.
        gate: [C], [1 or B, 1, C] or [B, N, C], any floating dtype; None: 1.
    """
    check_rows("x", x)
    check_same("y", y, x)
    gated = y.float() if gate is None else y.float() * check_per_row("gate", gate, x).float()
    return (x.float() + gated).to(x.dtype)


def add_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns s = x + gate · y and LayerNorm(s) · gain + shift (arXiv 1607.06450), both in x's dtype.

    s is rounded to x's dtype before the norm; the rest is fp32.

    Args:
        x: [B, N, C], any floating dtype.
        y: likewise, of x's dtype; None: s is x itself.
        gate: as `add_gated`.
        gain: [C], [1 or B, 1, C] or [B, N, C], any floating dtype: the norm's weight, or 1 + the modulation's scale.
        shift: likewise: the norm's bias, or the modulation's shift.
        eps: added to the variance.
    """
    total = x if y is None else add_gated(x, y, gate)
    normed = torch.nn.functional.layer_norm(total.float(), total.shape[-1:], eps=eps)
    gain, shift = (check_per_row(name, t, x).float() for name, t in (("gain", gain), ("shift", shift)))
    return total, (normed * gain + shift).to(x.dtype)


def add_norm8(
    x: Tensor, y: Tensor | None, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Rows8]:
    """Returns s as `add_norm` does, and its normed rows as `quantize_rows` makes them of those of `add_norm`."""
    total, normed = add_norm(x, y, gate, gain, shift, eps)
    return total, quantize_rows(normed)


def quantize_rows(x: Tensor, *, gelu: bool = False) -> Rows8:
    """Returns x by rows in FP8 (e4m3), each with the scale that makes its largest magnitude 448.

    Args:
        x: [..., K], any floating dtype.
        gelu: apply GELU (tanh approximation, arXiv 1606.08415) first, in fp32.
    """
    wide = torch.nn.functional.gelu(x.float(), approximate="tanh") if gelu else x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scales = torch.where(largest > 0, largest / FP8_LARGEST, torch.ones_like(largest))
    return Rows8((wide / scales).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8), scales)


def linear8(x: Rows8, weight: Rows8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns x · weightᵀ + bias, summed in fp32, [..., M] in `dtype`.

    Args:
        x: [..., K].
        weight: [M, K].
        bias: [M] or None.
        dtype: of the result.
    """
    rows, columns = (given.values.float() * given.scales for given in (x, weight))
    return torch.nn.functional.linear(rows, columns, None if bias is None else bias.float()).to(dtype)
