"""The block map: which key clusters each query cluster computes, by the attention mass their centroids promise."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from semvid.kernels.kmeans import check_centroids
from semvid.kernels.layout import BlockMap, check_budget, check_index, check_rows, least_clusters
from semvid.kernels.limits import MAX_KEY_CLUSTERS

# Key clusters of one query cluster are held in registers, 32 a thread; more than this would spill.
# The key of a score of -inf: its bits, 0xFF800000, with all but the sign turned over.
EMPTY_KEY = 0x807FFFFF - 2**32


def top_p_map(
    q_centroids: Tensor,
    k_centroids: Tensor,
    k_sizes: Tensor,
    p: float | Tensor,
    floor: float | Tensor,
    bias: Tensor | None = None,
) -> BlockMap:
    """Returns the key clusters each query cluster computes: the fewest whose estimated attention mass reaches p.

    The rule is the reference's (Sparse VideoGen2, arXiv 2505.18875), without its sort: the score of the last cluster
    taken is found by bisection over the bits of a float, then ties at that score are taken by index. With `bias` the
    weight is n_j·exp(S_ij + b_j) and clusters are taken in falling order of it per key.

    Args:
        q_centroids: fp32 [H, Cq, D]. D is a multiple of 16, at most 256.
        k_centroids: fp32 [H, Ck, D], Ck at most 8,192.
        k_sizes: int32 [H, Ck], tokens in each key cluster (over all ranks).
        p: mass to reach, 0 <= p <= 1; 1 takes every non-empty cluster by definition; with 0 nothing is taken by mass,
            and the floor alone says how many are; of each head if it is a tensor, fp32 [H].
        floor: least share of key clusters kept, 0 <= floor <= 1; of each head if it is a tensor, fp32 [H].
        bias: fp32 [H, Ck], finite.
    """
    H, Cq, D = check_rows("q_centroids", q_centroids)
    check_centroids("q_centroids", q_centroids, H, D)
    Ck = check_centroids("k_centroids", k_centroids, H, D)
    check_index("k_sizes", k_sizes, (H, Ck))
    check_budget(p, floor, bias, H, Ck)
    if not isinstance(p, Tensor):
        if p >= 1.0:
            return BlockMap((k_sizes > 0)[:, None, :].expand(H, Cq, Ck).contiguous())
        p = torch.full((H,), p, dtype=torch.float32, device=k_sizes.device)
    if Ck > MAX_KEY_CLUSTERS:
        raise ValueError(f"k_centroids holds {Ck} clusters a head; accepted: at most {MAX_KEY_CLUSTERS}")
    selected = torch.empty(H, Cq, Ck, dtype=torch.bool, device=q_centroids.device)
    scores = torch.empty(H, Cq, Ck, dtype=torch.float32, device=q_centroids.device)
    _cluster_scores[(triton.cdiv(Ck, 64), triton.cdiv(Cq, 64), H)](
        q_centroids.contiguous(),
        k_centroids.contiguous(),
        k_sizes.contiguous(),
        None if bias is None else bias.contiguous(),
        scores,
        Cq,
        Ck,
        1.0 / math.sqrt(D),
        D=D,
        BLOCK_Q=64,
        BLOCK_K=64,
        BLOCK_D=32,
        num_warps=4,
        num_stages=3,
    )
    block_k = max(32, triton.next_power_of_2(Ck))
    # One warp for 1024 clusters: its sums need no barrier.
    _select[(H * Cq,)](
        scores,
        selected,
        p.contiguous(),
        None if bias is None else k_sizes.contiguous(),
        least_clusters(floor, H, Ck, q_centroids.device),
        Cq,
        Ck,
        BLOCK_K=block_k,
        EMPTY=EMPTY_KEY,
        num_warps=max(1, block_k // 1024),
    )
    return BlockMap(selected)


def density(block_map: BlockMap, q_sizes: Tensor, k_sizes: Tensor) -> Tensor:
    """Returns the share of token pairs that the map computes, fp32 [H] (1 is dense); pairs are counted exactly.

    Args:
        block_map: the map, [H, Cq, Ck].
        q_sizes: int32 [H, Cq].
        k_sizes: int32 [H, Ck].
    """
    H, Cq, Ck = block_map.selected.shape
    check_index("q_sizes", q_sizes, (H, Cq))
    check_index("k_sizes", k_sizes, (H, Ck))
    share = torch.empty(H, dtype=torch.float32, device=q_sizes.device)
    if H > 0:
        _count_pairs[(H,)](
            block_map.selected.contiguous(),
            q_sizes.contiguous(),
            k_sizes.contiguous(),
            share,
            Cq,
            Ck,
            BLOCK_Q=16,
            BLOCK_K=512,
            num_warps=8,
        )
    return share


@triton.jit
def _cluster_scores(
    q_ptr,
    k_ptr,
    sizes_ptr,
    bias_ptr,
    scores_ptr,
    Cq,
    Ck,
    scale,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scores[h, i, j] = scale·q_i·k_j + log n_j, or + b_j if there is a bias; -inf for an empty cluster."""
    h = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    product = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q_at, k_at = q_ptr + (h * Cq + i[:, None]) * D + d[None, :], k_ptr + (h * Ck + j[None, :]) * D + d[:, None]
        q = tl.load(q_at, mask=(i < Cq)[:, None] & (d < D)[None, :], other=0.0)
        k = tl.load(k_at, mask=(j < Ck)[None, :] & (d < D)[:, None], other=0.0)
        # Three TF32 products make an fp32 one, at the matrix unit's rate.
        product = tl.dot(q, k, product, input_precision="tf32x3")
    n = tl.load(sizes_ptr + h * Ck + j, mask=j < Ck, other=0)
    added = tl.log(tl.maximum(n, 1).to(tl.float32))
    if bias_ptr is not None:
        added = tl.load(bias_ptr + h * Ck + j, mask=j < Ck, other=0.0)
    score = product * scale + tl.where(n > 0, added, float("-inf"))[None, :]
    tl.store(scores_ptr + (h * Cq + i[:, None]) * Ck + j[None, :], score, mask=(i < Cq)[:, None] & (j < Ck)[None, :])


