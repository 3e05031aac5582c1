"""The plan of variable-block attention, made on the device: which key rows each query cluster walks, and in what order.

The selected key clusters of a query cluster are joined into runs of consecutive key rows. The selected keys are
numbered 0, 1, 2, … through all the runs, and a run is told by two numbers: `start`, of its first key, and `cluster`,
the key cluster that it begins with. Key n belongs to the last run with start <= n, and stands at key row
n - start + k_offsets[cluster]. The two share one word of 31 bits, start above, so that words ascend as starts do.
Nothing here waits for the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from semvid.kernels.layout import BlockMap, Plan, check_plan
from semvid.kernels.limits import cluster_bits

# Query rows of one item, the unit of work that a program takes. A cluster's last item may have fewer.
ITEM_ROWS = 128


class Lists(NamedTuple):
    """What `attention` walks; `Plan.lists` holds these. R = ⌈Ck / 2⌉, the most runs Ck clusters can form."""

    runs: Tensor
    """int32 [H, Cq, R]: start · 2^cluster_bits(Ck) + cluster of each run; ascending."""
    num_runs: Tensor
    """int32 [H, Cq]."""
    num_keys: Tensor
    """int32 [H, Cq]: selected keys."""
    order: Tensor
    """int32 [H · Cq]: query clusters (h · Cq + i) in the order they are taken: heads by falling work, so that no heavy
    one is left for the end, each head's clusters together (its K and V stay in L2), longest first."""
    first_item: Tensor
    """int32 [H · Cq + 1]: items before each entry of `order`; the last is their total."""


