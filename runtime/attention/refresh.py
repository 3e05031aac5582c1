"""New clusters of one layer and branch, and what follows from them: what stand-ins weigh, map, exchange, plans."""

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semvid.kernels.layout import BlockMap, Clusters, Permutation, Plan
from semvid.parallel import anchors
from semvid.parallel.anchors import Share
from semvid.parallel.budget import Rule, columns, density, find_map
from semvid.parallel.collectives import broadcast_all
from semvid.parallel.direct import Cut, DirectExchange, plan_direct
from semvid.parallel.exchange import Counts, Layout, layout, plan_exchange
from semvid.parallel.kmeans import Refined, over, refine_with
from semvid.parallel.maps import GlobalMap, gather_counts, gather_map, mean_over, pack_bits, sides_of
from semvid.parallel.phases import phase
from semvid.parallel.seeding import random_tokens, spread_tokens
from semvid.parallel.shard import Shard
from semvid.parallel.tail import Weights, squares, weigh
from semvid.runtime.attention.prompt import Prompt
from semvid.runtime.attention.schedule import Refresh, next_interval
from semvid.runtime.attention.session import Session
from semvid.runtime.attention.state import AnyExchange, Changed, Memory
from semvid.runtime.config import check_tokens, cluster_counts, has_anchors, has_tail


class Means(NamedTuple):
    """Mean keys and mean values of all key clusters, over all ranks, fp32 [H, Ck, D]."""

    keys: Tensor
    values: Tensor


def refresh(
    q: Tensor, k: Tensor, v: Tensor, session: Session, layer: int, todo: Refresh
) -> tuple[Memory, Means | None]:
    """Returns new clusters of q and k, in order, with what follows from them, and the means if there is a tail.

    Every rank that shares the sequence must enter; where branches share clusters on several ranks, those of all
    branches: the conditional one makes them and sends them. Prompt tokens are in no cluster (`prompt`).

    Args:
        q: local queries, [H, n, D], in token order, a prompt's after those of the video; k and v likewise.
        k: keys.
        v: values.
        session: says where in the job this is; the refresh before is in its cache.
        layer: index of the transformer block.
        todo: from `decide`.

    Raises:
        ValueError: the sequence can't have the clusters or the density that the configuration asks for.
    """
    video_q, video_k, video_v = (x[:, : x.shape[1] - session.prompt_rows] for x in (q, k, v))
    tokens = _num_tokens(video_q, session)
    # Of a pipeline that is sparsified alone nobody knew before; every rank of both branches refuses alike.
    check_tokens(session.config, tokens, joint=session.prompt is not None)
    before = session.cache.get(layer, session.owner())
    if before is not None and before.counts is not None and before.exchange is None and session.windows is not None:
        # From a checkpoint: the new exchange is cut by its loads, as without the break.
        before = made_ready(q, k, v, session, before)
    interval = 0 if before is None else next_interval(session.config, before.refreshed())
    if session.shared and session.ranks.place.cfg > 0:
        return _received(video_q, session, before)._replace(step=session.here().step, interval=interval), None
    starts = _starts(video_q, video_k, session, layer, todo)
    found, weights, means = _cluster(video_q, video_k, video_v, session, starts, todo, before)
    queries, keys = found.clusters
    rule, bias = _rule(session, tokens), None
    if weights is not None and session.config.selection == "error":
        bias = weights.bias
    memory = _place(q, k, v, session, queries, keys, rule, bias, before)._replace(
        log_n=None if weights is None else weights.log_n,
        step=session.here().step,
        interval=interval,
        drift=None if found.changed is None else Changed(found.changed, _num_labels(video_q, session)),
    )
    memory = _rounded(memory, q.dtype)
    if session.shared and session.ranks.cfg is not None:
        # The ranks of the other branch wait for it in `_received`.
        broadcast_all(_shared_parts(memory), session.ranks.cfg)
    return memory, means


def made_ready(q: Tensor, k: Tensor, v: Tensor, session: Session, memory: Memory) -> Memory:
    """Returns a memory that is not ready with what follows from its labels and map; no collective."""
    with phase("plan"):
        queries, keys = (_ordered(_grouped(side, session), session.prompt) for side in memory[:2])
    memory = memory._replace(queries=queries, keys=keys, ready=True)
    if memory.counts is None:
        with phase("plan"):
            return memory._replace(anchored=_anchored(queries, session))
    whole = _counted(GlobalMap(memory.bits, memory.counts), session.prompt)
    made = _exchanged(q, k, v, session, whole, (queries, keys), memory, memory.cut)
    return memory._replace(**made, cut=None)


