"""The tail: stand-ins for the key clusters that a query cluster does not compute. What they weigh, what they cost.

A key cluster j that is left out enters as one key, its mean k̄_j, with its mean value v̄_j, n_j times (as in PISA and
SVG-EAR). The mean of exp(q·k/√D) over the cluster is exp(q·k̄_j/√D) times exp(½ qᵀΣ_j q / D) to second order. With a
spread that is alike in all directions, Σ_j = s_j·I, and the mean ‖q‖² of a head for ‖q‖² that factor hangs on the
cluster alone, exp(½ λ s_j) with λ = mean ‖q‖² / D, and rides in the logarithm of n_j. What is still wrong grows with
s_j: n_j·exp(S_ij + ½ λ s_j)·s_j is the error that `top_p_map` weighs against cost.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.layout import Clusters, Tail

# Of a key's squared length, what rounding leaves of the spread of a cluster of equal keys.
LEAST_SPREAD = 1e-6


class Weights(NamedTuple):
    """What stand-ins weigh; follows from sums over all ranks, and is kept until the next refresh."""

    log_n: Tensor
    """fp32 [H, Ck]: ln n_j + ½ λ s_j; -inf for an empty cluster."""
    bias: Tensor
    """fp32 [H, Ck]: ½ λ s_j + ln s_j, for `top_p_map`."""


def squares(x: Tensor) -> Tensor:
    """Returns the squared length of each row, fp32 [H, n, 1]."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return lengths.square_()


def weigh(queries: Clusters, keys: Clusters, key_squares: Tensor) -> Weights:
    """Returns what the stand-ins of `keys` weigh.

    Args:
        queries: global centroids and sizes.
        keys: likewise.
        key_squares: fp32 [H, Ck, 1]: the sum of ‖k‖² over each cluster, over all ranks.
    """
    D, n = keys.centroids.shape[2], keys.sizes.float()
    lengths = key_squares[..., 0] / n.clamp(min=1)
    spread = torch.maximum(lengths - keys.centroids.square().sum(-1), LEAST_SPREAD * lengths) / D
    spread = torch.where(n > 0, spread, 1.0).clamp_(min=torch.finfo(torch.float32).tiny)
    of_queries = (queries.centroids.square().sum(-1) * queries.sizes).sum(-1, keepdim=True)
    factor = 0.5 * of_queries / (queries.sizes.sum(-1, keepdim=True) * D) * spread
    return Weights(n.log() + factor, factor + spread.log())


def stand_ins(k_mean: Tensor, v_mean: Tensor, log_n: Tensor, heads: Tensor | None = None) -> Tail:
    """Returns the tail of some heads, int64 [G], or of all: means fp32 [H, Ck, D], weights fp32 [H, Ck]."""
    whole = Tail(k_mean, v_mean, log_n)
    return whole if heads is None else Tail(*(x[heads] for x in whole))
