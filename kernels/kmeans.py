"""One k-means iteration: the nearest centroid of every token, and the sum of every cluster's tokens."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from semvid.kernels.layout import Permutation, check_index, check_rows, check_update
from semvid.kernels.permute import group, with_packed_rows
from semvid.kernels.tiles import tile_of

# Centroids are padded to a multiple of this, so that the loop over them needs no mask.
CENTROID_BLOCK = 128
# The argmax keeps this many columns of a tile apart until the end. It is the period of the columns that one thread
# holds of a matrix-unit accumulator, so the loop compares only within a thread.
LANES = 8
# A longer run of sorted rows is summed in spans of this many, so that one huge cluster is not one program's work.
SPAN = 512
# Mean rows of a cluster, at most -> rows that a program adds at once, and its warps. With few rows a sum is as long as
# its programs take to come and go: 85 us at 40 × 9,450 tokens and C 1000 with one warp, 228 with four.
SUMMED = ((40, 32, 1), (math.inf, 64, 2))
ROWS_DIVIDED = 32
MAX_HEAD_DIM = 256


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Returns the nearest centroid of every token in Euclidean distance, int32 [H, N]; ties go to the smaller index.

    The label is argmax of x·ĉ - ‖ĉ‖²/2, where ĉ is the centroid rounded to x's dtype for the matrix unit and the norm
    is that of ĉ in fp32: the distance to ĉ is exact but for fp32 rounding, so a label differs from the reference only
    where two distances d satisfy d - d_best <= u·(‖c‖ + ‖c_best‖), u = 2^-8 for bf16, 2^-11 for fp16, 0 for fp32.
    On clustered bf16 data that is 0 to 0.12 % of the labels, whose squared distance is 0.1 % larger: as many as the
    rounding of x itself moved (1.5 % if the mean of a head is 25 times its spread). With the norm of the unrounded
    centroid it would be up to 6 % (and 31 %).

    Args:
        x: [H, N, D], fp32, bf16 or fp16; heads and tokens may be strided. D is a multiple of 16, at most 256.
        centroids: fp32 [H, C, D].
    """
    H, N, D = check_rows("x", x)
    C = check_centroids("centroids", centroids, H, D)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; accepted: float32, bfloat16, float16")
    labels = torch.empty(H, N, dtype=torch.int32, device=x.device)
    if labels.numel() == 0:
        return labels
    x = with_packed_rows(x)
    rounded, half_norms = _round_centroids(centroids, x.dtype)
    padded, block_d = rounded.shape[1:]
    tile = tile_of("assign_fp32" if x.dtype == torch.float32 else "assign", x.device, block_d)
    _assign[(triton.cdiv(N, tile.rows), H)](
        x,
        rounded,
        half_norms,
        labels,
        N,
        triton.cdiv(C, tile.columns) * tile.columns,
        padded,
        x.stride(0),
        x.stride(1),
        D=D,
        BLOCK_D=block_d,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        GROUP=LANES,
        UPCAST=x.device.type == "cpu",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return labels


def cluster_sums(x: Tensor, labels: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Returns the sum of each cluster's tokens, fp32 [H, C, D], and their number, int32 [H, C]; the same bits each run.

    Args:
        x: [H, N, D], any floating dtype; heads and tokens may be strided.
        labels: int32 [H, N], each in 0 .. C - 1.
        C: number of clusters.
    """
    H, N, _ = check_rows("x", x)
    check_index("labels", labels, (H, N))
    return sums_by_runs(x, group(labels, C))


def sums_by_runs(x: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """Returns `cluster_sums` of tokens that are grouped already, so that the order is made once for both uses.

    Reading x once by sorted rows is the least traffic (0.26 ms at 40 × 75,600 × 128): sums by a one-hot product would
    be `assign`'s FLOPs again, and sums by float atomics would differ from run to run.

    Args:
        x: [H, N, D], any floating dtype, in token order; heads and tokens may be strided.
        permutation: of x's tokens, from `group`.
    """
    H, N, D = check_rows("x", x)
    order, offsets = permutation
    C = offsets.shape[-1] - 1
    check_index("order", order, (H, N))
    check_index("offsets", offsets, (H, C + 1))
    sums = torch.empty(H, C, D, dtype=torch.float32, device=x.device)
    num_spans = triton.cdiv(N, SPAN)
    carries = torch.empty(H, num_spans, D, dtype=torch.float32, device=x.device)
    x, order, offsets = with_packed_rows(x), order.contiguous(), offsets.contiguous()
    rows, warps = next(choice for most, *choice in SUMMED if most * C >= N)
    block_d, block_c = triton.next_power_of_2(D), triton.next_power_of_2(C)
    if sums.numel() > 0:
        _sum_runs[(C + max(0, num_spans - 1), H)](
            x,
            order,
            offsets,
            sums,
            carries,
            N,
            C,
            num_spans,
            x.stride(0),
            x.stride(1),
            D=D,
            BLOCK_D=block_d,
            BLOCK_C=block_c,
            ROWS=rows,
            SPAN_ROWS=SPAN,
            num_warps=warps,
        )
    if sums.numel() > 0 and num_spans > 1:
        _add_carries[(num_spans - 1, H)](
            offsets, sums, carries, C, num_spans, D=D, BLOCK_D=block_d, BLOCK_C=block_c, SPAN_ROWS=SPAN, num_warps=4
        )
    return sums, offsets.diff(dim=-1)


def centroids_of(sums: Tensor, counts: Tensor, previous: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns the mean of each cluster's tokens, fp32 [H, C, D]; an empty cluster keeps its centroid.

    Args:
        sums: fp32 [H, C, D], of the tokens of each cluster.
        counts: int32 or fp32 [H, C], how many they are.
        previous: fp32 [H, C, D], the centroids before.
        out: contiguous memory of the result, which may be that of `previous`; new if absent.
    """
    check_update(sums, counts, previous, out)
    H, C, D = sums.shape
    made = torch.empty_like(sums, memory_format=torch.contiguous_format) if out is None else out
    if sums.numel() > 0:
        block_d = triton.next_power_of_2(D)
        _divide[(triton.cdiv(C, ROWS_DIVIDED), H)](
            sums.contiguous(), counts.contiguous(), previous.contiguous(), made, C,
            D=D, BLOCK_D=block_d, ROWS=ROWS_DIVIDED, num_warps=4,
        )  # fmt: skip
    return made


def check_centroids(name: str, centroids: Tensor, H: int, D: int) -> int:
    """Returns C of fp32 [H, C, D] centroids.

    Raises:
        ValueError: another dtype or shape, no centroid, or a head dim that the kernels do not take.
    """
    if centroids.ndim != 3 or centroids.dtype != torch.float32 or centroids.shape[::2] != (H, D):
        raise ValueError(f"{name} must be float32 [{H}, C, {D}], not {centroids.dtype} {list(centroids.shape)}")
    if centroids.shape[1] == 0:
        raise ValueError(f"{name} holds no centroid; accepted: one or more a head")
    if D % 16 != 0 or not 16 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"head dim is {D}; accepted: multiples of 16 up to {MAX_HEAD_DIM}")
    return centroids.shape[1]


def _round_centroids(centroids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the centroids in `dtype`, padded with zeros, and half their squared norms, fp32, padded with infinity."""
    H, C, D = centroids.shape
    padded = triton.cdiv(C, CENTROID_BLOCK) * CENTROID_BLOCK
    block_d = triton.next_power_of_2(D)
    rounded = torch.empty(H, padded, block_d, dtype=dtype, device=centroids.device)
    half_norms = torch.empty(H, padded, dtype=torch.float32, device=centroids.device)
    _round_rows[(padded // 32, H)](
        centroids.contiguous(), rounded, half_norms, C, padded, D=D, BLOCK_D=block_d, BLOCK_C=32, num_warps=4
    )
    return rounded, half_norms


@triton.jit
def _divide(sums_ptr, counts_ptr, previous_ptr, out_ptr, C, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    h = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    at = (h * C + c[:, None]) * D + d[None, :]
    inside = (c < C)[:, None] & (d < D)[None, :]
    count = tl.load(counts_ptr + h * C + c, mask=c < C, other=0).to(tl.float32)[:, None]
    full = inside & (count > 0)
    sums = tl.load(sums_ptr + at, mask=full, other=0.0)
    before = tl.load(previous_ptr + at, mask=inside & (count <= 0), other=0.0)
    tl.store(out_ptr + at, tl.where(full, tl.div_rn(sums, tl.maximum(count, 1.0)), before), mask=inside)


@triton.jit
def _round_rows(
    c_ptr, rounded_ptr, half_norms_ptr, C, padded, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr
):
    h = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    inside = (c < C)[:, None] & (d < D)[None, :]
    centroid = tl.load(c_ptr + (h * C + c[:, None]) * D + d[None, :], mask=inside, other=0.0)
    rounded = centroid.to(rounded_ptr.dtype.element_ty)
    tl.store(rounded_ptr + (h * padded + c[:, None]) * BLOCK_D + d[None, :], rounded)
    exact = rounded.to(tl.float32)
    half_norm = tl.where(c < C, 0.5 * tl.sum(exact * exact, axis=1), float("inf"))
    tl.store(half_norms_ptr + h * padded + c, half_norm)


@triton.jit
def _assign(
    x_ptr,
    c_ptr,
    half_norms_ptr,
    labels_ptr,
    N,
    C,
    padded,
    x_stride_h,
    x_stride_n,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Keeps a tile of tokens and walks the centroids. C is a multiple of BLOCK_C; padding scores -inf."""
    h = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + h * x_stride_h + row.to(tl.int64)[:, None] * x_stride_n + d[None, :]
    x = tl.load(x_at, mask=(row < N)[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        # Triton's interpreter multiplies the bit patterns of bf16.
        x = x.to(tl.float32)
    c_ptr += h * padded * BLOCK_D
    half_norms_ptr += h * padded
    column = tl.arange(0, BLOCK_C)
    # Column = step · GROUP + lane. Each (token, lane) keeps its best step; the lanes meet after the loop.
    STEPS: tl.constexpr = BLOCK_C // GROUP
    best = tl.full((BLOCK_N, GROUP), float("-inf"), tl.float32)
    best_step = tl.zeros((BLOCK_N, GROUP), tl.int32)
    for start in range(0, C, BLOCK_C):
        centroid = tl.load(c_ptr + (start + column)[None, :] * BLOCK_D + d[:, None])
        if UPCAST:
            centroid = centroid.to(tl.float32)
        half_norm = tl.load(half_norms_ptr + start + column)
        score = tl.dot(x, centroid, input_precision="ieee") - half_norm[None, :]
        score, step = tl.max(tl.reshape(score, (BLOCK_N, STEPS, GROUP)), axis=1, return_indices=True)
        # Strictly larger: an equal score further on has a larger index. NaN never wins, so labels stay in range.
        better = score > best
        best = tl.where(better, score, best)
        best_step = tl.where(better, step + start // GROUP, best_step)
    # The smallest index among the lanes that reach the maximum.
    index = best_step * GROUP + tl.arange(0, GROUP)[None, :]
    label = tl.min(tl.where(best == tl.max(best, axis=1)[:, None], index, padded), axis=1)
    tl.store(labels_ptr + h * N + row, label, mask=row < N)


@triton.jit
def _run_at(offsets_ptr, position, C, BLOCK_C: tl.constexpr):
    """Returns the cluster whose run holds the sorted position, and where that run starts and ends."""
    c = tl.arange(0, BLOCK_C)
    ends = tl.load(offsets_ptr + 1 + c, mask=c < C, other=2**31 - 1)
    cluster = tl.sum((ends <= position).to(tl.int32), axis=0)
    return cluster, tl.load(offsets_ptr + cluster), tl.load(offsets_ptr + cluster + 1)


@triton.jit
def _sum_runs(
    x_ptr,
    order_ptr,
    offsets_ptr,
    sums_ptr,
    carries_ptr,
    N,
    C,
    num_spans,
    x_stride_h,
    x_stride_n,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN_ROWS: tl.constexpr,
):
    """Sums a piece of a run. Pieces 0 .. C - 1 start where a cluster starts, the others where a span starts.

    A piece ends with its run or its span. What a span continues of a run that started before goes to `carries`.
    """
    h, piece = tl.program_id(1).to(tl.int64), tl.program_id(0)
    offsets_ptr += h * (C + 1)
    if piece < C:
        start = tl.load(offsets_ptr + piece)
        end = tl.load(offsets_ptr + piece + 1)
        out_ptr = sums_ptr + (h * C + piece) * D
    else:
        span = piece - C + 1
        start = span * SPAN_ROWS
        _, run_start, end = _run_at(offsets_ptr, start, C, BLOCK_C)
        # A run that starts exactly here is the first kind of piece.
        end = tl.where(run_start == start, start, end)
        out_ptr = carries_ptr + (h * num_spans + span) * D
    end = tl.minimum(end, (start // SPAN_ROWS + 1) * SPAN_ROWS)

    d = tl.arange(0, BLOCK_D)
    # Rows 16 apart belong to one thread, so each pass adds up within threads.
    total = tl.zeros((16, BLOCK_D), tl.float32)
    for first in range(start, end, ROWS):
        i = first + tl.arange(0, ROWS)
        token = tl.load(order_ptr + h * N + i, mask=i < end, other=0).to(tl.int64)
        at = x_ptr + h * x_stride_h + token[:, None] * x_stride_n + d[None, :]
        rows = tl.load(at, mask=(i < end)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tl.reshape(rows, (ROWS // 16, 16, BLOCK_D)), axis=0)
    tl.store(out_ptr + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit
def _add_carries(
    offsets_ptr,
    sums_ptr,
    carries_ptr,
    C,
    num_spans,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN_ROWS: tl.constexpr,
):
    """Adds to a cluster's sum what later spans hold of its run; done by the program of the first such span."""
    h, span = tl.program_id(1).to(tl.int64), tl.program_id(0) + 1
    cluster, run_start, run_end = _run_at(offsets_ptr + h * (C + 1), span * SPAN_ROWS, C, BLOCK_C)
    if (run_start < span * SPAN_ROWS) & (run_start >= (span - 1) * SPAN_ROWS):
        d = tl.arange(0, BLOCK_D)
        end_span = (run_end + SPAN_ROWS - 1) // SPAN_ROWS
        total = tl.zeros((16, BLOCK_D), tl.float32)
        for first in range(span, end_span, 16):
            s = first + tl.arange(0, 16)
            at = carries_ptr + (h * num_spans + s[:, None]) * D + d[None, :]
            total += tl.load(at, mask=(s < end_span)[:, None] & (d < D)[None, :], other=0.0)
        sum_ptr = sums_ptr + (h * C + cluster) * D + d
        tl.store(sum_ptr, tl.load(sum_ptr, mask=d < D) + tl.sum(total, axis=0), mask=d < D)