def with_orders(session: Session, memory: Memory) -> Memory:
    """Returns a memory with an exchange and with the orders that a call needs beside it: of means."""
    if memory.log_n is None and memory.anchored is None:
        return memory
    with phase("plan"):
        keys = memory.keys if memory.log_n is None else _with_order(memory.keys, session)
        queries = memory.queries if memory.anchored is None else _with_order(memory.queries, session)
    return memory._replace(queries=queries, keys=keys)


def plans_of(memory: Memory, session: Session) -> list[Plan]:
    """Returns what this rank computes: one plan where it has the whole sequence, else one for each hop of the exchange.

    They are made for every call: kept, those of all layers would be as large as everything else that is kept.
    """
    ops, exchange, keys, H = session.ops, memory.exchange, memory.keys, memory.bits.shape[0]
    with phase("plan"):
        heads = torch.arange(H, device=memory.bits.device) if exchange is None else exchange.heads
        block_map = BlockMap(ops.unpack_map(memory.bits, heads, keys.centroids.shape[1]))
        if session.prompt is not None:
            block_map = session.prompt.selected(block_map)
        if memory.anchored is not None:
            block_map = anchors.select_all(block_map, keys.sizes[heads])
        if exchange is not None:
            return [ops.plan(exchange.q_offsets, k_offsets, block_map) for k_offsets in exchange.k_offsets]
        rows = memory.queries.permutation if memory.anchored is None else memory.anchored
        return [ops.plan(rows.offsets, keys.permutation.offsets, block_map)]


def recut(q: Tensor, k: Tensor, v: Tensor, session: Session, memory: Memory) -> Memory:
    """Returns a memory whose work is cut by its own loads where those of the refresh before did so unevenly.

    For the reuses after a refresh, when its loads are on the host: no collective, no wait. Every rank finds the same.
    """
    exchange = memory.exchange
    assert isinstance(exchange, DirectExchange), "others are cut by their own loads"
    assert memory.counts is not None
    if not exchange.is_uneven():
        return memory._replace(counts=None)
    whole = GlobalMap(memory.bits, memory.counts)
    queries, keys = (_with_order(side, session) for side in memory[:2])
    made = _exchanged(q, k, v, session, whole, (queries, keys), memory)
    return memory._replace(queries=queries, keys=keys, **made | {"counts": None})


def _rounded(memory: Memory, dtype: torch.dtype) -> Memory:
    """Returns a memory whose centroids are in the dtype of the tokens, as `assign` reads them.

    All they are kept for is to start from: a refresh labels the same. In bf16 that is 0.5 of 1.5 GiB at Wan 14B 720p.
    """
    queries, keys = (side._replace(centroids=side.centroids.to(dtype)) for side in (memory.queries, memory.keys))
    return memory._replace(queries=queries, keys=keys)


def _is_anchored(session: Session) -> bool:
    """Returns whether the current forward pass has anchors."""
    return has_anchors(session.config, joint=session.prompt is not None)


def share_of_anchors(queries: Clusters, session: Session) -> Share:
    """Returns which of all anchors this rank brings."""
    ranks = session.ranks
    return Share(ranks.shard, ranks.mesh.sequence, queries.centroids.shape[1])


def _rule(session: Session, tokens: int) -> Rule:
    config, density = session.config, session.config.density
    if density is not None and _is_anchored(session):
        # They take their part of it: C rows of all keys and C of this density.
        share = cluster_counts(config, tokens)[0] / tokens
        density = (density - share) / (1 + share)
    head_floor = config.head_floor if density is None else min(config.head_floor, density)
    return Rule(config.p, config.floor, density, head_floor, has_tail(config))


def _cluster(
    q: Tensor, k: Tensor, v: Tensor, session: Session, starts: list[Tensor], todo: Refresh, before: Memory | None
) -> tuple[Refined, Weights | None, Means | None]:
    """Returns clusters, what their stand-ins weigh, and their means; values ride the all-reduce of the last sums."""
    tail = has_tail(session.config)
    riders = [v, squares(k)] if tail else []
    labels = []
    if session.config.refresh == "drift" and before is not None:
        labels = [before.queries.labels, before.keys.labels]
    ops, group = session.ops, session.ranks.sequence
    found = refine_with(
        [q, k],
        starts,
        todo.iterations,
        ops,
        group,
        riders=riders,
        before=labels,
        recordings=session.recordings,
    )
    if not tail:
        return found, None, None
    with phase("means"):
        queries, keys = found.clusters
        values, key_squares = found.sums
        weights = weigh(queries, keys, key_squares)
        if session.config.tail == "first":
            weights = weights._replace(log_n=keys.sizes.float().log())
        return found, weights, Means(keys.centroids, over(values, keys.sizes))


