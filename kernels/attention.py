"""Variable-block sparse attention: the FlashAttention-2 algorithm (arXiv 2307.08691), forward, in Triton, on any GPU.

How it walks: programs stay on the GPU and take items (up to 128 rows of one query cluster) from a counter. For an item
a program first writes out which key rows its cluster selects, one after the other without gaps, a chunk at a time, into
a list of its own that stays in L2. Its tiles are then full whatever the clusters' sizes: rows of K and V are gathered
by that list (cp.async, a whole row of contiguous bytes each), and only the first tile is masked.

How it overlaps: scores of tile t are multiplied first, then the probabilities of tile t - 1 with its V. That second
product runs on the tensor cores while the softmax of tile t runs on the others and the next rows of K and V arrive.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from semvid.kernels.layout import Plan, Tail, check_attention, check_index, result_like
from semvid.kernels.limits import cluster_bits, most_rows
from semvid.kernels.runs import ITEM_ROWS, Lists, count_up_to, plan

__all__ = ["attention", "plan"]

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """How one launch is cut. Block sizes are powers of two, at least 16."""

    rows: int
    """Query rows a program computes at once; divides 128."""
    keys: int
    """Key rows of a tile."""
    warps: int
    stages: int
    """Tiles of K and of V in shared memory, the one in use included."""
    per_sm: int = 1
    """Programs that share a multiprocessor."""
    halve: bool = True
    """Whether the rest of a cluster, if at most rows / 2, is computed in a tile of rows / 2."""
    lag: bool = True
    """Whether a tile meets V one step late, under the softmax of the next one: for wgmma, which runs beside it."""
    chunk: int = 8192
    """Key rows listed at once; a multiple of `keys`."""


def tile_for(D: int, dtype: torch.dtype, shared_bytes: int) -> Tile:
    """Returns the tile for a head dim and dtype, given the shared memory that one program can have."""
    if dtype == torch.float32:
        # Products are exact fp32, on the ordinary cores: a reference, not a fast path.
        return Tile(rows=32, keys=32, warps=8, stages=1, halve=False, lag=False)
    # In shared memory stand the rows of Q and `stages` tiles of K and of V, 2 bytes a value.
    for stages in (3, 2):
        if shared_bytes >= 2 * D * (128 + 2 * stages * 128) + 1024:
            return Tile(rows=128, keys=128, warps=8, stages=stages, halve=False)
    return Tile(rows=64, keys=64, warps=4, stages=2, halve=False)


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

    A query row whose cluster selects nothing (and has no tail) gets out 0 and lse -inf. Rows of k and v that no
    cluster selects are never read; rows of q after the last run of its head neither, and out and lse are undefined
    there. No host synchronisation; the same bits every time.

    Args:
        q: [H, Nq, D], grouped by query cluster, or in token order if `q_order` is given; D 16, 32, 64 or 128; bf16,
            fp16 or fp32.
        k: [H, Nk, D], grouped by key cluster.
        v: [H, Nk, D], grouped by key cluster.
        plan: the runs of both sides and the map, from this backend's `plan`.
        q_order: int32 [H, Nq]: with it q is read, and out and lse are written, in token order.
        tail: what stands in for key clusters that are not selected, in the same softmax. Its means are rounded to
            q's dtype.
        scale: factor of the scores, positive; 1/√D if absent.
        out: where the result goes, contiguous and like q; new memory if absent.

    Raises:
        ValueError: a shape or dtype does not fit, the plan is another backend's, k has more rows than a plan of so
            many clusters can tell, or `scale` is not positive.
    """
    H, Nq, Nk, D = check_attention(q, k, v, plan)
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    _check(q, Nk, plan, q_order, tail, scale)
    lists = Lists(*plan.lists)
    Cq, Ck, R = plan.q_offsets.shape[1] - 1, plan.k_offsets.shape[1] - 1, lists.runs.shape[2]
    out = result_like(q, out)
    lse = torch.empty(H, Nq, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    tile, programs = _launch(q)
    q, k, v = q if q.stride(2) == 1 else q.contiguous(), k.contiguous(), v.contiguous()
    listed = torch.empty(programs, tile.chunk + 2 * tile.keys, dtype=torch.int32, device=q.device)
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    stand_in = Tail(*(x.contiguous() for x in tail)) if tail is not None else None
    _items_kernel[(programs,)](
        q, k, v, out, lse, q_order if q_order is None else q_order.contiguous(), *(stand_in or (None, None, None)),
        plan.q_offsets, plan.k_offsets, plan.block_map.selected, *lists, listed, taken, scale * LOG2_E,
        *q.stride()[:2], Nq, Nk, H * Cq, Cq, Ck, R, R.bit_length(), cluster_bits(Ck), (H * Cq).bit_length(),
        ITEM_ROWS=ITEM_ROWS, D=D, BM=tile.rows, BN=tile.keys, CHUNK=tile.chunk, HALVE=tile.halve, LAG=tile.lag,
        STAGES=tile.stages, UPCAST=not q.is_cuda, num_warps=tile.warps,
    )  # fmt: skip
    return out, lse


def _check(q: Tensor, Nk: int, plan: Plan, q_order: Tensor | None, tail: Tail | None, scale: float) -> None:
    """Raises ValueError for what this backend's `attention` can't compute, beyond `check_attention`."""
    H, Nq, D = q.shape
    if D not in (16, 32, 64, 128) or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q is {q.dtype} with head dim {D}; accepted: bf16, fp16, fp32 and 16, 32, 64, 128")
    if len(plan.lists) != len(Lists._fields):
        raise ValueError(
            f"plan has {len(plan.lists)} lists, not {len(Lists._fields)}; make it with this backend's plan"
        )
    Ck = plan.k_offsets.shape[1] - 1
    if Nk > most_rows(Ck):
        raise ValueError(f"k has {Nk} rows; accepted: at most {most_rows(Ck)} in {Ck} clusters, or fewer clusters")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    if q_order is not None:
        check_index("q_order", q_order, (H, Nq))
    for name, x, shape in zip(Tail._fields, tail or (), ((H, Ck, D), (H, Ck, D), (H, Ck)), strict=False):
        if x.dtype != torch.float32 or tuple(x.shape) != shape:
            raise ValueError(f"tail.{name} must be fp32 {list(shape)}, not {x.dtype} {list(x.shape)}")


def _launch(q: Tensor) -> tuple[Tile, int]:
    """Returns the tile for q and the number of programs: as many as run at once (two in the interpreter)."""
    if not q.is_cuda:
        return tile_for(q.shape[2], q.dtype, 1 << 20), 2
    device = torch.cuda.get_device_properties(q.device)
    tile = tile_for(q.shape[2], q.dtype, device.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    return tile, tile.per_sm * device.multi_processor_count


@triton.jit
def _items_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_order, k_mean, v_mean, log_n,
    q_offsets, k_offsets, selected, runs, num_runs, num_keys, order, first_item, listed, taken, scale,
    q_head, q_row, Nq, Nk, num_blocks, Cq, Ck, R, run_steps, cluster_bits, block_steps,
    ITEM_ROWS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    HALVE: tl.constexpr, LAG: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Takes items until none is left. Which program takes which is left to chance and changes no bit of the result."""
    parts: tl.constexpr = ITEM_ROWS // BM
    total = tl.load(first_item + num_blocks) * parts
    listed += tl.program_id(0).to(tl.int64) * (CHUNK + 2 * BN)
    taking = tl.atomic_add(taken, 1)
    while taking < total:
        item = taking // parts
        place = count_up_to(first_item, num_blocks, item, block_steps) - 1
        block = tl.load(order + place).to(tl.int64)
        head = block // Cq
        cluster = q_offsets + block + head
        row = tl.load(cluster) + (item - tl.load(first_item + place)) * ITEM_ROWS + taking % parts * BM
        row_end = tl.load(cluster + 1)
        rows = (
            q_ptr + head * q_head, k_ptr + head * Nk * D, v_ptr + head * Nk * D, out_ptr, lse_ptr, q_order,
            k_mean, v_mean, log_n, selected + block * Ck, runs + block * R, k_offsets + head * (Ck + 1),
            tl.load(num_runs + block), tl.load(num_keys + block), listed, scale, head, row, row_end,
            q_row, Nq, Ck, run_steps, cluster_bits,
        )  # fmt: skip
        if row < row_end:
            if HALVE and row_end - row <= BM // 2:
                _attend_rows(*rows, D, BM // 2, BN, CHUNK, LAG, STAGES, UPCAST)
            else:
                _attend_rows(*rows, D, BM, BN, CHUNK, LAG, STAGES, UPCAST)
        taking = tl.atomic_add(taken, 1)


@triton.jit
def _attend_rows(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_order, k_mean, v_mean, log_n, selected, runs, k_offsets,
    num_runs, num_keys, listed, scale, head, row, row_end, q_row, Nq, Ck, run_steps, cluster_bits,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, LAG: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes and stores out and lse of rows row .. min(row + BM, row_end) of one query cluster."""
    token = _tokens(q_order, head * Nq, row, row_end, BM)
    inside = (row + tl.arange(0, BM) < row_end)[:, None]
    dim = tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + token.to(tl.int64)[:, None] * q_row + dim, mask=inside, other=0.0)
    acc = tl.zeros([BM, D], tl.float32)
    # High and sum are of scores · log2(e), so that exp2 serves; alpha takes acc from the last high to this one.
    high = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    alpha = tl.zeros([BM], tl.float32)
    # Weights wait for their turn as rounded bits: half the registers of fp32, and no detour through shared memory.
    bits: tl.constexpr = tl.int16 if q.dtype.primitive_bitwidth == 16 else tl.int32
    p = tl.zeros([BM, BN], bits)

    tiles_at_once: tl.constexpr = CHUNK // BN
    num_tiles = tl.cdiv(num_keys, BN)
    # The short tile comes first, its padding in front: all others are full, and the loops have no mask.
    padding = num_tiles * BN - num_keys
    lane = tl.arange(0, BN)
    # Slots of a chunk's list: the tile before it, its tiles, one more that is read ahead and not used.
    slots = lane[:, None] + BN * tl.arange(0, 2)[None, :]
    for chunk in range(0, num_tiles, tiles_at_once):
        tiles = tl.minimum(num_tiles - chunk, tiles_at_once)
        # Barriers: the last chunk's list has been read before it is overwritten; this one is written before it is read.
        tl.debug_barrier()
        _list_keys(
            listed, runs, k_offsets, num_runs, num_keys, (chunk - 1) * BN - padding, (tiles + 1) * BN,
            run_steps, cluster_bits, BN,
        )  # fmt: skip
        tl.debug_barrier()
        begin = tl.where(chunk == 0, 1, 0)
        if chunk == 0:
            rows = tl.load(listed + BN + lane)
            s = _dot(q, _gather(k_ptr, rows, D).T, None, UPCAST)
            s = tl.where(lane[None, :] >= padding, s, float("-inf"))
            p, alpha, high, total = _softmax(s, high, total, scale, q.dtype, bits)
            if not LAG:
                acc = _dot(p.to(q.dtype, bitcast=True), _gather(v_ptr, rows, D), acc, UPCAST)
        if LAG:
            # Rows of V for one tile and of K for the next come in one load, a step ahead: they cost one register.
            pair = tl.load(listed + begin * BN + slots)
            for t in tl.range(begin, tiles, num_stages=STAGES):
                weights = p.to(q.dtype, bitcast=True)
                v_rows, k_rows = tl.split(pair)
                s = _dot(q, _gather(k_ptr, k_rows, D).T, None, UPCAST)
                acc = _dot(weights, _gather(v_ptr, v_rows, D), acc * alpha[:, None], UPCAST)
                p, alpha, high, total = _softmax(s, high, total, scale, q.dtype, bits)
                pair = tl.load(listed + (t + 1) * BN + slots)
        else:
            rows = tl.load(listed + (begin + 1) * BN + lane)
            for t in tl.range(begin, tiles, num_stages=STAGES):
                s = _dot(q, _gather(k_ptr, rows, D).T, None, UPCAST)
                p, alpha, high, total = _softmax(s, high, total, scale, q.dtype, bits)
                weights = p.to(q.dtype, bitcast=True)
                acc = _dot(weights, _gather(v_ptr, rows, D), acc * alpha[:, None], UPCAST)
                # The slot after the last tile is not written; what is read there is not used.
                rows = tl.load(listed + tl.minimum(t + 2, tiles) * BN + lane)
    if LAG and num_tiles > 0:
        rows = tl.load(listed + ((num_tiles - 1) % tiles_at_once + 1) * BN + lane)
        acc = _dot(p.to(q.dtype, bitcast=True), _gather(v_ptr, rows, D), acc * alpha[:, None], UPCAST)
    if k_mean is not None:
        acc, high, total = _add_tail(
            q, acc, high, total, scale, k_mean + head * Ck * D, v_mean + head * Ck * D, log_n + head * Ck, selected,
            Ck, D, BN, UPCAST,
        )  # fmt: skip

    # Found again rather than kept: the loops above have no register to spare.
    token = _tokens(q_order, head * Nq, row, row_end, BM)
    inside = row + tl.arange(0, BM) < row_end
    # Without a key high is -inf, acc 0 and so is total: out 0 and lse -inf.
    total = tl.where(total > 0, total, 1.0)
    out = acc * (1.0 / total)[:, None]
    out_rows = out_ptr + (head * Nq + token)[:, None] * D + dim
    tl.store(out_rows, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(lse_ptr + head * Nq + token, (high + tl.log2(total)) * 0.6931471805599453, mask=inside)


@triton.jit
def _tokens(q_order, first, row, row_end, BM: tl.constexpr):
    """Returns where the grouped rows row .. row + BM stand in q, out and lse; 0 from row_end on."""
    rows = row + tl.arange(0, BM)
    if q_order is not None:
        rows = tl.load(q_order + first + rows, mask=rows < row_end, other=0)
    return rows


@triton.jit
def _gather(matrix, rows, D: tl.constexpr):
    """Returns rows of a contiguous matrix with D columns, [len(rows), D]."""
    return tl.load(matrix + (rows.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]))


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    """Returns a · b (+ acc), summed in fp32."""
    # Triton's interpreter multiplies the bit patterns of bf16.
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _softmax(s, high, total, scale, dtype: tl.constexpr, bits: tl.constexpr):
    """Returns one step of the running softmax over the columns of s: weights, alpha, the new high and sum."""
    higher = tl.maximum(high, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - higher[:, None])
    alpha = tl.exp2(high - higher)
    return p.to(dtype).to(bits, bitcast=True), alpha, higher, total * alpha + tl.sum(p, 1)


@triton.jit
def _list_keys(
    listed, runs, k_offsets, num_runs, num_keys, first, count, run_steps, cluster_bits, BN: tl.constexpr
):  # fmt: skip
    """Writes the key rows of selected keys number first .. first + count; numbers outside are taken as the nearest.

    One binary search serves four neighbours: a run has at least one key, so the next key's run is this one or the next.
    """
    SEARCHES: tl.constexpr = 4 * BN
    last_run = num_runs - 1
    for begin in range(0, count, 4 * SEARCHES):
        at = begin + 4 * tl.arange(0, SEARCHES)
        n0 = tl.minimum(tl.maximum(first + at, 0), num_keys - 1)
        n1 = tl.minimum(tl.maximum(first + at + 1, 0), num_keys - 1)
        n2 = tl.minimum(tl.maximum(first + at + 2, 0), num_keys - 1)
        n3 = tl.minimum(tl.maximum(first + at + 3, 0), num_keys - 1)
        # No word of a run that starts at n0 or before is larger than this.
        run0 = count_up_to(runs, num_runs, (n0 << cluster_bits) | ((1 << cluster_bits) - 1), run_steps) - 1
        word0 = tl.load(runs + run0)
        run1, word1 = _next_run(runs, run0, word0, last_run, n1, cluster_bits)
        run2, word2 = _next_run(runs, run1, word1, last_run, n2, cluster_bits)
        _, word3 = _next_run(runs, run2, word2, last_run, n3, cluster_bits)
        row0, row1 = _key_row(k_offsets, word0, n0, cluster_bits), _key_row(k_offsets, word1, n1, cluster_bits)
        row2, row3 = _key_row(k_offsets, word2, n2, cluster_bits), _key_row(k_offsets, word3, n3, cluster_bits)
        rows = tl.join(tl.join(row0, row2), tl.join(row1, row3)).reshape(4 * SEARCHES)
        place = begin + tl.arange(0, 4 * SEARCHES)
        tl.store(listed + place, rows, mask=place < count)


@triton.jit
def _next_run(runs, run, word, last_run, n, cluster_bits):
    """Returns the run of key n and its word: `run` and `word`, or those after."""
    following = tl.minimum(run + 1, last_run)
    next_word = tl.load(runs + following)
    reached = (next_word >> cluster_bits) <= n
    return tl.where(reached, following, run), tl.where(reached, next_word, word)


@triton.jit
def _key_row(k_offsets, word, n, cluster_bits):
    """Returns the key row of key n, whose run's word is given."""
    cluster = word & ((1 << cluster_bits) - 1)
    return n - (word >> cluster_bits) + tl.load(k_offsets + cluster)


@triton.jit
def _add_tail(
    q, acc, high, total, scale, k_mean, v_mean, log_n, selected, Ck, D: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Returns acc, high and sum with one column for each cluster that is not selected and not empty."""
    dim = tl.arange(0, D)[None, :]
    for first in tl.range(0, Ck, BN, num_stages=1):
        cluster = first + tl.arange(0, BN)
        weight = tl.load(log_n + cluster, mask=cluster < Ck, other=float("-inf"))
        on = (tl.load(selected + cluster, mask=cluster < Ck, other=1) == 0) & (weight > float("-inf"))
        place = cluster.to(tl.int64)[:, None] * D + dim
        k = tl.load(k_mean + place, mask=on[:, None], other=0.0).to(q.dtype)
        v = tl.load(v_mean + place, mask=on[:, None], other=0.0).to(q.dtype)
        s = _dot(q, k.T, None, UPCAST) * scale + weight[None, :] * 1.4426950408889634
        s = tl.where(on[None, :], s, float("-inf"))
        higher = tl.maximum(high, tl.max(s, 1))
        # With no column so far -inf - -inf would be NaN.
        shift = tl.where(higher > float("-inf"), higher, 0.0)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(high - shift)
        total = total * alpha + tl.sum(p, 1)
        acc = _dot(p.to(q.dtype), v, acc * alpha[:, None], UPCAST)
        high = higher
    return acc, high, total
