"""The story of one self-attention call: decide, cluster, map, permute, exchange, attend, return."""

import zlib

import torch
from torch import Tensor

from semvid.kernels.dense import dense_pieces
from semvid.kernels.layout import BlockMap, Clusters, Permutation, Plan
from semvid.parallel.exchange import Counts, Exchange, layout, plan_exchange
from semvid.parallel.kmeans import random_tokens, refine
from semvid.parallel.maps import GlobalMap, gather_map, pack_bits
from semvid.parallel.phases import phase
from semvid.parallel.ring import Attend, attend_exchanged, attend_through_windows
from semvid.parallel.shard import Shard
from semvid.runtime.cache import Memory
from semvid.runtime.config import cluster_counts
from semvid.runtime.prompt import Prompt
from semvid.runtime.schedule import Decision, Dense, Refresh, decide
from semvid.runtime.session import Session


def decision(session: Session, layer: int) -> Decision:
    """Returns what `layer` does in the current forward pass."""
    here = session.here()
    has_clusters = session.cache.get(layer, here.branch) is not None
    return decide(session.config, step=here.step, steps=here.steps, layer=layer, has_clusters=has_clusters)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, session: Session, layer: int, todo: Decision) -> Tensor:
    """Returns softmax(q·kᵀ/√D)·v over the selected blocks, [H, n, D] in token order and q's dtype.

    Method: Sparse VideoGen2 (arXiv 2505.18875). Under sequence parallelism n is this rank's tokens, clusters and map
    are those of the whole sequence, and every rank that shares it must call.

    Args:
        q: post-norm, post-rotary queries of this rank's tokens, without padding, [H, n, D], the batch folded into H;
            k and v likewise.
        k: keys.
        v: values.
        session: clusters of earlier steps come from it, new ones go into it.
        layer: index of the transformer block.
        todo: a Refresh or a Reuse from `decision`.
    """
    assert not isinstance(todo, Dense), "dense calls are the model's own"
    branch, ops = session.here().branch, session.ops
    memory = session.cache.get(layer, branch)
    if isinstance(todo, Refresh):
        memory = _refresh(q, k, v, session, layer, todo)
        session.cache.put(layer, branch, memory)
    assert memory is not None, "the schedule reuses only what is there"
    if not memory.plans:
        memory = _plan_again(q, k, v, session, memory)
        session.cache.put(layer, branch, memory)
    session.meter.count_sparse(memory.density)
    if memory.exchange is not None:
        plans = memory.plans
        return _across(
            q, k, v, memory.exchange, lambda q, k, v, hop, out: ops.attention(q, k, v, plans[hop], out=out), session
        )
    by_query, by_key = memory.queries.permutation.order, memory.keys.permutation.order
    with phase("pack"):
        queries, keys, values = ops.gather_rows(q, by_query), ops.gather_rows(k, by_key), ops.gather_rows(v, by_key)
    with phase("attend"):
        grouped, _ = ops.attention(queries, keys, values, memory.plans[0])
    with phase("return"):
        return ops.scatter_rows(grouped, by_query)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, session: Session) -> Tensor:
    """Returns softmax(q·kᵀ/√D)·v over the whole sequence, [H, n, D], where every rank has a shard of it.

    The exchange is that of the sparse calls, with one cluster a head: heads are shared equally, parts of heads too
    where their number does not divide. Every rank that shares the sequence must call.

    Args:
        q: post-norm, post-rotary queries of this rank's tokens, without padding, [H, n, D]; k and v likewise.
        k: keys.
        v: values.
        session: of a sharded transformer.
    """
    exchange = _dense_exchange(q, k, v, session)
    rows = [piece.last - piece.first for piece in exchange.pieces]
    with_lse = len(exchange.hops) > 1

    def attend(q: Tensor, k: Tensor, v: Tensor, hop: int, out: Tensor | None) -> tuple[Tensor, Tensor]:
        return dense_pieces(q, k, v, rows, with_lse=with_lse, out=out)

    return _across(q, k, v, exchange, attend, session)


def _across(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, attend: Attend, session: Session) -> Tensor:
    """Returns attention across the ranks that share the sequence, by the fastest way they have, [H, n, D]."""
    if exchange.layouts != (layout(q), layout(k), layout(v)):
        raise ValueError("q, k or v lies otherwise in memory than when the clusters were made; reset() begins anew")
    if exchange.direct:
        assert session.windows is not None
        return attend_through_windows(q, k, v, exchange, attend, session.ops, session.windows)
    return attend_exchanged(q, k, v, exchange, attend, session.ops, session.ranks.sequence)


def _refresh(q: Tensor, k: Tensor, v: Tensor, session: Session, layer: int, todo: Refresh) -> Memory:
    """Returns new clusters of q and k, in order, and what follows from them: map, plans, exchange."""
    ops, config, ranks = session.ops, session.config, session.ranks
    video = [x[:, : x.shape[1] - session.prompt_rows] for x in (q, k)]
    queries, keys = refine(video, _starts(video, session, layer, todo), todo.iterations, ops, ranks.sequence)
    if session.shard is None:
        with phase("map"):
            block_map = ops.top_p_map(queries.centroids, keys.centroids, keys.sizes, config.p, config.floor)
        return _planned(queries, keys, block_map, session)
    whole = gather_map(queries, keys, config.p, config.floor, ops, ranks)
    return _planned_across(q, k, v, session, whole, queries, keys)


