"""Where rows go when sequence shards become heads and back: index lists made on the device from counts and spans."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semvid.kernels.layout import check_index
from semvid.kernels.runs import count_up_to

ROWS = 1024


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
    found = [torch.empty(1, total, dtype=torch.int32, device=order.device) for _ in steps]
    if total > 0:
        other = len(steps) - 1
        _source_rows[(triton.cdiv(order.shape[1], ROWS), len(spans))](
            order, spans, found[0], found[other], order.shape[1], *steps[0], *steps[other], TWO=other > 0, BLOCK=ROWS
        )
    return found


def target_rows(
    counts: Tensor, pieces: Tensor, begins: Tensor, first_source: int, total: int, most: int
) -> tuple[Tensor, Tensor]:
    """Returns where rows of pieces belong, int32 [1, total], and the runs of each piece's clusters, int32 [G, C + 1].

    Rows are listed source by source, piece by piece, cluster by cluster; they belong piece by piece, cluster by
    cluster, in a cluster source by source.

    Args:
        counts: int32 [U, H, C], each source's tokens in each cluster; sources and heads may be strided.
        pieces: int64 [G, 4]: head, first row and one after the last, counted through the head's clusters over all
            sources, and the place of the first.
        begins: int64 [S, G]: where the rows of a source and piece begin in the list. S sources are listed.
        first_source: the first of those that are listed.
        total: rows listed.
        most: rows of one source and piece, at most.
    """
    C, S, G, device = counts.shape[2], len(begins), len(pieces), counts.device
    targets = torch.empty(1, total, dtype=torch.int32, device=device)
    offsets, ends, shifts = _clipped(counts, pieces, first_source, S)
    if G > 0 and total > 0:
        _target_rows[(triton.cdiv(most, ROWS), S * G)](ends, shifts, begins, targets, C, C.bit_length(), BLOCK=ROWS)
    return targets, offsets


def addresses(
    counts: Tensor, source: int, n: int, pieces: Tensor, spans: Tensor, cuts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns where one source's rows belong, in the order of their labels, and the runs of some pieces' clusters.

    Rows of a head are counted through its clusters, in a cluster source by source; a cut takes a stretch of them. What
    is returned: ranks, uint8 [S, n], rows in those ranks' blocks, int32 [S, n], and runs, int32 [G, C + 1].

    Args:
        counts: int32 [U, H, C], each source's tokens in each cluster; sources and heads may be strided.
        source: which.
        n: its tokens, in each head.
        pieces: int64 [H + G, 4]: head, first row, one after the last, and the place of the first; every head as a
            whole, then the pieces whose runs are wanted.
        spans: int64 [S, 3]: a head, and the first and one after the last of `cuts` among which its rows are.
        cuts: int64 [T, 4]: first row, one after the last, rank, and the place of the first in that rank's block.
    """
    (_, H, C), S = counts.shape, len(spans)
    offsets, ends, shifts = _clipped(counts, pieces, source, 1)
    ranks = torch.empty(S, n, dtype=torch.uint8, device=counts.device)
    targets = torch.empty(S, n, dtype=torch.int32, device=counts.device)
    if S * n > 0:
        _addresses[(triton.cdiv(n, ROWS), S)](
            ends, shifts, spans, cuts, ranks, targets, n, C, C.bit_length(), BLOCK=ROWS
        )
    return ranks, targets, offsets[H:]


def unpack_map(bits: Tensor, heads: Tensor, Ck: int) -> Tensor:
    """Returns the block maps of some heads, bool [G, Cq, Ck].

    Args:
        bits: uint8 [H, Cq, ⌈Ck / 8⌉]: eight key clusters a byte, the first in the lowest bit; heads and rows may be
            strided.
        heads: int64 [G], may be strided.
        Ck: key clusters.
    """
    G, Cq = len(heads), bits.shape[1]
    selected = torch.empty(G, Cq, Ck, dtype=torch.bool, device=bits.device)
    if selected.numel() > 0:
        _unpack_map[(triton.cdiv(Ck, ROWS), Cq, G)](
            bits, heads, selected, *bits.stride()[:2], heads.stride(0), Cq, Ck, BLOCK=ROWS
        )
    return selected


