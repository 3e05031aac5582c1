"""Variable-block sparse attention for Hopper GPUs in Gluon, after FlashAttention-3 (arXiv 2407.08608), forward.

Who does what: a program stays on its SM. Three warps load (`hopper_loads`), two consumer warpgroups multiply, each 64
rows of Q, which stay in registers. A tile of 128 keys, or of their values, serves both.

How it overlaps: the scores of tile t and the product of the weights of tile t - 1 with its V are queued on the tensor
cores together. While one consumer computes its softmax, the other's products run.

The last 64 rows or fewer of a query cluster are an item of half the height: there each consumer takes half of the keys
of every tile, and the two results are merged at the end. Rows are thus padded to 64 and not to 128.
"""

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from semvid.kernels import attention as generic
from semvid.kernels.hopper import TYPES, descriptor, next_stage, num_sms, takes, view
from semvid.kernels.hopper_loads import ARRIVALS, BOXES, HALF, fill, hear, take
from semvid.kernels.layout import Plan, Tail, check_attention, result_like
from semvid.kernels.limits import cluster_bits
from semvid.kernels.runs import ITEM_ROWS, Lists

# Query rows of one consumer, and the keys of a tile.
ROWS, KEYS = ITEM_ROWS // 2, 128
# Head dim -> tiles of K, and of V, in shared memory at once. With Q: 224 KB of the SM's 227, and 144.
STAGES = {64: 4, 128: 3}
# Registers a thread. Scores 64, out 64, Q and weights 32 each at head dim 128; the loading warps live on scalars.
CONSUMER_REGISTERS, LOADER_REGISTERS = 240, 24
# What is masked of a tile's columns: nothing, those in front, the clusters that the map selects.
FULL_TILE, FIRST_TILE, TAIL_TILE = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
_INTEGERS = [
    "Nq", "Nk", "k_head", "k_row", "v_head", "v_row", "num_blocks", "Cq", "Ck", "R", "bits", "tail_tiles",
]  # fmt: skip


def tile_for(D: int, dtype: torch.dtype, shared_bytes: int) -> generic.Tile:
    """Returns the tile for a head dim and dtype, given the shared memory that one program can have."""
    if dtype not in TYPES or D not in STAGES:
        return generic.tile_for(D, dtype, shared_bytes)
    return generic.Tile(rows=2 * ROWS, keys=KEYS, warps=8, stages=STAGES[D], halve=True)


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

    The op, its arguments and its errors are the Triton `attention`'s, and so is `plan`. What `takes` refuses, and
    `q_order`, go there.
    """
    H, Nq, Nk, D = check_attention(q, k, v, plan)
    if q_order is not None or not all(takes(x) for x in (q, k, v)):
        return generic.attention(q, k, v, plan, q_order=q_order, tail=tail, scale=scale, out=out)
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    generic._check(q, Nk, plan, None, tail, scale)
    lists = Lists(*plan.lists)
    Cq, Ck, R = plan.q_offsets.shape[1] - 1, plan.k_offsets.shape[1] - 1, lists.runs.shape[2]
    out = result_like(q, out)
    lse = torch.empty(H, Nq, dtype=torch.float32, device=q.device)
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    k_mean, v_mean, log_n = _stand_ins(tail, q.dtype) if tail is not None else (k, v, lse)
    _attend[(num_sms(q.device),)](
        descriptor(q, [1, ROWS, D]),
        *(descriptor(x, [1, rows, HALF]) for x in (k, v) for rows in BOXES),
        descriptor(k_mean, [1, BOXES[0], HALF]), descriptor(v_mean, [1, BOXES[0], HALF]),
        k, v, out, lse, log_n, plan.q_offsets, plan.k_offsets, plan.block_map.selected, *lists, taken,
        scale * generic.LOG2_E, Nq, Nk, *(stride // 8 for x in (k, v) for stride in x.stride()[:2]),
        H * Cq, Cq, Ck, R, cluster_bits(Ck), triton.cdiv(Ck, KEYS) if tail is not None else 0,
        TAIL=tail is not None, ROWS=ROWS, KEYS=KEYS, STAGES=STAGES[D], ARRIVALS=ARRIVALS,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, LOADER_REGISTERS=LOADER_REGISTERS, num_warps=4,
    )  # fmt: skip
    return out, lse


def _stand_ins(tail: Tail, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the tail as the kernel reads it: means in `dtype`, zeros for an empty cluster, whatever its means are."""
    empty = tail.log_n.isneginf()[..., None]
    k_mean, v_mean = (mean.masked_fill(empty, 0).to(dtype).contiguous() for mean in (tail.k_mean, tail.v_mean))
    return k_mean, v_mean, tail.log_n.contiguous()


