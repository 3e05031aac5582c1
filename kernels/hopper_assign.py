"""`assign` for Hopper GPUs in Gluon: the argmax over one tile runs under the matrix product of another.

Two consumer warpgroups of 128 tokens take turns: while one compares, the other multiplies. One more warp brings tokens
and centroids with TMA. A program stays on its SM and walks items; an item is 256 tokens of one head against all of its
centroids, in tiles of 128. 1.24 ms at 40 × 75,600 × 128 bf16 with C 1000 on an H100 (623 TFLOP/s), 0.51 ms with C 300;
`kmeans.assign` takes 1.63 and 0.61 ms.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from semvid.kernels import kmeans
from semvid.kernels.hopper import descriptor, load, next_stage, num_sms, takes
from semvid.kernels.layout import check_rows

# Tokens of one consumer's tile; an item has two of them.
TOKENS = 128
CENTROIDS = kmeans.CENTROID_BLOCK
# Head dim -> tiles of centroids that are loaded ahead. With the two items of tokens: 224 KB of the SM's 227, and 160.
STAGES = {64: 6, 128: 3}
# Registers a thread: an accumulator of 128 × 128 a warpgroup is 128 of them, the argmax needs most of the rest.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Returns the nearest centroid of every token, int32 [H, N]: the labels of `kmeans.assign`, bit for bit.

    What `takes` refuses goes to `kmeans.assign`: fp32, a head dim other than 64 and 128, no token, or an address or a
    stride of x that TMA cannot take.

    Args:
        x: [H, N, D], fp32, bf16 or fp16; heads and tokens may be strided. D is a multiple of 16, at most 256.
        centroids: fp32 [H, C, D].
    """
    H, N, D = check_rows("x", x)
    kmeans.check_centroids("centroids", centroids, H, D)
    if not takes(x):
        return kmeans.assign(x, centroids)
    rounded, half_norms = kmeans._round_centroids(centroids, x.dtype)
    labels = torch.empty(H, N, dtype=torch.int32, device=x.device)
    items_a_head = triton.cdiv(N, 2 * TOKENS)
    _assign[(min(H * items_a_head, num_sms(x.device)),)](
        descriptor(x, [1, TOKENS, D]),
        descriptor(rounded.view(-1, D), [CENTROIDS, D]),
        half_norms,
        labels,
        N,
        items_a_head,
        H * items_a_head,
        rounded.shape[1] // CENTROIDS,
        TOKENS=TOKENS,
        CENTROIDS=CENTROIDS,
        STAGES=STAGES[D],
        LANES=kmeans.LANES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
    )
    return labels