def plan(q_offsets: Tensor, k_offsets: Tensor, block_map: BlockMap) -> Plan:
    """Returns the plan of `attention` for these runs and this map. No host synchronisation; the same bits every time.

    Args:
        q_offsets: int32 [H, Cq + 1].
        k_offsets: int32 [H, Ck + 1].
        block_map: bool [H, Cq, Ck]. Empty clusters between two selected ones do not break a run.
    """
    H, Cq, Ck = check_plan(q_offsets, k_offsets, block_map)
    q_offsets, k_offsets = q_offsets.contiguous(), k_offsets.contiguous()
    selected = block_map.selected.contiguous()

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=selected.device)

    R = max(1, (Ck + 1) // 2)
    lists = Lists(ints(H, Cq, R), ints(H, Cq), ints(H, Cq), ints(H * Cq), ints(H * Cq + 1))
    if lists.order.numel() == 0:
        lists.first_item.zero_()
        return Plan(q_offsets, k_offsets, BlockMap(selected), tuple(lists))
    before, head_items = ints(H, Ck), ints(H)
    head_work = torch.empty(H, dtype=torch.int64, device=selected.device)
    columns = max(16, min(1024, triton.next_power_of_2(Ck)))
    rows = max(16, min(256, triton.next_power_of_2(Cq)))
    heads = triton.next_power_of_2(H)
    _before_kernel[(H, max(1, triton.cdiv(Ck, columns)))](k_offsets, before, Ck, (Ck + 1).bit_length(), BLOCK=columns)
    _runs_kernel[(H * Cq,)](selected, k_offsets, before, *lists[:3], Cq, Ck, R, cluster_bits(Ck), BLOCK=columns)
    _work_kernel[(H,)](q_offsets, lists.num_keys, head_work, head_items, Cq, ITEM_ROWS=ITEM_ROWS, BLOCK=rows)
    _order_kernel[(H, triton.cdiv(Cq, 16))](
        q_offsets, lists.num_keys, head_work, head_items, lists.order, lists.first_item, H, Cq,
        ITEM_ROWS=ITEM_ROWS, HEADS=heads, BLOCK=16, OTHERS=rows,
    )  # fmt: skip
    return Plan(q_offsets, k_offsets, BlockMap(selected), tuple(lists))


@triton.jit
def count_up_to(values, count, key, steps) -> tl.tensor:
    """Returns how many of the `count` ascending values are <= key, for each key (a scalar or a block).

    Args:
        values: pointer to the first value.
        steps: bits of `count`, so that 2^steps > count.
    """
    found = key * 0
    for bit in range(steps):
        probe = found + (1 << (steps - 1 - bit))
        value = tl.load(values + probe - 1, mask=probe <= count, other=2147483647)
        found = tl.where((value <= key) & (probe <= count), probe, found)
    return found


@triton.jit
def _before_kernel(k_offsets, before, Ck, steps, BLOCK: tl.constexpr):
    """Writes, for every key cluster, the cluster that holds the key row before its first; -1 if there is none."""
    head = tl.program_id(0).to(tl.int64)
    cluster = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = k_offsets + head * (Ck + 1)
    first = tl.load(offsets + cluster, mask=cluster < Ck, other=0)
    # Of equal offsets (empty clusters) the last is counted: the cluster that has rows.
    found = count_up_to(offsets, Ck + 1, first - 1, steps) - 1
    tl.store(before + head * Ck + cluster, found, mask=cluster < Ck)


@triton.jit
def _runs_kernel(
    selected, k_offsets, before, words, num_runs, num_keys, Cq, Ck, R, bits, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes the runs of one query cluster: two running sums over the key clusters, of keys and of runs begun."""
    block = tl.program_id(0).to(tl.int64)
    head = block // Cq
    selected += block * Ck
    words += block * R
    keys = 0
    runs = 0
    for first in range(0, Ck, BLOCK):
        cluster = first + tl.arange(0, BLOCK)
        inside = cluster < Ck
        row = tl.load(k_offsets + head * (Ck + 1) + cluster, mask=inside, other=0)
        size = tl.load(k_offsets + head * (Ck + 1) + cluster + 1, mask=inside, other=0) - row
        on = (tl.load(selected + cluster, mask=inside, other=0) != 0) & (size > 0)
        previous = tl.load(before + head * Ck + cluster, mask=inside, other=-1)
        joined = tl.load(selected + previous, mask=inside & (previous >= 0), other=0) != 0
        begins = (on & (joined == 0)).to(tl.int32)
        size = tl.where(on, size, 0)
        start = keys + tl.cumsum(size, 0) - size
        run = runs + tl.cumsum(begins, 0) - 1
        tl.store(words + run, (start << bits) | cluster, mask=begins != 0)
        keys += tl.sum(size, 0)
        runs += tl.sum(begins, 0)
    tl.store(num_runs + block, runs)
    tl.store(num_keys + block, keys)


@triton.jit
def _work_kernel(q_offsets, num_keys, head_work, head_items, Cq, ITEM_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a head's work, in (query, key) pairs, and its number of items."""
    head = tl.program_id(0).to(tl.int64)
    work = tl.zeros([BLOCK], tl.int64)
    items = tl.zeros([BLOCK], tl.int32)
    for first in range(0, Cq, BLOCK):
        cluster = first + tl.arange(0, BLOCK)
        inside = cluster < Cq
        size = _sizes(q_offsets + head * (Cq + 1), cluster, inside)
        keys = tl.load(num_keys + head * Cq + cluster, mask=inside, other=0)
        work += size.to(tl.int64) * keys
        items += (size + ITEM_ROWS - 1) // ITEM_ROWS
    tl.store(head_work + head, tl.sum(work, 0))
    tl.store(head_items + head, tl.sum(items, 0))


@triton.jit
def _order_kernel(
    q_offsets, num_keys, head_work, head_items, order, first_item, H, Cq,
    ITEM_ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Writes `order` and `first_item` of BLOCK clusters of one head, from its rank and theirs; ties go by index."""
    head = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)
    work = tl.load(head_work + heads, mask=heads < H, other=-1)
    items = tl.load(head_items + heads, mask=heads < H, other=0)
    mine = tl.load(head_work + head)
    earlier = (work > mine) | ((work == mine) & (heads < head))
    slot = tl.sum(earlier.to(tl.int32), 0) * Cq
    item = tl.sum(tl.where(earlier, items, 0), 0)

    cluster = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(num_keys + head * Cq + cluster, mask=cluster < Cq, other=0)
    rank = tl.zeros([BLOCK], tl.int32)
    ahead = tl.zeros([BLOCK], tl.int32)
    for first in range(0, Cq, OTHERS):
        other = first + tl.arange(0, OTHERS)
        inside = other < Cq
        size = _sizes(q_offsets + head * (Cq + 1), other, inside)
        other_keys = tl.load(num_keys + head * Cq + other, mask=inside, other=-1)[None, :]
        longer = (other_keys > keys[:, None]) | ((other_keys == keys[:, None]) & (other[None, :] < cluster[:, None]))
        rank += tl.sum(longer.to(tl.int32), 1)
        ahead += tl.sum(tl.where(longer, ((size + ITEM_ROWS - 1) // ITEM_ROWS)[None, :], 0), 1)
    tl.store(order + slot + rank, (head * Cq + cluster).to(tl.int32), mask=cluster < Cq)
    tl.store(first_item + slot + rank, item + ahead, mask=cluster < Cq)
    if (head == 0) & (tl.program_id(1) == 0):
        tl.store(first_item + H * Cq, tl.sum(items, 0))


@triton.jit
def _sizes(offsets, cluster, inside):
    """Returns the rows of each cluster of a block; 0 outside."""
    first = tl.load(offsets + cluster, mask=inside, other=0)
    return tl.load(offsets + cluster + 1, mask=inside, other=0) - first