def _place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    session: Session,
    queries: Clusters,
    keys: Clusters,
    rule: Rule,
    bias: Tensor | None,
    before: Memory | None,
) -> Memory:
    """Returns clusters with their map and exchange."""
    prompt = session.prompt
    if session.shard is None:
        return _place_whole(session, queries, keys, rule, bias)
    whole = _counted(gather_map(queries, keys, rule, session.ops, session.ranks, bias), prompt)
    queries, keys = _ordered(queries, prompt), _ordered(keys, prompt)
    share = whole.density()
    if _is_anchored(session):
        share += anchors.cost(whole.counts.keys_computed, session.shard.total)
    made = _exchanged(q, k, v, session, whole, (queries, keys), before)
    return Memory(queries, keys, share, whole.bits, **made)


def _place_whole(session: Session, queries: Clusters, keys: Clusters, rule: Rule, bias: Tensor | None) -> Memory:
    """Returns clusters with their map, where the sequence is whole."""
    ops, prompt = session.ops, session.prompt
    sides = sides_of(queries, keys, bias)
    with phase("map"):
        block_map = find_map(sides, rule, ops, mean_over(keys.sizes.shape[0], None))
        bits = pack_bits(block_map.selected)
        if prompt is not None:
            block_map = prompt.selected(block_map)
            sides = sides._replace(q_sizes=prompt.sized(sides.q_sizes), k_sizes=prompt.sized(sides.k_sizes))
        share = density(block_map, sides, ops, tail=rule.tail)
        if _is_anchored(session):
            share += anchors.cost(columns(block_map, keys.sizes, tail=rule.tail), queries.labels.shape[1])
    queries, keys = _ordered(queries, prompt), _ordered(keys, prompt)
    with phase("plan"):
        return Memory(queries, keys, share, bits, anchored=_anchored(queries, session))


def _with_order(side: Clusters, session: Session) -> Clusters:
    """Returns clusters with the order that they were short of, the prompt's tokens in it."""
    if side.permutation.order.numel() > 0:
        return side
    return _ordered(_grouped(side, session), session.prompt)


def _grouped(side: Clusters, session: Session) -> Clusters:
    """Returns clusters with their order, which `Memory.short` leaves out: it follows from the labels."""
    if side.permutation.order.numel() > 0:
        return side
    labels = side.labels.int()
    return side._replace(labels=labels, permutation=session.ops.group(labels, side.centroids.shape[1]))


def _ordered(side: Clusters, prompt: Prompt | None) -> Clusters:
    """Returns clusters whose order has the prompt's tokens too; labels, centroids and sizes stay the video's."""
    return side if prompt is None else side._replace(permutation=prompt.ordered(side.permutation))


def _counted(whole: GlobalMap, prompt: Prompt | None) -> GlobalMap:
    """Returns a map whose counts have the prompt's tokens too; its bits stay those of video clusters."""
    return whole if prompt is None else whole._replace(counts=prompt.counted(whole.counts))


def _anchored(queries: Clusters, session: Session) -> Permutation | None:
    """Returns the order of this rank's queries and anchors; None without anchors."""
    if not _is_anchored(session):
        return None
    return anchors.order_of(queries, share_of_anchors(queries, session), session.ops)


def _exchanged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    session: Session,
    whole: GlobalMap,
    sides: tuple[Clusters, Clusters],
    before: Memory | None,
    cut: Cut | None = None,
) -> dict[str, Any]:
    """Returns what a memory of a shard has of its map: exchange, order with anchors, and counts while needed."""
    counts, (queries, keys), of_q = whole.counts, sides, layout(q)
    of_queries = _anchored(queries, session)
    if of_queries is not None:
        # As `with_anchors` lays them, head by head; PyTorch's strides take no rows for one.
        counts, of_q = anchors.counted(counts), Layout(max(1, of_queries.order.shape[1]), 1)
    orders = (queries.permutation if of_queries is None else of_queries, keys.permutation)
    with phase("plan"):
        last = None if before is None else before.exchange
        exchange = exchange_of(counts, orders, (of_q, layout(k), layout(v)), session, last, cut)
    kept = whole.counts if isinstance(exchange, DirectExchange) and exchange.early else None
    return {"exchange": exchange, "anchored": of_queries, "counts": kept}


