"""Sorting tokens by cluster: a stable counting sort of the labels, and the movement of rows by its order."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from semvid.kernels.layout import Permutation, Shared, Way, check_index, check_rows, check_way

# Tokens that one warp sorts in registers. A power of two: a sort key is label · BLOCK + position.
SORT_BLOCK = 1024
# A program moves this many bytes: 8 loads of 16 bytes by each of its 128 threads.
BYTES_MOVED = 16384


def group(labels: Tensor, C: int) -> Permutation:
    """Returns the stable permutation that makes each cluster one run.

    A counting sort: labels are counted by blocks of tokens, the counts summed over the blocks before and the
    clusters before, and each block, sorted on its own, takes the places so found.

    Args:
        labels: int32 [H, N], each in 0 .. C - 1.
        C: number of clusters, at most 2^31 / 1024 - 1.
    """
    H, N = labels.shape
    check_index("labels", labels, (H, N))
    if not 1 <= C < 2**31 // SORT_BLOCK:
        raise ValueError(f"C is {C}; accepted: 1 .. {2**31 // SORT_BLOCK - 1}")
    labels = labels.contiguous()
    order = torch.empty(H, N, dtype=torch.int32, device=labels.device)
    offsets = torch.empty(H, C + 1, dtype=torch.int32, device=labels.device)
    num_blocks = triton.cdiv(N, SORT_BLOCK)
    before = torch.zeros(H, num_blocks, C, dtype=torch.int32, device=labels.device)
    sizes = torch.zeros(H, C, dtype=torch.int32, device=labels.device)
    if H == 0:
        return Permutation(order, offsets)
    if N > 0:
        _count_labels[(num_blocks, H)](labels, before, N, C, num_blocks, BLOCK=SORT_BLOCK, num_warps=4)
        _sum_blocks_before[(triton.cdiv(C, 32), H)](before, sizes, C, num_blocks, BLOCKS=128, CLUSTERS=32, num_warps=4)
    _sum_clusters_before[(H,)](sizes, offsets, C, BLOCK=1024, num_warps=4)
    if N > 0:
        # One warp: every exchange of the sort is a shuffle or a move between its own registers.
        _place_tokens[(num_blocks, H)](labels, before, offsets, order, N, C, num_blocks, BLOCK=SORT_BLOCK, num_warps=1)
    return Permutation(order, offsets)


def gather_rows(x: Tensor, order: Tensor) -> Tensor:
    """Returns the rows of x in sorted order, contiguous: out[h, i] = x[h, order[h, i]].

    Args:
        x: [H, N, D], any floating dtype; heads and tokens may be strided (a transposed view is read in place).
        order: int32 [H, n].
    """
    H, _, D = check_rows("x", x)
    n = order.shape[-1]
    check_index("order", order, (H, n))
    out = torch.empty(H, n, D, dtype=x.dtype, device=x.device)
    _launch_move(x, order, out, scatter=False)
    return out


def scatter_rows(x: Tensor, order: Tensor, rows: int | None = None) -> Tensor:
    """Returns the rows of x back in token order, contiguous: out[h, order[h, i]] = x[h, i]. Inverse of `gather_rows`.

    Args:
        x: [H, N, D], any floating dtype; heads and tokens may be strided.
        order: int32 [H, N], different places in 0 .. rows - 1.
        rows: of the result; N if absent. What no row of x goes to is left undefined.
    """
    H, N, D = check_rows("x", x)
    check_index("order", order, (H, N))
    out = torch.empty(H, N if rows is None else rows, D, dtype=x.dtype, device=x.device)
    _launch_move(x, order, out, scatter=True)
    return out


def scatter_among(x: Tensor, way: Way, blocks: Shared) -> None:
    """Copies rows into the ranks' blocks: blocks[ranks[s, i]][targets[s, i]] = x[h, order[h, i]] with h = heads[s].

    What no row goes to stays.

    Args:
        x: [H, n, D], any floating dtype; heads and tokens may be strided.
        way: its targets are different places on each rank.
        blocks: of x's dtype and D; they may lie in the memory of other GPUs.
    """
    _launch_among(x, way, blocks, fetch=False)


def gather_among(blocks: Shared, way: Way, out: Tensor) -> None:
    """Copies rows from the ranks' blocks: out[h, order[h, i]] = blocks[ranks[s, i]][targets[s, i]] with h = heads[s].

    The heads of no span stay.

    Args:
        blocks: of out's dtype and D; they may lie in the memory of other GPUs.
        way: of different heads.
        out: [H, n, D], any floating dtype; heads and tokens may be strided.
    """
    _launch_among(out, way, blocks, fetch=True)


def with_packed_rows(x: Tensor) -> Tensor:
    """Returns x [H, N, D] itself if the elements of a row are neighbours in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch_among(near: Tensor, way: Way, blocks: Shared, *, fetch: bool) -> None:
    S, n, D = check_way(near, way, blocks)
    if S * n == 0 or D == 0:
        return
    block_d = triton.next_power_of_2(D)
    rows = max(1, min(1024, BYTES_MOVED // (block_d * near.element_size())))
    of_span = triton.cdiv(n, rows)
    _move_among[(S * of_span,)](
        near, near.stride(0), near.stride(1), way.heads, way.heads.stride(0), way.order.contiguous(),
        blocks.blocks[0], blocks.steps, way.ranks.contiguous(), way.targets.contiguous(), n, of_span,
        _coprime(S * of_span),
        D=D, BLOCK_D=block_d, ROWS=rows, FETCH=fetch, STEP=16 if blocks.aligned else 1, num_warps=4,
    )  # fmt: skip


def _coprime(n: int) -> int:
    """Returns a number near 0.618 n that shares no factor with n: its multiples, modulo n, come by everywhere."""
    step = max(1, round(0.618 * n))
    while math.gcd(step, n) > 1:
        step += 1
    return step


def _launch_move(x: Tensor, order: Tensor, out: Tensor, *, scatter: bool) -> None:
    H, n = order.shape
    D = out.shape[2]
    if order.numel() == 0 or D == 0:
        return
    x = with_packed_rows(x)
    block_d = triton.next_power_of_2(D)
    rows = max(1, min(1024, BYTES_MOVED // (block_d * x.element_size())))
    _move_rows[(triton.cdiv(n, rows), H)](
        x,
        order.contiguous(),
        out,
        n,
        out.shape[1],
        x.stride(0),
        x.stride(1),
        D=D,
        BLOCK_D=block_d,
        ROWS=rows,
        SCATTER=scatter,
        num_warps=4,
    )


@triton.jit
def _count_labels(labels_ptr, counts_ptr, N, C, num_blocks, BLOCK: tl.constexpr):
    """counts[h, block, c] = tokens of the block with label c. Integer atomics: the sum does not depend on order."""
    h, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + h * N + token, mask=token < N, other=0)
    tl.atomic_add(counts_ptr + (h * num_blocks + block) * C + label, 1, mask=token < N, sem="relaxed")


@triton.jit
def _sum_blocks_before(counts_ptr, sizes_ptr, C, num_blocks, BLOCKS: tl.constexpr, CLUSTERS: tl.constexpr):
    """In place: counts[h, b, c] becomes the sum over the blocks before b; sizes[h, c] the sum over all."""
    h = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CLUSTERS + tl.arange(0, CLUSTERS)
    total = tl.zeros((CLUSTERS,), tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = counts_ptr + (h * num_blocks + block.to(tl.int64)[:, None]) * C + c[None, :]
        inside = (block < num_blocks)[:, None] & (c < C)[None, :]
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, tl.cumsum(counts, axis=0) - counts + total[None, :], mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(sizes_ptr + h * C + c, total, mask=c < C)


@triton.jit
def _sum_clusters_before(sizes_ptr, offsets_ptr, C, BLOCK: tl.constexpr):
    """offsets[h, c] = tokens of the clusters before c."""
    h = tl.program_id(0).to(tl.int64)
    total = 0
    tl.store(offsets_ptr + h * (C + 1), 0)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        sizes = tl.load(sizes_ptr + h * C + c, mask=c < C, other=0)
        tl.store(offsets_ptr + h * (C + 1) + c + 1, tl.cumsum(sizes, axis=0) + total, mask=c < C)
        total += tl.sum(sizes, axis=0)


@triton.jit
def _start_of_run(label_a, start_a, label_b, start_b):
    # Sorted labels: two neighbouring stretches that end in the same label end in one run.
    return label_b, tl.where(label_a == label_b, start_a, start_b)


@triton.jit
def _place_tokens(labels_ptr, before_ptr, offsets_ptr, order_ptr, N, C, num_blocks, BLOCK: tl.constexpr):
    """Sorts a block by (label, position) and writes each token at its place in the whole order."""
    h, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    i = tl.arange(0, BLOCK)
    token = block * BLOCK + i
    # Label C stands for "past the end": it sorts last and is not written.
    label = tl.load(labels_ptr + h * N + token, mask=token < N, other=C)
    key = tl.sort(label * BLOCK + i)
    label = key // BLOCK
    _, start = tl.associative_scan((label, i), 0, _start_of_run)
    real = label < C
    place = tl.load(offsets_ptr + h * (C + 1) + label, mask=real, other=0)
    place += tl.load(before_ptr + (h * num_blocks + block) * C + label, mask=real, other=0)
    tl.store(order_ptr + h * N + place + i - start, block * BLOCK + key % BLOCK, mask=real)


@triton.jit(do_not_specialize=["n", "out_rows"])
def _move_rows(
    x_ptr,
    order_ptr,
    out_ptr,
    n,
    out_rows,
    x_stride_h,
    x_stride_n,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """out[i] = x[order[i]], or out[order[i]] = x[i] if SCATTER."""
    h = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    other = tl.load(order_ptr + h * n + i, mask=i < n, other=0).to(tl.int64)
    source, target = (i.to(tl.int64), other) if SCATTER else (other, i.to(tl.int64))
    inside = (i < n)[:, None] & (d < D)[None, :]
    row = tl.load(x_ptr + h * x_stride_h + source[:, None] * x_stride_n + d[None, :], mask=inside)
    tl.store(out_ptr + (h * out_rows + target[:, None]) * D + d[None, :], row, mask=inside)


@triton.jit(
    do_not_specialize=["heads_step", "n", "of_span", "stride"],
    do_not_specialize_on_alignment=["heads_ptr", "order_ptr", "ranks_ptr", "targets_ptr"],
)
def _move_among(
    near_ptr, near_stride_h, near_stride_n, heads_ptr, heads_step, order_ptr, far_ptr, steps_ptr, ranks_ptr,
    targets_ptr, n, of_span, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, FETCH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """far[rank[s, i]][target[s, i]] = near[head[s], order[head[s], i]], or the other way if FETCH.

    Programs that run together take rows from everywhere in the list, so that no rank is everyone's at once.
    """
    block = (tl.program_id(0).to(tl.int64) * stride) % tl.num_programs(0)
    span = block // of_span
    i = (block % of_span) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    here = i < n
    head = tl.load(heads_ptr + span * heads_step)
    token = tl.load(order_ptr + head * n + i, mask=here, other=0).to(tl.int64)
    rank = tl.load(ranks_ptr + span * n + i, mask=here, other=0).to(tl.int32)
    target = tl.load(targets_ptr + span * n + i, mask=here, other=0).to(tl.int64)
    step = tl.multiple_of(tl.load(steps_ptr + rank, mask=here, other=0), STEP)
    inside = here[:, None] & (d < D)[None, :]
    near = near_ptr + (head * near_stride_h + token * near_stride_n)[:, None] + d[None, :]
    far = far_ptr + (step + target * D)[:, None] + d[None, :]
    if FETCH:
        tl.store(near, tl.load(far, mask=inside), mask=inside)
    else:
        tl.store(far, tl.load(near, mask=inside), mask=inside)