# One compilation serves every N and C.
@gluon.jit(do_not_specialize=["N", "items_a_head", "num_items", "num_tiles"])
def _assign(
    x_desc,
    c_desc,
    half_norms_ptr,
    labels_ptr,
    N,
    items_a_head,
    num_items,
    num_tiles,
    TOKENS: gl.constexpr,
    CENTROIDS: gl.constexpr,
    STAGES: gl.constexpr,
    LANES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Sets up the shared memory and starts the two consumers (4 warps each) and the producer (1 warp)."""
    D: gl.constexpr = x_desc.block_type.shape[2]
    # Slot 2 · buffer + consumer: the tokens of the next item are loaded while those of this one are in use.
    tokens = gl.allocate_shared_memory(x_desc.dtype, [4, 1, TOKENS, D], x_desc.layout)
    centroids = gl.allocate_shared_memory(c_desc.dtype, [STAGES, CENTROIDS, D], c_desc.layout)
    tokens_ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    tokens_free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    centroids_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    centroids_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(4):
        mbarrier.init(tokens_ready.index(slot), count=1)
        mbarrier.init(tokens_free.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(centroids_ready.index(stage), count=1)
        mbarrier.init(centroids_free.index(stage), count=2)
    shared = (tokens, tokens_ready, tokens_free, centroids, centroids_ready, centroids_free)
    work = (N, items_a_head, num_items, num_tiles)
    gl.warp_specialize(
        [
            (_consume, (shared, work, half_norms_ptr, labels_ptr, 0, TOKENS, CENTROIDS, STAGES, LANES)),
            (_consume, (shared, work, half_norms_ptr, labels_ptr, 1, TOKENS, CENTROIDS, STAGES, LANES)),
            (_produce, (shared, work, x_desc, c_desc, TOKENS, CENTROIDS, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _produce(shared, work, x_desc, c_desc, TOKENS: gl.constexpr, CENTROIDS: gl.constexpr, STAGES: gl.constexpr):
    """Loads, per item, both consumers' tokens, then every tile of centroids."""
    tokens, tokens_ready, tokens_free, centroids, centroids_ready, centroids_free = shared
    _, items_a_head, num_items, num_tiles = work
    # A wait for the phase before a barrier's first passes at once: all slots start out free.
    buffer, tokens_phase, stage, phase = 0, 1, 0, 1
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        h = item // items_a_head
        row = (item % items_a_head) * (2 * TOKENS)
        for consumer in gl.static_range(2):
            slot = buffer * 2 + consumer
            mbarrier.wait(tokens_free.index(slot), tokens_phase)
            # Rows beyond N arrive as zeros and count as bytes too.
            mbarrier.expect(tokens_ready.index(slot), x_desc.block_type.nbytes)
            load(x_desc, [h, row + consumer * TOKENS, 0], tokens_ready.index(slot), tokens.index(slot))
        for tile in range(num_tiles):
            mbarrier.wait(centroids_free.index(stage), phase)
            mbarrier.expect(centroids_ready.index(stage), c_desc.block_type.nbytes)
            at = [(h * num_tiles + tile) * CENTROIDS, 0]
            load(c_desc, at, centroids_ready.index(stage), centroids.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        buffer, tokens_phase = next_stage(buffer, tokens_phase, 2)


@gluon.jit
def _consume(
    shared,
    work,
    half_norms_ptr,
    labels_ptr,
    CONSUMER: gl.constexpr,
    TOKENS: gl.constexpr,
    CENTROIDS: gl.constexpr,
    STAGES: gl.constexpr,
    LANES: gl.constexpr,
):
    """Labels one of the two tiles of tokens of every item. Padding centroids score -inf, which never wins."""
    tokens, tokens_ready, tokens_free, centroids, centroids_ready, centroids_free = shared
    N, items_a_head, num_items, num_tiles = work
    D: gl.constexpr = tokens.shape[3]
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, CENTROIDS, 16])
    # Column = step · LANES + lane. Each (token, lane) keeps its best step; the lanes meet after the loop.
    STEPS: gl.constexpr = CENTROIDS // LANES
    column = gl.arange(0, CENTROIDS, layout=gl.SliceLayout(0, ACC))
    zero = gl.zeros([TOKENS, CENTROIDS], gl.float32, ACC)
    columns = gl.reshape(column[None, :] + gl.zeros([TOKENS, CENTROIDS], gl.int32, ACC), (TOKENS, STEPS, LANES))
    step, lane = columns // LANES, gl.max(columns % LANES, 1)
    nothing = gl.reshape(gl.full([TOKENS, CENTROIDS], float("-inf"), gl.float32, ACC), (TOKENS, STEPS, LANES))
    buffer, tokens_phase, stage, phase = 0, 0, 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        h = (item // items_a_head).to(gl.int64)
        slot = buffer * 2 + CONSUMER
        mbarrier.wait(tokens_ready.index(slot), tokens_phase)
        x = tokens.index(slot).reshape((TOKENS, D))
        best, best_step = gl.reduce((nothing, step), 1, _larger_then_first)
        for tile in range(num_tiles):
            mbarrier.wait(centroids_ready.index(stage), phase)
            centroid = centroids.index(stage).permute((1, 0))
            score = warpgroup_mma(x, centroid, zero, use_acc=False, is_async=True)
            # Its latency passes under the product.
            half_norm = gl.load(half_norms_ptr + (h * num_tiles + tile) * CENTROIDS + column)
            score = warpgroup_mma_wait(0, (score,))
            mbarrier.arrive(centroids_free.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
            score = gl.reshape(score - half_norm[None, :], (TOKENS, STEPS, LANES))
            score, step_in_tile = gl.reduce((score, step), 1, _larger_then_first)
            # Strictly larger: an equal score further on has a larger index. NaN never wins, so labels stay in range.
            better = score > best
            best = gl.where(better, score, best)
            best_step = gl.where(better, step_in_tile + tile * STEPS, best_step)
        mbarrier.arrive(tokens_free.index(slot), count=1)
        buffer, tokens_phase = next_stage(buffer, tokens_phase, 2)
        _, label = gl.reduce((best, best_step * LANES + lane), 1, _larger_then_first)
        row = (item % items_a_head) * (2 * TOKENS) + CONSUMER * TOKENS + gl.arange(0, TOKENS, layout=label.type.layout)
        gl.store(labels_ptr + h * N + row, label, mask=row < N)


@gluon.jit
def _larger_then_first(value_a, index_a, value_b, index_b):
    b = (value_b > value_a) | ((value_b == value_a) & (index_b < index_a))
    return gl.where(b, value_b, value_a), gl.where(b, index_b, index_a)