@gluon.jit(do_not_specialize=_INTEGERS)
def _attend(
    q_desc, k64, k32, k16, k8, v64, v32, v16, v8, k_mean, v_mean,
    k_ptr, v_ptr, out_ptr, lse_ptr, log_n, q_offsets, k_offsets, selected,
    runs, num_runs, num_keys, order, first_item, taken,
    scale, Nq, Nk, k_head, k_row, v_head, v_row, num_blocks, Cq, Ck, R, bits, tail_tiles,
    TAIL: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, ARRIVALS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Sets up the shared memory and starts two consumers of 4 warps, and a warp each for items and Q, K, and V."""
    D: gl.constexpr = q_desc.block_type.shape[2]
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, ROWS, D], q_desc.layout)
    k = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, D], tile)
    v = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, D], tile)
    # What an item is, four words; two items, so that the next one is known early.
    facts = gl.allocate_shared_memory(gl.int32, [8, 1], plain)
    # High and sum of the consumer that hands its result over.
    sums = gl.allocate_shared_memory(gl.float32, [2, ROWS], plain)
    item_ready = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    item_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(item_ready.index(i), count=1)
        # Heard by two consumers and two loaders.
        mbarrier.init(item_free.index(i), count=4)
    # Q is loaded; its memory is free; of half height: consumer 0 has read Q, consumer 1 has handed over.
    q_bars = gl.allocate_shared_memory(gl.int64, [4, 1], bar)
    mbarrier.init(q_bars.index(0), count=1)
    mbarrier.init(q_bars.index(1), count=2)
    mbarrier.init(q_bars.index(2), count=1)
    mbarrier.init(q_bars.index(3), count=1)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    # Completed for the t-th time: both consumers have read tile t of K and tile t - 1 of V.
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=ARRIVALS)
        mbarrier.init(v_ready.index(stage), count=ARRIVALS)
        mbarrier.init(free.index(stage), count=2)
    items = (facts, item_ready, item_free)
    tiles = (k, v, k_ready, v_ready, free)
    results = (out_ptr, lse_ptr, log_n, selected, scale, Nq, Cq, Ck, tail_tiles)
    lists = (runs, num_runs, k_offsets, Nk, Cq, Ck, R, bits, tail_tiles)
    blocks = (q_offsets, num_keys, order, first_item, taken, num_blocks, Cq)
    k_boxes, v_boxes = (k64, k32, k16, k8), (v64, v32, v16, v8)
    gl.warp_specialize(
        [
            (_consume, (items, q, sums, q_bars, tiles, results, 0, TAIL, ROWS, KEYS, STAGES)),
            (_consume, (items, q, sums, q_bars, tiles, results, 1, TAIL, ROWS, KEYS, STAGES)),
            (take, (items, q, q_bars.index(0), q_bars.index(1), q_desc, blocks, ROWS)),
            (fill, (items, k, k_ready, free, 0, k_boxes, k_mean, k_ptr, k_head, k_row, lists, KEYS, STAGES)),
            (fill, (items, v, v_ready, free, 1, v_boxes, v_mean, v_ptr, v_head, v_row, lists, KEYS, STAGES)),
        ],
        [4, 1, 1, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def _consume(
    items, q, sums, q_bars, tiles, results, CONSUMER: gl.constexpr, TAIL: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Computes 64 rows of every item, or, of one of half the height, all its rows with half of the keys."""
    out_ptr, lse_ptr, log_n, selected, scale, Nq, Cq, Ck, tail_tiles = results
    D: gl.constexpr = q.shape[3]
    result: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    buffer, item_phase, q_phase, low_phase = 0, 0, 0, 0
    k_stage, k_phase, v_stage, v_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    block, row, row_end, num_keys = hear(items, buffer, item_phase, 4)
    while block >= 0:
        head = (block // Cq).to(gl.int64)
        columns = (log_n + head * Ck, selected + block.to(gl.int64) * Ck, Ck, tail_tiles)
        mbarrier.wait(q_bars.index(0), q_phase)
        q_phase ^= 1
        if row_end - row > ROWS:
            mine = _rows(q.index(CONSUMER), KEYS)
            mbarrier.arrive(q_bars.index(1), count=1)
            acc, high, total, k_stage, k_phase, v_stage, v_phase = _walk(
                mine, tiles, k_stage, k_phase, v_stage, v_phase, num_keys, scale, columns, 0, KEYS, TAIL, KEYS, STAGES
            )
            _store(acc, high, total, out_ptr, lse_ptr, head * Nq, row + CONSUMER * ROWS, row_end)
        else:
            both = _rows(q.index(0), KEYS // 2)
            if CONSUMER == 0:
                mbarrier.arrive(q_bars.index(2), count=1)
            acc, high, total, k_stage, k_phase, v_stage, v_phase = _walk(
                both, tiles, k_stage, k_phase, v_stage, v_phase, num_keys, scale, columns,
                CONSUMER * KEYS // 2, KEYS // 2, TAIL, KEYS, STAGES,
            )  # fmt: skip
            part = view(q, gl.float32, [ROWS, D], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
            if CONSUMER == 1:
                # Its result goes where Q was.
                mbarrier.wait(q_bars.index(2), low_phase)
                part.store(acc)
                sums.index(0).store(high)
                sums.index(1).store(total)
                mbarrier.arrive(q_bars.index(3), count=1)
            else:
                mbarrier.wait(q_bars.index(3), low_phase)
                other_high = sums.index(0).load(gl.SliceLayout(1, result))
                other_total = sums.index(1).load(gl.SliceLayout(1, result))
                higher = gl.maximum(high, other_high)
                shift = _finite(higher)
                share = gl.exp2(high - shift)
                other_share = gl.exp2(other_high - shift)
                acc = acc * share[:, None] + part.load(result) * other_share[:, None]
                total = total * share + other_total * other_share
                _store(acc, higher, total, out_ptr, lse_ptr, head * Nq, row, row_end)
            low_phase ^= 1
            # Q's next rows come by another path than these writes.
            fence_async_shared()
            mbarrier.arrive(q_bars.index(1), count=1)
        buffer, item_phase = next_stage(buffer, item_phase, 2)
        block, row, row_end, num_keys = hear(items, buffer, item_phase, 4)


@gluon.jit
def _rows(q, WIDE: gl.constexpr):
    """Returns rows of Q in registers, as the left factor of scores that are WIDE columns wide."""
    scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 16])
    return q.reshape((q.shape[1], q.shape[2])).load(gl.DotOperandLayout(0, scores, 2))


@gluon.jit
def _walk(
    q, tiles, k_stage, k_phase, v_stage, v_phase, num_keys, scale, columns, FIRST: gl.constexpr, WIDE: gl.constexpr,
    TAIL: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Returns acc, high and sum of 64 rows over columns FIRST .. FIRST + WIDE of every tile, and the rings' new places.

    High and sum are of scores · log2(e), so that exp2 serves. The tail's tiles come first.
    """
    _, v, _, v_ready, _ = tiles
    _, _, _, tail_tiles = columns
    rows: gl.constexpr = q.shape[0]
    D: gl.constexpr = q.shape[1]
    scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    acc = gl.zeros([rows, D], gl.float32, result)
    high = gl.full([rows], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    total = gl.full([rows], 0.0, gl.float32, gl.SliceLayout(1, scores))
    p = gl.zeros([rows, WIDE], q.dtype, gl.DotOperandLayout(0, result, 2))
    num_tiles = (num_keys + KEYS - 1) // KEYS
    # Only the first tile of keys is masked.
    padding = num_tiles * KEYS - num_keys
    if TAIL:
        p, high, total, k_stage, k_phase = _begin(
            q, high, total, scale, columns, 0, tiles, k_stage, k_phase, FIRST, WIDE, TAIL_TILE, STAGES, result
        )
        for t in range(1, tail_tiles):
            p, acc, high, total, k_stage, k_phase, v_stage, v_phase = _step(
                q, p, acc, high, total, scale, columns, t * KEYS, tiles, k_stage, k_phase, v_stage, v_phase,
                FIRST, WIDE, TAIL_TILE, STAGES,
            )  # fmt: skip
        if num_tiles > 0:
            p, acc, high, total, k_stage, k_phase, v_stage, v_phase = _step(
                q, p, acc, high, total, scale, columns, padding, tiles, k_stage, k_phase, v_stage, v_phase,
                FIRST, WIDE, FIRST_TILE, STAGES,
            )  # fmt: skip
    elif num_tiles > 0:
        p, high, total, k_stage, k_phase = _begin(
            q, high, total, scale, columns, padding, tiles, k_stage, k_phase, FIRST, WIDE, FIRST_TILE, STAGES, result
        )
    for _ in range(1, num_tiles):
        p, acc, high, total, k_stage, k_phase, v_stage, v_phase = _step(
            q, p, acc, high, total, scale, columns, 0, tiles, k_stage, k_phase, v_stage, v_phase,
            FIRST, WIDE, FULL_TILE, STAGES,
        )  # fmt: skip
    if TAIL or num_tiles > 0:
        # No arrival tells that this V has been read: the next item's first tile does.
        mbarrier.wait(v_ready.index(v_stage), v_phase)
        acc = warpgroup_mma(p, v.index(v_stage).slice(FIRST, WIDE), acc, is_async=True)
        acc = warpgroup_mma_wait(0, (acc,))
        v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
    high = gl.convert_layout(high, gl.SliceLayout(1, result))
    total = gl.convert_layout(total, gl.SliceLayout(1, result))
    return acc, high, total, k_stage, k_phase, v_stage, v_phase


@gluon.jit
def _begin(
    q, high, total, scale, columns, begin, tiles, k_stage, k_phase, FIRST: gl.constexpr, WIDE: gl.constexpr,
    KIND: gl.constexpr, STAGES: gl.constexpr, result: gl.constexpr,
):  # fmt: skip
    """Scores the first tile and weighs it."""
    _, _, _, _, free = tiles
    scores: gl.constexpr = high.type.layout.parent
    s = _score(q, tiles, k_stage, k_phase, FIRST, WIDE, scores)
    s = warpgroup_mma_wait(0, (s,))
    mbarrier.arrive(free.index(k_stage), count=1)
    k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
    p, _, high, total = _weigh(s, high, total, scale, columns, begin, FIRST, KIND, q.dtype, result)
    return p, high, total, k_stage, k_phase


@gluon.jit
def _step(
    q, p, acc, high, total, scale, columns, begin, tiles, k_stage, k_phase, v_stage, v_phase, FIRST: gl.constexpr,
    WIDE: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores the next tile, multiplies the weights of the one before with its V, and weighs the new scores."""
    _, v, _, v_ready, free = tiles
    scores: gl.constexpr = high.type.layout.parent
    result: gl.constexpr = acc.type.layout
    s = _score(q, tiles, k_stage, k_phase, FIRST, WIDE, scores)
    mbarrier.wait(v_ready.index(v_stage), v_phase)
    acc = warpgroup_mma(p, v.index(v_stage).slice(FIRST, WIDE), acc, is_async=True)
    s = warpgroup_mma_wait(1, (s,))
    # ptxas lets this wait for the second product too, once it has the maxima; held back until after the weights, that
    # wait measured 3 % slower.
    fresh, alpha, high, total = _weigh(s, high, total, scale, columns, begin, FIRST, KIND, q.dtype, result)
    acc, p = warpgroup_mma_wait(0, (acc, p))
    mbarrier.arrive(free.index(k_stage), count=1)
    k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
    v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, result))[:, None]
    return fresh, acc, high, total, k_stage, k_phase, v_stage, v_phase


@gluon.jit
def _score(q, tiles, stage, phase, FIRST: gl.constexpr, WIDE: gl.constexpr, scores: gl.constexpr):
    """Queues q · kᵀ over columns FIRST .. FIRST + WIDE of a tile, once it is there."""
    k, _, k_ready, _, _ = tiles
    rows: gl.constexpr = q.shape[0]
    mbarrier.wait(k_ready.index(stage), phase)
    zero = gl.zeros([rows, WIDE], gl.float32, scores)
    return warpgroup_mma(q, k.index(stage).slice(FIRST, WIDE).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _weigh(
    s, high, total, scale, columns, begin, FIRST: gl.constexpr, KIND: gl.constexpr, dtype: gl.constexpr,
    result: gl.constexpr,
):  # fmt: skip
    """Returns one step of the running softmax over the columns of s: weights, alpha, the new high and sum.

    `begin` is the first column of the first tile that counts, and the first key cluster of a tile of the tail.
    """
    if KIND == FULL_TILE:
        higher = gl.maximum(high, gl.max(s, 1) * scale)
        shift = higher
        s = s * scale
    else:
        wide: gl.constexpr = s.shape[1]
        column = FIRST + gl.arange(0, wide, layout=gl.SliceLayout(0, s.type.layout))
        if KIND == FIRST_TILE:
            s = gl.where((column >= begin)[None, :], s * scale, float("-inf"))
        else:
            s = s * scale + _bias(columns, begin + column)[None, :]
        higher = gl.maximum(high, gl.max(s, 1))
        shift = _finite(higher)
    p = gl.exp2(s - shift[:, None])
    alpha = gl.exp2(high - shift)
    total = total * alpha + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, result, 2)), alpha, higher, total


