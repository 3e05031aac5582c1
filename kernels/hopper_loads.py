"""The loading warps of Hopper attention: one takes items and loads their rows of Q, one loads K and one V.

The selected keys of a query cluster are runs of consecutive rows, laid into tiles without gaps. A piece of a run (as
much of it as the tile still takes) comes by bulk copies (TMA) of 64, 32, 16 and 8 rows; Gluon has none smaller, so what
is left of it comes by asynchronous copies of 4, 2 and 1 rows, 16 bytes a lane. An item's first tile is filled up in
front with zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from semvid.kernels.hopper import load, load_lanes, next_stage, view

# Rows of the bulk copies, largest first.
BOXES = (64, 32, 16, 8)
# Columns of one: 128 bytes, as wide as the swizzle.
HALF = 64
# Arrivals that complete a tile: five tell the bytes of its bulk copies, and 32 lanes the end of their own copies.
ARRIVALS = 37


@gluon.jit
def take(items, q, q_ready, q_free, q_desc, blocks, ROWS: gl.constexpr) -> None:
    """Takes items from the counter until none is left, tells the others what they are, and loads their rows of Q.

    An item is up to 2 · ROWS rows of one query cluster. Who takes which is left to chance and changes no bit of out.
    """
    facts, item_ready, item_free = items
    q_offsets, num_keys, order, first_item, taken, num_blocks, Cq = blocks
    total = gl.load(first_item + num_blocks)
    # A wait for the phase before a barrier's first passes at once: all places start out free.
    buffer, phase, q_phase = 0, 1, 1
    item = gl.atomic_add(taken, 1)
    while item < total:
        place = _last_at_most(first_item, num_blocks, item)
        block = gl.load(order + place)
        head = block // Cq
        cluster = q_offsets + block.to(gl.int64) + head
        row = gl.load(cluster) + (item - gl.load(first_item + place)) * (2 * ROWS)
        row_end = gl.minimum(gl.load(cluster + 1), row + 2 * ROWS)
        mbarrier.wait(item_free.index(buffer), phase)
        _tell(facts, item_ready, buffer, block, row, row_end, gl.load(num_keys + block))
        buffer, phase = next_stage(buffer, phase, 2)
        mbarrier.wait(q_free, q_phase)
        q_phase ^= 1
        if row_end - row > ROWS:
            mbarrier.expect(q_ready, 2 * q_desc.block_type.nbytes)
            load(q_desc, [head, row, 0], q_ready, q.index(0))
            load(q_desc, [head, row + ROWS, 0], q_ready, q.index(1))
        else:
            mbarrier.expect(q_ready, q_desc.block_type.nbytes)
            load(q_desc, [head, row, 0], q_ready, q.index(0))
        item = gl.atomic_add(taken, 1)
    mbarrier.wait(item_free.index(buffer), phase)
    _tell(facts, item_ready, buffer, -1, 0, 0, 0)


@gluon.jit
def hear(items, buffer, phase, WARPS: gl.constexpr) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Returns the next item, once it is known: query cluster of all heads (-1: no more), its rows' ends, its keys."""
    facts, item_ready, item_free = items
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(item_ready.index(buffer), phase)
    block = gl.max(facts.index(buffer * 4).load(one), 0)
    row = gl.max(facts.index(buffer * 4 + 1).load(one), 0)
    row_end = gl.max(facts.index(buffer * 4 + 2).load(one), 0)
    num_keys = gl.max(facts.index(buffer * 4 + 3).load(one), 0)
    mbarrier.arrive(item_free.index(buffer), count=1)
    return block, row, row_end, num_keys