@triton.jit
def _select(
    scores_ptr, selected_ptr, p_ptr, sizes_ptr, least_ptr, Cq, Ck, BLOCK_K: tl.constexpr, EMPTY: tl.constexpr
):  # fmt: skip
    """One row: cluster j is taken if the mass ranked before it is < p of all, or if fewer than its head's least are.

    With `sizes_ptr` the scores are those of one key, and a cluster weighs as many.
    """
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(p_ptr + row // Cq)
    least = tl.load(least_ptr + row // Cq)
    j = tl.arange(0, BLOCK_K)
    score = tl.load(scores_ptr + row * Ck + j, mask=j < Ck, other=float("-inf"))
    # Weights in 0 .. 1, not divided by their sum: the goal is multiplied by it instead. NaN if all are empty; then
    # the last mask clears the row.
    weight = tl.exp(score - tl.max(score, axis=0))
    if sizes_ptr is not None:
        weight *= tl.load(sizes_ptr + row // Cq * Ck + j, mask=j < Ck, other=0).to(tl.float32)
    goal = tl.where(p < 1, p * tl.sum(weight, axis=0), float("inf"))
    # An integer ordered as the score; the score of an empty cluster, -inf, is EMPTY. `last` becomes the smallest key
    # with a mass above it < goal (or fewer than `least` clusters): that of the last cluster taken. Adding in one fixed
    # order is monotone even when rounded, so the bisection is exact for these sums.
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    below = EMPTY
    last = tl.max(key, axis=0)
    for _ in range(32):
        # The mean of two int32 that may be 2^32 apart.
        middle = (below & last) + ((below ^ last) >> 1)
        above = key > middle
        enough = tl.sum(tl.where(above, weight, 0.0), axis=0) < goal
        enough = enough | (tl.sum(above.to(tl.int32), axis=0) < least)
        last = tl.where(enough, middle, last)
        below = tl.where(enough, below, middle)
    above = key > last
    tie = (key == last).to(tl.int32)
    ties_before = tl.cumsum(tie, axis=0) - tie
    tied_mass = ties_before * weight
    if sizes_ptr is not None:
        # Of one score, but not of one size.
        tied_mass = tl.cumsum(tie * weight, axis=0) - tie * weight
    mass_before = tl.sum(tl.where(above, weight, 0.0), axis=0) + tied_mass
    rank = tl.sum(above.to(tl.int32), axis=0) + ties_before
    taken = above | ((tie == 1) & ((mass_before < goal) | (rank < least)))
    tl.store(selected_ptr + row * Ck + j, taken & (key > EMPTY), mask=j < Ck)


@triton.jit
def _count_pairs(
    selected_ptr, q_sizes_ptr, k_sizes_ptr, share_ptr, Cq, Ck, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One head: computed pairs over all pairs, counted in int64."""
    h = tl.program_id(0).to(tl.int64)
    computed = tl.zeros((BLOCK_Q, BLOCK_K), tl.int64)
    num_queries = tl.zeros((BLOCK_Q,), tl.int64)
    num_keys = tl.zeros((BLOCK_K,), tl.int64)
    for start_q in range(0, Cq, BLOCK_Q):
        i = start_q + tl.arange(0, BLOCK_Q)
        nq = tl.load(q_sizes_ptr + h * Cq + i, mask=i < Cq, other=0).to(tl.int64)
        num_queries += nq
        for start_k in range(0, Ck, BLOCK_K):
            j = start_k + tl.arange(0, BLOCK_K)
            nk = tl.load(k_sizes_ptr + h * Ck + j, mask=j < Ck, other=0).to(tl.int64)
            at = selected_ptr + (h * Cq + i[:, None]) * Ck + j[None, :]
            inside = (i < Cq)[:, None] & (j < Ck)[None, :]
            on = tl.load(at, mask=inside, other=0).to(tl.int64)
            computed += on * nq[:, None] * nk[None, :]
    for start_k in range(0, Ck, BLOCK_K):
        j = start_k + tl.arange(0, BLOCK_K)
        num_keys += tl.load(k_sizes_ptr + h * Ck + j, mask=j < Ck, other=0).to(tl.int64)
    pairs = tl.sum(num_queries, axis=0) * tl.sum(num_keys, axis=0)
    done = tl.sum(tl.sum(computed, axis=1), axis=0).to(tl.float64)
    tl.store(share_ptr + h, (done / tl.maximum(pairs, 1).to(tl.float64)).to(tl.float32))
