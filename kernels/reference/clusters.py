"""Clusters and the map of their pairs: labels, sums, order, top-p and density."""

import math

import torch
from torch import Tensor

from semvid.kernels.layout import (
    BlockMap,
    Permutation,
    check_budget,
    check_index,
    check_rows,
    check_update,
    least_clusters,
)
from semvid.kernels.reference.rows import gather_rows
from semvid.kernels.reference.softmax import pairs_at_once


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Returns the nearest centroid of every token in Euclidean distance, int32 [H, N]; ties go to the smaller index.

    ‖x - c‖² is compared without its constant ‖x‖²: the label is argmax of x·c - ‖c‖²/2.

    Args:
        x: [H, N, D], any floating dtype.
        centroids: fp32 [H, C, D].
    """
    H, N, _ = check_rows("x", x)
    C = centroids.shape[1]
    half_norms = centroids.square().sum(-1).mul(0.5)
    labels = torch.empty(H, N, dtype=torch.int32, device=x.device)
    rows = max(1, pairs_at_once(x.device) // max(1, H * C))
    for start in range(0, N, rows):
        part = x[:, start : start + rows].float()
        closeness = torch.baddbmm(half_norms[:, None, :], part, centroids.mT, beta=-1)
        labels[:, start : start + rows] = closeness.argmax(-1).to(torch.int32)
    return labels


def cluster_sums(x: Tensor, labels: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Returns the sum of each cluster's tokens, fp32 [H, C, D], and their number, int32 [H, C].

    Args:
        x: [H, N, D], any floating dtype.
        labels: int32 [H, N], each in 0 .. C - 1.
        C: number of clusters.
    """
    H, N, _ = check_rows("x", x)
    check_index("labels", labels, (H, N))
    return sums_by_runs(x, group(labels, C))