def _clipped(counts: Tensor, pieces: Tensor, first_source: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns of each piece the runs, int32 [G, C + 1], and of S sources and each piece where its rows of each cluster
    end in the list, and what takes their number there to their place, int32 [S, G, C].
    """
    (U, _, C), G = counts.shape, len(pieces)
    offsets = torch.empty(G, C + 1, dtype=torch.int32, device=counts.device)
    ends, shifts = (torch.empty(S, G, C, dtype=torch.int32, device=counts.device) for _ in range(2))
    if G > 0:
        counts = counts if counts.stride(2) == 1 else counts.contiguous()
        block = max(16, min(1024, triton.next_power_of_2(C)))
        _clip_runs[(G, S)](
            counts, pieces, offsets, ends, shifts, *counts.stride()[:2], G, C, first_source, SOURCES=U, BLOCK=block
        )
    return offsets, ends, shifts


@triton.jit(do_not_specialize=["n"])
def _source_rows(
    order, spans, out_a, out_b, n, head_a, token_a, head_b, token_b, TWO: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    spans += tl.program_id(1).to(tl.int64) * 4
    begin, head, first, length = tl.load(spans), tl.load(spans + 1), tl.load(spans + 2), tl.load(spans + 3)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(order + head * n + first + i, mask=i < length, other=0)
    tl.store(out_a + begin + i, (head * head_a + token * token_a).to(tl.int32), mask=i < length)
    if TWO:
        tl.store(out_b + begin + i, (head * head_b + token * token_b).to(tl.int32), mask=i < length)


@triton.jit(do_not_specialize=["G", "first_source"], do_not_specialize_on_alignment=["counts", "pieces"])
def _clip_runs(
    counts, pieces, offsets, ends, shifts, source_step, head_step, G, C, first_source,
    SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For one piece and source: its rows through each cluster (`ends`), and what takes their number to their place."""
    piece, listed = tl.program_id(0), tl.program_id(1)
    source = first_source + listed
    pieces += piece * 4
    first, last = tl.load(pieces + 1).to(tl.int32), tl.load(pieces + 2).to(tl.int32)
    base = tl.load(pieces + 3).to(tl.int32) - first
    counts += tl.load(pieces) * head_step
    place = (listed * G + piece).to(tl.int64) * C
    through = 0
    mine = 0
    for start in range(0, C, BLOCK):
        cluster = start + tl.arange(0, BLOCK)
        inside = cluster < C
        of_all = tl.zeros([BLOCK], tl.int32)
        before = tl.zeros([BLOCK], tl.int32)
        for other in range(SOURCES):
            of_other = tl.load(counts + other * source_step + cluster, mask=inside, other=0)
            of_all += of_other
            before += tl.where(other < source, of_other, 0)
        own = tl.load(counts + source * source_step + cluster, mask=inside, other=0)
        end = through + tl.cumsum(of_all, 0)
        begin = end - of_all + before
        low = tl.minimum(tl.maximum(begin, first), last)
        length = tl.minimum(tl.maximum(begin + own, first), last) - low
        until = mine + tl.cumsum(length, 0)
        tl.store(ends + place + cluster, until, mask=inside)
        tl.store(shifts + place + cluster, base + low - (until - length), mask=inside)
        if listed == 0:
            clipped = tl.minimum(tl.maximum(end, first), last) - first
            tl.store(offsets + piece.to(tl.int64) * (C + 1) + cluster + 1, clipped, mask=inside)
        through += tl.sum(of_all, 0)
        mine += tl.sum(length, 0)
    if listed == 0:
        tl.store(offsets + piece.to(tl.int64) * (C + 1), 0)


@triton.jit
def _target_rows(ends, shifts, begins, targets, C, steps, BLOCK: tl.constexpr):
    place = tl.program_id(1).to(tl.int64)
    ends += place * C
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(ends + C - 1)
    # Of equal ends (clusters without rows) all are passed.
    cluster = count_up_to(ends, C, i, steps)
    shift = tl.load(shifts + place * C + cluster, mask=inside, other=0)
    tl.store(targets + tl.load(begins + place) + i, i + shift, mask=inside)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["ends", "spans", "cuts"])
def _addresses(ends, shifts, spans, cuts, ranks, targets, n, C, steps, BLOCK: tl.constexpr):
    span = tl.program_id(1).to(tl.int64)
    head, cut, last_cut = tl.load(spans + span * 3), tl.load(spans + span * 3 + 1), tl.load(spans + span * 3 + 2)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    # Of equal ends (clusters without rows) all are passed.
    cluster = count_up_to(ends + head * C, C, i, steps)
    row = i + tl.load(shifts + head * C + cluster, mask=inside, other=0)
    rank = tl.zeros([BLOCK], tl.int32)
    target = tl.zeros([BLOCK], tl.int32)
    while cut < last_cut:
        first, last = tl.load(cuts + cut * 4), tl.load(cuts + cut * 4 + 1)
        taken = (row >= first) & (row < last)
        rank = tl.where(taken, tl.load(cuts + cut * 4 + 2).to(tl.int32), rank)
        target = tl.where(taken, (row - first + tl.load(cuts + cut * 4 + 3)).to(tl.int32), target)
        cut += 1
    place = span * n + i
    tl.store(ranks + place, rank.to(tl.uint8), mask=inside)
    tl.store(targets + place, target, mask=inside)


@triton.jit
def _unpack_map(bits, heads, selected, head_step, row_step, heads_step, Cq, Ck, BLOCK: tl.constexpr):
    piece, row = tl.program_id(2).to(tl.int64), tl.program_id(1)
    head = tl.load(heads + piece * heads_step)
    cluster = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(bits + head * head_step + row * row_step + cluster // 8, mask=cluster < Ck, other=0)
    on = (byte >> (cluster % 8).to(tl.uint8)) & 1
    tl.store(selected + (piece * Cq + row) * Ck + cluster, on != 0, mask=cluster < Ck)