def exchange_of(
    counts: Counts,
    orders: tuple[Permutation, Permutation],
    layouts: tuple[Layout, Layout, Layout],
    session: Session,
    before: AnyExchange | None = None,
    cut: Cut | None = None,
) -> AnyExchange:
    """Returns the plan of one layer's exchange: through windows where there are some, else by collectives.

    Args:
        counts: gathered.
        orders: of this rank's queries and keys.
        layouts: of q, k and v.
        session: of a sharded transformer.
        before: that of the refresh before.
        cut: that of a checkpoint, for windows.
    """
    ranks, ops, place_work = session.ranks, session.ops, session.place_work
    if session.windows is None:
        return plan_exchange(counts, orders, layouts, ranks, ops, place_work)
    last = before if isinstance(before, DirectExchange) else None
    return plan_direct(counts, orders, ranks, ops, place_work, last, cut)


def _starts(q: Tensor, k: Tensor, session: Session, layer: int, todo: Refresh) -> list[Tensor]:
    """Returns the centroids that k-means starts from: tokens, or those of an earlier refresh."""
    group, config = session.ranks.sequence, session.config
    if not todo.seeded:
        memory = session.cache.get(layer, session.owner())
        assert memory is not None, "the schedule warm-starts only what is there"
        return [memory.queries.centroids.float(), memory.keys.centroids.float()]
    shard = session.shard or Shard(rank=0, ranks=1, total=q.shape[1])
    key = (session.seed, layer, zlib.crc32(session.owner().encode()), session.here().step)
    draw = spread_tokens if config.seeding == "spread" else random_tokens
    counts = cluster_counts(config, shard.total)
    with phase("seed"):
        return [
            draw(x, C, (*key, side), shard.total, shard.first, group, session.first_head)
            for side, (x, C) in enumerate(zip((q, k), counts, strict=True))
        ]


def _num_tokens(q: Tensor, session: Session) -> int:
    """Returns the tokens of the whole sequence."""
    return q.shape[1] if session.shard is None else session.shard.total


def _num_labels(q: Tensor, session: Session) -> int:
    """Returns how many labels queries and keys of all heads have, over all ranks."""
    return 2 * q.shape[0] * _num_tokens(q, session)


def _shared_parts(memory: Memory) -> list[Tensor]:
    """Returns what the ranks of the other branch make the same memory of."""
    sides = [part for side in (memory.queries, memory.keys) for part in side[:3]]
    extra = [] if memory.log_n is None else [memory.log_n]
    drift = [memory.drift.count] if isinstance(memory.drift, Changed) else []
    return [*sides, memory.density, memory.bits, *extra, *drift]


def _received(q: Tensor, session: Session, before: Memory | None) -> Memory:
    """Returns the memory that the conditional branch's rank with the same shard has just made.

    Every rank of both branches must enter, that one with its `_shared_parts`.
    """
    ops, ranks, (H, n, D) = session.ops, session.ranks, q.shape
    tokens = _num_tokens(q, session)
    tail, counted = has_tail(session.config), session.config.refresh == "drift" and before is not None
    Cq, Ck = cluster_counts(session.config, tokens)
    shapes = [((H, n), torch.int32), ((H, Cq, D), q.dtype), ((H, Cq), torch.int32)]
    shapes += [((H, n), torch.int32), ((H, Ck, D), q.dtype), ((H, Ck), torch.int32)]
    shapes += [((H,), torch.float32), ((H, Cq, -(-Ck // 8)), torch.uint8)]
    shapes += [((H, Ck), torch.float32)] * tail + [((1,), torch.int32)] * counted
    room = [torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in shapes]
    parts = broadcast_all(room, ranks.cfg)
    queries = Clusters(parts[0], parts[1], parts[2], ops.group(parts[0], Cq))
    keys = Clusters(parts[3], parts[4], parts[5], ops.group(parts[3], Ck))
    memory = Memory(queries, keys, parts[6], parts[7], log_n=parts[8] if tail else None, ready=False)
    if counted:
        memory = memory._replace(drift=Changed(parts[-1], _num_labels(q, session)))
    if session.shard is None:
        return memory
    block_map = BlockMap(ops.unpack_map(parts[7], torch.arange(H, device=q.device), Ck))
    computed = columns(block_map, keys.sizes, tail=tail)
    # The exchange of the refresh before is what the new one's cuts are made from.
    last = None if before is None else before.exchange
    gathered = gather_counts(queries, keys, ranks.sequence)
    return memory._replace(counts=Counts(*gathered, computed), exchange=last)