@gluon.jit
def _finite(high):
    """Returns high, or 0 where there was no column so far: -inf - -inf would be NaN."""
    return gl.where(high > float("-inf"), high, 0.0)


@gluon.jit
def _bias(columns, cluster):
    """Returns what the tail adds to the scores of key clusters, · log2(e): log n where the map is off, else -inf."""
    log_n, selected, Ck, _ = columns
    weight = gl.load(log_n + cluster, mask=cluster < Ck, other=float("-inf"))
    off = gl.load(selected + cluster, mask=cluster < Ck, other=1) == 0
    return gl.where(off, weight * 1.4426950408889634, float("-inf"))


@gluon.jit
def _store(acc, high, total, out_ptr, lse_ptr, first, row, row_end):
    """Writes out and lse of rows row .. min(row + 64, row_end). Without a key: out 0 and lse -inf."""
    layout: gl.constexpr = acc.type.layout
    rows = row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
    inside = rows < row_end
    total = gl.where(total > 0, total, 1.0)
    value = acc * (1.0 / total)[:, None]
    dim = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
    place = out_ptr + (first + rows)[:, None] * acc.shape[1] + dim[None, :]
    gl.store(place, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    gl.store(lse_ptr + first + rows, (high + gl.log2(total)) * 0.6931471805599453, mask=inside)
