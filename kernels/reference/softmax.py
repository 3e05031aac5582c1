"""Attention over the selected blocks, and the merging of two results."""

import math

import torch
from torch import Tensor

from semvid.kernels.layout import BlockMap, Plan, Tail, check_attention, check_plan, result_like
from semvid.kernels.reference.rows import gather_rows, scatter_rows

# Scores of this many (row, column) pairs are held at once: what stays in a CPU's cache, and 256 MB on a GPU.
CPU_PAIRS_AT_ONCE = 1 << 18
GPU_PAIRS_AT_ONCE = 1 << 26


def plan(q_offsets: Tensor, k_offsets: Tensor, block_map: BlockMap) -> Plan:
    """Returns the plan of `attention` for these runs and this map; the reference adds no lists.

    Args:
        q_offsets: int32 [H, Cq + 1].
        k_offsets: int32 [H, Ck + 1].
        block_map: bool [H, Cq, Ck].
    """
    check_plan(q_offsets, k_offsets, block_map)
    return Plan(q_offsets, k_offsets, block_map)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    q_order: Tensor | None = None,
    tail: Tail | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns softmax(scale·q·kᵀ)·v over the selected blocks, in q's dtype, and the natural-log lse, fp32 [H, Nq].

    A query row whose cluster selects nothing (and has no tail) gets out 0 and lse -inf. Rows of q after the last run of
    its head are undefined in both.

    Args:
        q: [H, Nq, D], grouped by query cluster, or in token order if `q_order` is given.
        k: [H, Nk, D], grouped by key cluster.
        v: [H, Nk, D], grouped by key cluster.
        plan: the runs of both sides and the map, from `plan`.
        q_order: int32 [H, Nq]: with it q is read, and out and lse are returned, in token order.
        tail: what stands in for key clusters that are not selected, in the same softmax.
        scale: factor of the scores; 1/√D if absent.
        out: where the result goes, contiguous and like q; new memory if absent.
    """
    H, Nq, Nk, D = check_attention(q, k, v, plan)
    result = result_like(q, out)
    if q_order is not None:
        grouped, lse = attention(gather_rows(q, q_order), k, v, plan, tail=tail, scale=scale)
        return result.copy_(scatter_rows(grouped, q_order)), scatter_rows(lse[..., None], q_order)[..., 0]
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    lse = torch.empty(H, Nq, dtype=torch.float32, device=q.device)
    columns = Nk + (0 if tail is None else tail.log_n.shape[1])
    if columns == 0:
        return result.zero_(), lse.fill_(-math.inf)
    rows = max(1, pairs_at_once(q.device) // max(1, columns))
    for h in range(H):
        q_cluster, k_cluster = _cluster_of_row(plan.q_offsets[h], Nq), _cluster_of_row(plan.k_offsets[h], Nk)
        selected, queries = plan.block_map.selected[h], q[h].float() * scale
        # One row a query cluster and one column a key; the rows of a cluster share it.
        skipped = ~selected[:, k_cluster]
        keys, values = k[h].float(), v[h].float()
        if tail is not None:
            skipped = torch.cat([skipped, selected], dim=1)
            keys, values = torch.cat([keys, tail.k_mean[h]]), torch.cat([values, tail.v_mean[h]])
        for start in range(0, Nq, rows):
            part = slice(start, start + rows)
            scores = queries[part] @ keys.mT
            if tail is not None:
                scores[:, Nk:] += tail.log_n[h]
            scores.masked_fill_(skipped[q_cluster[part]], -math.inf)
            # A row without keys has maximum -inf; -inf - -inf would be NaN.
            top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            lse[h, part] = (top + total.log())[:, 0]
            result[h, part] = (weights @ values).div_(total.clamp_(min=torch.finfo(torch.float32).tiny))
    return result, lse


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention over the union of two disjoint key sets from the results over each: (out, lse).

    Args:
        out_a: [H, N, D]; out_b likewise.
        lse_a: fp32 natural-log lse [H, N]; lse_b likewise. -inf: that part held no key.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.nan_to_num(neginf=0.0)
    weight_a, weight_b = (lse_a - shift).exp()[..., None], (lse_b - shift).exp()[..., None]
    return (out_a.float() * weight_a + out_b.float() * weight_b).to(out_a.dtype), lse


def pairs_at_once(device: torch.device) -> int:
    """Returns how many scores are held at once."""
    return CPU_PAIRS_AT_ONCE if device.type == "cpu" else GPU_PAIRS_AT_ONCE


def _cluster_of_row(offsets: Tensor, N: int) -> Tensor:
    """Returns the cluster of each grouped row, int64 [N], of one head's offsets [C + 1]."""
    rows = torch.arange(N, dtype=torch.int32, device=offsets.device)
    # Rows after the last run belong to nobody and are counted with it.
    return torch.searchsorted(offsets[1:].contiguous(), rows, right=True).clamp_(max=len(offsets) - 2)
