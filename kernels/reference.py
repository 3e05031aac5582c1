"""Every op of `kernels` in plain fp32 PyTorch: what the fast versions are tested against, and the CPU's own path.

Names and signatures are those of the fast versions. Matrix products are taken in fp32 whatever the input's dtype.
"""

import math

import torch
from torch import Tensor

from semvid.kernels.layout import (
    FP8,
    FP8_LARGEST,
    Addresses,
    BlockMap,
    Permutation,
    Plan,
    Rows8,
    Shared,
    Tail,
    check_attention,
    check_budget,
    check_index,
    check_per_row,
    check_plan,
    check_rotary,
    check_rows,
    check_same,
    least_clusters,
    result_like,
)

# Scores of this many (row, column) pairs are held at once: what stays in a CPU's cache, and 256 MB on a GPU.
CPU_PAIRS_AT_ONCE = 1 << 18
GPU_PAIRS_AT_ONCE = 1 << 26


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
    rows = max(1, _pairs_at_once(x.device) // max(1, H * C))
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


def gather_rows(x: Tensor, order: Tensor) -> Tensor:
    """Returns the rows of x in sorted order: out[h, i] = x[h, order[h, i]].

    Args:
        x: [H, N, D].
        order: int32 [H, n].
    """
    check_rows("x", x)
    return torch.gather(x, 1, order.long()[..., None].expand(-1, -1, x.shape[-1]))


def scatter_rows(x: Tensor, order: Tensor, rows: int | None = None) -> Tensor:
    """Returns the rows of x back in token order: out[h, order[h, i]] = x[h, i]. The inverse of `gather_rows`.

    Args:
        x: [H, N, D].
        order: int32 [H, N], different places in 0 .. rows - 1.
        rows: of the result; N if absent. What no row of x goes to is left undefined.
    """
    H, N, D = check_rows("x", x)
    out = torch.empty(H, N if rows is None else rows, D, dtype=x.dtype, device=x.device)
    return out.scatter_(1, order.long()[..., None].expand_as(x), x)


def scatter_among(x: Tensor, source: Tensor, blocks: Shared, ranks: Tensor, targets: Tensor) -> None:
    """Copies rows of x into the ranks' blocks: blocks[ranks[i]][targets[i]] = x[source[i]]; the rest stays.

    Args:
        x: [1, N, D].
        source: int32 [1, R].
        blocks: of x's dtype and D.
        ranks: uint8 [1, R].
        targets: int32 [1, R], different places on each rank.
    """
    for rank, block in enumerate(blocks.blocks):
        going = ranks[0] == rank
        block[0, targets[0, going].long()] = x[0, source[0, going].long()]


def gather_among(blocks: Shared, ranks: Tensor, targets: Tensor, out: Tensor, places: Tensor) -> None:
    """Copies rows of the ranks' blocks to places in out: out[places[i]] = blocks[ranks[i]][targets[i]]; the rest stays.

    Args:
        blocks: of out's dtype and D.
        ranks: uint8 [1, R].
        targets: int32 [1, R].
        out: [1, N, D].
        places: int32 [1, R], different ones.
    """
    for rank, block in enumerate(blocks.blocks):
        coming = ranks[0] == rank
        out[0, places[0, coming].long()] = block[0, targets[0, coming].long()]


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
    rows = max(1, _pairs_at_once(q.device) // max(1, columns))
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


def source_rows(order: Tensor, spans: Tensor, total: int, *steps: tuple[int, int]) -> list[Tensor]:
    """Returns where the rows of spans of sorted tokens lie in memory, int32 [1, total] for each of `steps`.

    Args:
        order: int32 [H, n]: the tokens of each head in the order of their labels.
        spans: int64 [S, 4]: where a span begins in the result, its head, its first place in `order`, its length.
            Together they cover 0 .. total.
        total: rows of the result.
        steps: (rows from head to head, rows from token to token) of a tensor that is read or written, one or two.
    """
    check_index("order", order, tuple(order.shape))
    _, head, first, length = spans.unbind(1)
    token = order.flatten()[_counted(head * order.shape[1] + first, length, total)]
    head = torch.repeat_interleave(head, length, output_size=total)
    return [(head * h + token * t).to(torch.int32)[None] for h, t in steps]


def target_rows(
    counts: Tensor, pieces: Tensor, begins: Tensor, first_source: int, total: int, most: int
) -> tuple[Tensor, Tensor]:
    """Returns where rows of pieces belong, int32 [1, total], and the runs of each piece's clusters, int32 [G, C + 1].

    Rows are listed source by source, piece by piece, cluster by cluster; they belong piece by piece, cluster by
    cluster, in a cluster source by source.

    Args:
        counts: int32 [U, H, C], each source's tokens in each cluster.
        pieces: int64 [G, 4]: head, first row and one after the last, counted through the head's clusters over all
            sources, and the place of the first.
        begins: int64 [S, G]: where the rows of a source and piece begin in the list. S sources are listed.
        first_source: the first of those that are listed.
        total: rows listed.
        most: rows of one source and piece, at most.
    """
    head, first, last, base = pieces.unbind(1)
    counts, first, last = counts[:, head].long(), first[:, None], last[:, None]
    in_cluster = counts.sum(0)
    ends = in_cluster.cumsum(-1)
    begin = ends - in_cluster + counts.cumsum(0) - counts
    listed = slice(first_source, first_source + len(begins))
    start, end = begin[listed].clamp(first, last), (begin + counts)[listed].clamp(first, last)
    # Where nothing is wanted of the list its runs are not counted.
    lengths = (end - start).flatten() if total else end.new_zeros(start.numel())
    targets = _counted((start + base[:, None] - first).flatten(), lengths, total)
    offsets = torch.nn.functional.pad(ends.clamp(first, last) - first, (1, 0))
    return targets.to(torch.int32)[None], offsets.to(torch.int32)


def addresses(
    order: Tensor, counts: Tensor, source: int, pieces: Tensor, spans: Tensor, cuts: Tensor, *steps: tuple[int, int]
) -> Addresses:
    """Returns where one source's rows lie and belong: n rows for each span, in the order of their labels.

    Rows of a head are counted through its clusters, in a cluster source by source; a cut takes a stretch of them.

    Args:
        order: int32 [H, n]: the source's tokens of each head in the order of their labels.
        counts: int32 [U, H, C], each source's tokens in each cluster.
        source: which.
        pieces: int64 [H + G, 4]: head, first row, one after the last, and the place of the first; every head as a
            whole, then the pieces whose runs are wanted.
        spans: int64 [S, 3]: a head, and the first and one after the last of `cuts` among which its rows are.
        cuts: int64 [T, 4]: first row, one after the last, rank, and the place of the first in that rank's block.
        steps: (rows from head to head, rows from token to token) of a tensor that is read or written, one or two.
    """
    check_index("order", order, tuple(order.shape))
    H, n = order.shape
    begins = torch.arange(H, device=order.device)[None] * n
    rows = target_rows(counts, pieces[:H], begins, source, H * n, n)[0].view(H, n)
    tokens, ranks, targets = [], [], []
    for head, first_cut, last_cut in spans.tolist():
        row = rows[head]
        rank, target = torch.zeros_like(row), torch.zeros_like(row)
        for first, last, of_rank, place in cuts[first_cut:last_cut].tolist():
            inside = (row >= first) & (row < last)
            rank[inside] = of_rank
            target[inside] = row[inside] - first + place
        tokens.append([head * h + order[head] * t for h, t in steps])
        ranks.append(rank)
        targets.append(target)
    sources = [torch.cat([x[i] for x in tokens]).to(torch.int32)[None] for i in range(len(steps))]
    _, offsets = target_rows(counts, pieces[H:], begins[:, :0], 0, 0, 0)
    return Addresses(sources, torch.cat(ranks).to(torch.uint8)[None], torch.cat(targets)[None], offsets)


def unpack_map(bits: Tensor, heads: Tensor, Ck: int) -> Tensor:
    """Returns the block maps of some heads, bool [G, Cq, Ck].

    Args:
        bits: uint8 [H, Cq, ⌈Ck / 8⌉]: eight key clusters a byte, the first in the lowest bit.
        heads: int64 [G].
        Ck: key clusters.
    """
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[heads][..., None] >> places) & 1).flatten(-2)[..., :Ck].bool()


def _counted(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Returns starts[0], starts[0] + 1, … lengths[0] of them, then those of starts[1], …: int64 [total]."""
    shifts = starts - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shifts, lengths, output_size=total) + torch.arange(total, device=starts.device)


def _pairs_at_once(device: torch.device) -> int:
    return CPU_PAIRS_AT_ONCE if device.type == "cpu" else GPU_PAIRS_AT_ONCE


def _cluster_of_row(offsets: Tensor, N: int) -> Tensor:
    """Returns the cluster of each grouped row, int64 [N], of one head's offsets [C + 1]."""
    rows = torch.arange(N, dtype=torch.int32, device=offsets.device)
    # Rows after the last run belong to nobody and are counted with it.
    return torch.searchsorted(offsets[1:].contiguous(), rows, right=True).clamp_(max=len(offsets) - 2)
