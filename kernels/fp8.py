"""Products of FP8 matrices with a scale for each row of both: PyTorch's own kernel where the device has one."""

import torch
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.layout import Rows8

OLDEST_GPU = (8, 9)
MULTIPLE = 16
"""Both sides of a weight are multiples of this."""


def linear8(x: Rows8, weight: Rows8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns x · weightᵀ + bias, [..., M] in `dtype`; the tensor cores' own sums, which keep about 14 bits.

    Args:
        x: [..., K]; K a multiple of 16.
        weight: [M, K]; M a multiple of 16.
        bias: [M] or None.
        dtype: of the result, bf16 on a GPU.
    """
    if not x.values.is_cuda:
        return reference.linear8(x, weight, bias, dtype)
    values, scales = x.values.flatten(0, -2), x.scales.flatten(0, -2)
    out: Tensor = torch._scaled_mm(
        values,
        weight.values.t(),
        scale_a=scales,
        scale_b=weight.scales.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.view(*x.values.shape[:-1], len(weight.values))
