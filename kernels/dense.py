"""Dense attention by the best kernel that PyTorch has here, with the lse where it is asked for."""

import contextlib
import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from semvid.kernels.layout import check_rows, result_like

# The first that takes the input: cuDNN is PyTorch's fastest on Hopper.
_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q·kᵀ/√D)·v, [H, Nq, D] in q's dtype.

    Args:
        q: [H, Nq, D].
        k: [H, Nk, D]; v likewise.
        v: values.
    """
    check_rows("q", q)
    if q.numel() == 0:
        return torch.zeros_like(q)
    with sdpa_kernel(_ORDER, set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def dense_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `dense` and the natural-log lse, fp32 [H, Nq]; without a key out is 0 and lse -inf.

    Args:
        q: [H, Nq, D].
        k: [H, Nk, D]; v likewise.
        v: values.
    """
    H, Nq, _ = check_rows("q", q)
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.full((H, Nq), -math.inf, device=q.device)
    # The ops behind scaled_dot_product_attention, which keeps the lse to itself.
    ops, args = torch.ops.aten, (q[None], k[None], v[None])
    if q.is_cuda and q.dtype == torch.float32:
        out, lse = ops._scaled_dot_product_efficient_attention(*args, None, True)[:2]
    elif q.is_cuda:
        out, lse = _half_precision(*args)
    else:
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(*args)[:2]
    # Some kernels round the lse's rows up, or leave a dimension of one behind them.
    return out[0], lse.reshape(H, -1)[:, :Nq].float()


def _half_precision(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns out and lse on a GPU, by cuDNN where it is the faster one and takes the input."""
    if torch.cuda.get_device_capability(q.device) >= (9, 0):
        with contextlib.suppress(RuntimeError):
            out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
            return out, lse
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out, lse


def dense_pieces(
    q: Tensor, k: Tensor, v: Tensor, rows: list[int], *, with_lse: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns `dense` for pieces of heads that use only their first rows of q: (out, lse); what is unused: undefined.

    Args:
        q: [G, Nq, D].
        k: [G, Nk, D], whole heads; v likewise.
        v: values.
        rows: how many rows each piece uses.
        with_lse: whether lse is wanted; else it is undefined.
        out: where the result goes, contiguous and like q; new memory if absent.
    """
    out = result_like(q, out)
    lse = torch.empty(q.shape[:2], device=q.device)
    first = 0
    while first < len(rows):
        last = first
        # Neighbours of the same length go together: all whole heads, as a rule.
        while last < len(rows) and rows[last] == rows[first]:
            last += 1
        part, used = slice(first, last), slice(rows[first])
        if with_lse:
            out[part, used], lse[part, used] = dense_with_lse(q[part, used], k[part], v[part])
        else:
            out[part, used] = dense(q[part, used], k[part], v[part])
        first = last
    return out, lse