def sums_by_runs(x: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """Returns `cluster_sums` of tokens that are grouped already, so that the order is made once for both uses.

    Args:
        x: [H, N, D], any floating dtype, in token order.
        permutation: of x's tokens, from `group`.
    """
    H, N, D = check_rows("x", x)
    order, offsets = permutation
    C = offsets.shape[-1] - 1
    check_index("order", order, (H, N))
    check_index("offsets", offsets, (H, C + 1))
    counts = offsets.diff()
    rows = gather_rows(x, order).float().reshape(H * N, D)
    if x.device.type == "cpu":
        cluster = torch.repeat_interleave(torch.arange(H * C), counts.flatten())
        sums = torch.zeros(H * C, D).index_add_(0, cluster, rows)
    else:
        # On a GPU index_add_ adds in another order each time; this adds row after row of each run.
        sums = torch.segment_reduce(rows, "sum", lengths=counts.flatten().long(), unsafe=True, initial=0.0)
    return sums.view(H, C, D), counts


def centroids_of(sums: Tensor, counts: Tensor, previous: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns the mean of each cluster's tokens, fp32 [H, C, D]; an empty cluster keeps its centroid.

    Args:
        sums: fp32 [H, C, D], of the tokens of each cluster.
        counts: int32 or fp32 [H, C], how many they are.
        previous: fp32 [H, C, D], the centroids before.
        out: contiguous memory of the result, which may be that of `previous`; new if absent.
    """
    check_update(sums, counts, previous, out)
    made = torch.where((counts > 0)[..., None], sums / counts.clamp(min=1)[..., None], previous)
    return made if out is None else out.copy_(made)


def group(labels: Tensor, C: int) -> Permutation:
    """Returns the stable permutation that makes each cluster one run.

    Args:
        labels: int32 [H, N], each in 0 .. C - 1.
        C: number of clusters.
    """
    H, N = labels.shape
    check_index("labels", labels, (H, N))
    order = torch.argsort(labels, dim=-1, stable=True).to(torch.int32)
    bounds = torch.arange(C + 1, dtype=torch.int32, device=labels.device).expand(H, C + 1).contiguous()
    sorted_labels = torch.gather(labels, 1, order.long())
    return Permutation(order, torch.searchsorted(sorted_labels, bounds, out_int32=True))


def top_p_map(
    q_centroids: Tensor,
    k_centroids: Tensor,
    k_sizes: Tensor,
    p: float | Tensor,
    floor: float | Tensor,
    bias: Tensor | None = None,
) -> BlockMap:
    """Returns the key clusters each query cluster computes: the fewest whose estimated attention mass reaches p.

    The mass of key cluster j for query cluster i is P_ij = n_j·exp(S_ij) / Σ_k n_k·exp(S_ik), S = Qc·Kcᵀ/√D
    (Sparse VideoGen2, arXiv 2505.18875). Clusters are taken in falling order of P, ties by index, up to and with
    the one that crosses p, and at least ⌈floor·Ck⌉ of them. With p = 1 every non-empty cluster is taken, by
    definition and not by a rounded sum.

    With `bias` b the weight is E_ij = n_j·exp(S_ij + b_j), p is a share of Σ E, and clusters are taken in falling order
    of E_ij / n_j: most of it for the fewest keys. If E is the error of leaving j to its stand-in, that is error over
    cost.

    Args:
        q_centroids: fp32 [H, Cq, D].
        k_centroids: fp32 [H, Ck, D].
        k_sizes: int32 [H, Ck], tokens in each key cluster (over all ranks).
        p: mass to reach, 0 <= p <= 1; with 0 nothing is taken by mass, and the floor alone says how many are; of each
            head if it is a tensor, fp32 [H].
        floor: least share of key clusters kept, 0 <= floor <= 1; of each head if it is a tensor, fp32 [H].
        bias: fp32 [H, Ck], finite.
    """
    H, Cq, D = check_rows("q_centroids", q_centroids)
    Ck = k_centroids.shape[1]
    check_index("k_sizes", k_sizes, (H, Ck))
    check_budget(p, floor, bias, H, Ck)
    occupied = (k_sizes > 0)[:, None, :].expand(H, Cq, Ck)
    if not isinstance(p, Tensor):
        if p >= 1.0:
            return BlockMap(occupied.contiguous())
        p = torch.full((H,), p, device=k_sizes.device)
    log_n = k_sizes.float().log()[:, None, :]
    scores = q_centroids @ k_centroids.mT / math.sqrt(D)
    scores = scores + log_n if bias is None else torch.where(occupied, scores + bias[:, None, :], -math.inf)
    # Ranked by score and not by mass: clusters whose mass underflows to 0 still stand before empty ones.
    scores, ranked = scores.sort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(scores if bias is None else scores + log_n.expand(H, Cq, Ck).gather(-1, ranked), dim=-1)
    before = mass.cumsum(-1) - mass
    least = least_clusters(floor, H, Ck, mass.device)[:, None, None]
    keep = (before < p[:, None, None]) | (p >= 1)[:, None, None] | (torch.arange(Ck, device=mass.device) < least)
    selected = torch.zeros_like(keep).scatter_(-1, ranked, keep)
    return BlockMap(selected & occupied)


def density(block_map: BlockMap, q_sizes: Tensor, k_sizes: Tensor) -> Tensor:
    """Returns the share of token pairs that the map computes, fp32 [H] (1 is dense).

    Args:
        block_map: the map, [H, Cq, Ck].
        q_sizes: int32 [H, Cq].
        k_sizes: int32 [H, Ck].
    """
    q, k = q_sizes.double(), k_sizes.double()
    computed = torch.einsum("hq,hqk,hk->h", q, block_map.selected.double(), k)
    return (computed / (q.sum(-1) * k.sum(-1)).clamp(min=1)).float()


def unpack_map(bits: Tensor, heads: Tensor, Ck: int) -> Tensor:
    """Returns the block maps of some heads, bool [G, Cq, Ck].

    Args:
        bits: uint8 [H, Cq, ⌈Ck / 8⌉]: eight key clusters a byte, the first in the lowest bit.
        heads: int64 [G].
        Ck: key clusters.
    """
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[heads][..., None] >> places) & 1).flatten(-2)[..., :Ck].bool()