@gluon.jit
def fill(
    items, tile, ready, free, LAG: gl.constexpr, boxes, mean, matrix, head_stride, row_stride, lists,
    KEYS: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """Loads the tiles of K, or of V, of every item: the tail's, then those of the selected keys.

    The place of tile t is free once tile t - STAGES + LAG of K has been read: V is read one step after K, and one
    barrier tells of both.

    Args:
        tile: shared memory [STAGES, KEYS, D].
        boxes: descriptors of K, or V, by rows of the box; mean: of the tail's means.
        head_stride: of the matrix, in 8 elements; row_stride likewise.
    """
    runs, num_runs, k_offsets, Nk, Cq, Ck, R, bits, tail_tiles = lists
    D: gl.constexpr = tile.shape[2]
    # As rows of 64 columns: a tile is the left halves of its rows, then the right ones.
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    rows = view(tile, tile.dtype, [STAGES * KEYS * (D // 64), 1, 64], plain)
    buffer, item_phase, stage, freed, phase = 0, 0, 0, LAG, 1
    block, _, _, num_keys = hear(items, buffer, item_phase, 1)
    while block >= 0:
        head = block // Cq
        for t in range(tail_tiles):
            mbarrier.wait(free.index(freed), phase)
            for at in gl.static_range(0, KEYS, 64):
                _box(mean, rows, ready.index(stage), head, t * KEYS + at, stage * KEYS * (D // 64) + at, KEYS, D)
            _close(ready.index(stage), KEYS // 8, D)
            stage, _ = next_stage(stage, phase, STAGES)
            freed, phase = next_stage(freed, phase, STAGES)
        if num_keys > 0:
            words = runs + block.to(gl.int64) * R
            offsets = k_offsets + head.to(gl.int64) * (Ck + 1)
            of_head = matrix + head.to(gl.int64) * head_stride * 8
            count = gl.load(num_runs + block)
            cluster_mask = (1 << bits) - 1
            num_tiles = (num_keys + KEYS - 1) // KEYS
            # What fills the first tile up is a run of its own, beyond the last row.
            row, left = Nk, num_tiles * KEYS - num_keys
            # The next run's first row and first key, and the word and first key of the one after it.
            run = 1
            start = 0
            next_row = gl.load(offsets + (gl.load(words) & cluster_mask))
            word = gl.load(words + gl.minimum(run, count - 1))
            next_start = gl.where(run < count, word >> bits, num_keys)
            for _ in range(num_tiles):
                mbarrier.wait(free.index(freed), phase)
                base = stage * KEYS * (D // 64)
                at = 0
                eights = 0
                while at < KEYS:
                    if left == 0:
                        row = next_row
                        left = next_start - start
                        start = next_start
                        next_row = gl.load(offsets + (word & cluster_mask))
                        run += 1
                        word = gl.load(words + gl.minimum(run, count - 1))
                        next_start = gl.where(run < count, word >> bits, num_keys)
                    n = gl.minimum(left, KEYS - at)
                    _bring(boxes, rows, ready.index(stage), of_head, row_stride, head, row, Nk, base + at, n, KEYS, D)
                    at += n
                    row += n
                    left -= n
                    eights += n // 8
                _close(ready.index(stage), eights, D)
                stage, _ = next_stage(stage, phase, STAGES)
                freed, phase = next_stage(freed, phase, STAGES)
        buffer, item_phase = next_stage(buffer, item_phase, 2)
        block, _, _, num_keys = hear(items, buffer, item_phase, 1)


@gluon.jit
def _last_at_most(values, count, key):
    """Returns the last place of `count` ascending values (the first is 0) with a value <= key >= 0."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    first = 0
    # It is among `count` places from `first` on; a round leaves a 32nd of them.
    while count > 1:
        stride = (count + 31) // 32
        probe = lane * stride
        value = gl.load(values + first + probe, mask=probe < count, other=2147483647)
        step = gl.sum((value <= key).to(gl.int32), 0) - 1
        first += step * stride
        count = gl.minimum(stride, count - step * stride)
    return first


@gluon.jit
def _tell(facts, item_ready, buffer, block, row, row_end, num_keys):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    facts.index(buffer * 4).store(gl.full([1], block, gl.int32, one))
    facts.index(buffer * 4 + 1).store(gl.full([1], row, gl.int32, one))
    facts.index(buffer * 4 + 2).store(gl.full([1], row_end, gl.int32, one))
    facts.index(buffer * 4 + 3).store(gl.full([1], num_keys, gl.int32, one))
    mbarrier.arrive(item_ready.index(buffer), count=1)


@gluon.jit
def _bring(boxes, rows, ready, of_head, row_stride, head, row, Nk, to, n, KEYS: gl.constexpr, D: gl.constexpr):
    """Starts the copies of n <= KEYS rows from `row` on to row `to` of the shared memory."""
    box64, box32, box16, box8 = boxes
    for _ in range(n // 64):
        _box(box64, rows, ready, head, row, to, KEYS, D)
        row += 64
        to += 64
    if n & 32:
        _box(box32, rows, ready, head, row, to, KEYS, D)
        row += 32
        to += 32
    if n & 16:
        _box(box16, rows, ready, head, row, to, KEYS, D)
        row += 16
        to += 16
    if n & 8:
        _box(box8, rows, ready, head, row, to, KEYS, D)
        row += 8
        to += 8
    if n & 4:
        _lanes(rows, of_head, row_stride, row, Nk, to, 4, KEYS, D)
        row += 4
        to += 4
    if n & 2:
        _lanes(rows, of_head, row_stride, row, Nk, to, 2, KEYS, D)
        row += 2
        to += 2
    if n & 1:
        _lanes(rows, of_head, row_stride, row, Nk, to, 1, KEYS, D)


@gluon.jit
def _box(desc, rows, ready, head, row, to, KEYS: gl.constexpr, D: gl.constexpr):
    """Starts a bulk copy for each half of the rows. The swizzle follows from addresses, so any row may be the first."""
    for half in gl.static_range(D // 64):
        target = view(rows.index(to + half * KEYS), desc.dtype, desc.block_type.shape, desc.layout)
        load(desc, [head, row, half * 64], ready, target)


@gluon.jit
def _lanes(rows, of_head, row_stride, row, Nk, to, COUNT: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr):
    """Starts copies of COUNT rows to where a bulk copy would put them; zeros for rows beyond Nk."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [4, 8, 1], [1, 1, 1], [2, 1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [2, 1, 0])
    i = gl.arange(0, COUNT, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    piece = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    # 16-byte piece p of a row lies at p xor (row modulo 8).
    source = of_head + (row + i).to(gl.int64) * row_stride * 8 + ((piece ^ ((to + i) & 7)) * 8 + column)
    valid = (row + i + 0 * piece + 0 * column) < Nk
    for half in gl.static_range(D // 64):
        target = view(rows.index(to + half * KEYS), rows.dtype, [COUNT, 8, 8], plain)
        load_lanes(target, source + half * 64, mask=valid)


@gluon.jit
def _close(ready, eights, D: gl.constexpr):
    """Ends a tile's loading: tells how many bytes its bulk copies bring, 8 rows `eights` times, at most 16.

    An expectation is an arrival, its bytes are a constant: one for each bit of `eights`, or a plain arrival instead.
    """
    for bit in gl.static_range(5):
        on = (eights >> bit) & 1 == 1
        mbarrier.expect(ready, (8 << bit) * D * 2, pred=on)
        mbarrier.arrive(ready, count=1, pred=on == 0)
    async_copy.mbarrier_arrive(ready, increment_count=False)