def _planned(queries: Clusters, keys: Clusters, block_map: BlockMap, session: Session) -> Memory:
    """Returns the memory of clusters and a map where the sequence is whole."""
    ops, prompt, bits = session.ops, session.prompt, None
    sizes = [queries.sizes, keys.sizes]
    if prompt is not None:
        bits = pack_bits(block_map.selected)
        block_map, sizes = prompt.selected(block_map), [prompt.sized(x) for x in sizes]
        queries, keys = (x._replace(permutation=prompt.ordered(x.permutation)) for x in (queries, keys))
    with phase("map"):
        density = ops.density(block_map, *sizes)
    with phase("plan"):
        plan = ops.plan(queries.permutation.offsets, keys.permutation.offsets, block_map)
    return Memory(queries, keys, density, [plan], bits=bits)


def _planned_across(
    q: Tensor, k: Tensor, v: Tensor, session: Session, whole: GlobalMap, queries: Clusters, keys: Clusters
) -> Memory:
    """Returns the memory of clusters and a map where the sequence is shared."""
    if session.prompt is not None:
        whole = whole._replace(counts=session.prompt.counted(whole.counts))
        queries, keys = (x._replace(permutation=session.prompt.ordered(x.permutation)) for x in (queries, keys))
    exchange, plans = _plan_across(q, k, v, session, whole, queries, keys)
    return Memory(queries, keys, whole.density(), plans, exchange, whole.bits)


def _plan_across(
    q: Tensor, k: Tensor, v: Tensor, session: Session, whole: GlobalMap, queries: Clusters, keys: Clusters
) -> tuple[Exchange, list[Plan]]:
    """Returns the exchange of a map and what this rank computes of it, hop by hop."""
    ops, orders = session.ops, (queries.permutation, keys.permutation)
    with phase("plan"):
        layouts, direct = (layout(q), layout(k), layout(v)), session.windows is not None
        exchange = plan_exchange(whole.counts, orders, layouts, session.ranks, ops, session.place_work, direct=direct)
        block_map = BlockMap(whole.selected(exchange.heads, ops))
        if session.prompt is not None:
            block_map = session.prompt.selected(block_map)
        return exchange, [ops.plan(exchange.q_offsets, hop.offsets, block_map) for hop in exchange.hops]


def _plan_again(q: Tensor, k: Tensor, v: Tensor, session: Session, memory: Memory) -> Memory:
    """Returns a memory from a checkpoint with what follows from its labels and map; no collective."""
    ops, (queries, keys) = session.ops, memory[:2]
    Ck = keys.centroids.shape[1]
    assert memory.bits is not None, "a checkpoint has the map"
    if memory.counts is not None:
        return _planned_across(q, k, v, session, GlobalMap(memory.bits, Ck, memory.counts), queries, keys)
    block_map = BlockMap(ops.unpack_map(memory.bits, torch.arange(q.shape[0], device=q.device), Ck))
    return _planned(queries, keys, block_map, session)


def _starts(video: list[Tensor], session: Session, layer: int, todo: Refresh) -> list[Tensor]:
    """Returns the centroids that k-means starts from: random tokens, or those of the refresh before."""
    here, group = session.here(), session.ranks.sequence
    if not todo.seeded:
        memory = session.cache.get(layer, here.branch)
        assert memory is not None, "the schedule warm-starts only what is there"
        return [memory.queries.centroids, memory.keys.centroids]
    shard = session.shard or Shard(rank=0, ranks=1, total=video[0].shape[1])
    key = (session.seed, layer, zlib.crc32(here.branch.encode()), here.step)
    counts = cluster_counts(session.config, shard.total)
    return [
        random_tokens(x, C, (*key, side), shard.total, shard.first, group, session.first_head)
        for side, (x, C) in enumerate(zip(video, counts, strict=True))
    ]


def _dense_exchange(q: Tensor, k: Tensor, v: Tensor, session: Session) -> Exchange:
    """Returns the exchange of dense calls of these sizes, planned at the first of them."""
    shard, layouts = session.shard, (layout(q), layout(k), layout(v))
    assert shard is not None, "a whole sequence needs no exchange"
    place = (shard, session.prompt, q.shape[0], layouts)
    found = session.cache.dense.get(place)
    if found is None:
        found = plan_exchange(
            *_one_cluster(shard, session.prompt, q),
            layouts,
            session.ranks,
            session.ops,
            session.place_work,
            direct=session.windows is not None,
        )
        session.cache.dense[place] = found
    return found


def _one_cluster(shard: Shard, prompt: Prompt | None, x: Tensor) -> tuple[Counts, tuple[Permutation, Permutation]]:
    """Returns counts and orders as if all tokens of a head of x, [H, n, D], were one cluster."""
    H, n, _ = x.shape
    tokens = torch.tensor(shard.all_tokens(), dtype=torch.int32, device=x.device)
    if prompt is not None:
        tokens += torch.tensor(prompt.of_shards(), dtype=torch.int32, device=x.device)
    counts = tokens[:, None, None].expand(-1, H, 1)
    order = torch.arange(n, dtype=torch.int32, device=x.device).expand(H, n).contiguous()
    offsets = torch.tensor([0, n], dtype=torch.int32, device=x.device).expand(H, 2)
    computed = tokens.sum(dtype=torch.int32).expand(H, 1)
    return Counts(counts, counts, computed), (Permutation(order, offsets),) * 2
