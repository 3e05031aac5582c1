"""The story of one self-attention call: decide, cluster, map, permute, exchange, attend, return."""

import torch
from torch import Tensor

from semvid.kernels.dense import dense_pieces
from semvid.kernels.layout import Permutation, Tail
from semvid.parallel.anchors import corrected, with_anchors
from semvid.parallel.direct import DirectExchange
from semvid.parallel.exchange import Counts, layout
from semvid.parallel.kmeans import means_of
from semvid.parallel.phases import phase
from semvid.parallel.ring import Attend, attend_exchanged, attend_through_windows
from semvid.parallel.shard import Shard
from semvid.parallel.tail import stand_ins
from semvid.runtime.attention.prompt import Prompt
from semvid.runtime.attention.refresh import (
    Means,
    exchange_of,
    made_ready,
    plans_of,
    recut,
    refresh,
    share_of_anchors,
    with_orders,
)
from semvid.runtime.attention.schedule import Decision, Dense, Refresh, Reuse, decide
from semvid.runtime.attention.session import Session
from semvid.runtime.attention.state import AnyExchange, Memory


def decision(session: Session, layer: int) -> Decision:
    """Returns what `layer` does in the current forward pass."""
    here = session.here()
    memory = session.cache.get(layer, session.owner())
    if memory is not None and memory.step == here.step:
        # Of the other branch, in this very step: its drift is not to be waited for.
        return Reuse()
    last = None if memory is None else memory.refreshed()
    return decide(session.config, step=here.step, steps=here.steps, layer=layer, last=last)


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
    branch = session.owner()
    memory, means = session.cache.get(layer, branch), None
    if isinstance(todo, Refresh):
        memory, means = (session.renew or refresh)(q, k, v, session, layer, todo)
        session.cache.put(layer, branch, memory)
    assert memory is not None, "the schedule reuses only what is there"
    if not memory.ready:
        memory = made_ready(q, k, v, session, memory)
        if memory.exchange is not None:
            session.cache.put(layer, branch, memory)
    if memory.counts is not None and isinstance(todo, Reuse):
        memory = recut(q, k, v, session, memory)
        session.cache.put(layer, branch, memory)
    if memory.exchange is not None:
        memory = with_orders(session, memory)
    session.meter.count_sparse(memory.density)
    tail = _tail(k, v, session, memory, means)
    if memory.anchored is None:
        out = _attend(q, k, v, session, memory, tail)
    else:
        out = _attend_with_anchors(q, k, v, session, memory, tail)
    if session.probe is not None:
        session.probe(layer, q, k, v, out, memory)
    return out


def _attend_with_anchors(
    q: Tensor, k: Tensor, v: Tensor, session: Session, memory: Memory, tail: Tail | None
) -> Tensor:
    """Returns attention as `_attend`, each row with what the anchor of its query cluster lacks."""
    ops, group, queries = session.ops, session.ranks.sequence, memory.queries
    share = share_of_anchors(queries, session)
    rows = with_anchors(q, queries, share, ops, group)
    out = _attend(rows, k, v, session, memory, tail)
    with phase("anchors"):
        return corrected(out, queries, share, ops, group)


def _attend(q: Tensor, k: Tensor, v: Tensor, session: Session, memory: Memory, tail: Tail | None) -> Tensor:
    """Returns attention over the selected blocks and the tail, [H, n, D]."""
    ops, plans = session.ops, plans_of(memory, session)
    if memory.exchange is not None:

        def attend(q: Tensor, k: Tensor, v: Tensor, hop: int, out: Tensor | None) -> tuple[Tensor, Tensor]:
            # The hops' results are merged, so stand-ins come in one of them.
            return ops.attention(q, k, v, plans[hop], out=out, tail=tail if hop == 0 else None)

        return _across(q, k, v, memory.exchange, attend, session)
    by_query = (memory.queries.permutation if memory.anchored is None else memory.anchored).order
    by_key = memory.keys.permutation.order
    with phase("pack"):
        queries, keys, values = ops.gather_rows(q, by_query), ops.gather_rows(k, by_key), ops.gather_rows(v, by_key)
    with phase("attend"):
        grouped, _ = ops.attention(queries, keys, values, plans[0], tail=tail)
    with phase("return"):
        return ops.scatter_rows(grouped, by_query)


def _tail(k: Tensor, v: Tensor, session: Session, memory: Memory, means: Means | None) -> Tail | None:
    """Returns the stand-ins of this rank's pieces; one all-reduce where the labels are of an earlier step.

    Their means are those of this step's keys and values in every step: under kept labels clusters stay good for many
    steps, means do not.
    """
    if memory.log_n is None:
        return None
    if means is None:
        means = Means(*means_of([k, v], memory.keys, session.ops, session.ranks.sequence))
    heads = None if memory.exchange is None else memory.exchange.heads
    tail = stand_ins(*means, memory.log_n, heads)
    return tail if session.prompt is None else session.prompt.stood_in(tail)


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
    with_lse = len(exchange.k_offsets) > 1

    def attend(q: Tensor, k: Tensor, v: Tensor, hop: int, out: Tensor | None) -> tuple[Tensor, Tensor]:
        return dense_pieces(q, k, v, rows, with_lse=with_lse, out=out)

    return _across(q, k, v, exchange, attend, session)


def _across(q: Tensor, k: Tensor, v: Tensor, exchange: AnyExchange, attend: Attend, session: Session) -> Tensor:
    """Returns attention across the ranks that share the sequence, by the fastest way they have, [H, n, D]."""
    if isinstance(exchange, DirectExchange):
        assert session.windows is not None
        return attend_through_windows(q, k, v, exchange, attend, session.ops, session.windows)
    if exchange.layouts != (layout(q), layout(k), layout(v)):
        raise ValueError("q, k or v lies otherwise in memory than when the clusters were made; reset() begins anew")
    return attend_exchanged(q, k, v, exchange, attend, session.ops, session.ranks.sequence)


def _dense_exchange(q: Tensor, k: Tensor, v: Tensor, session: Session) -> AnyExchange:
    """Returns the exchange of dense calls of these sizes, planned at the first of them."""
    shard, layouts = session.shard, (layout(q), layout(k), layout(v))
    assert shard is not None, "a whole sequence needs no exchange"
    place = (shard, session.prompt, q.shape[0], layouts)
    found = session.cache.dense.get(place)
    if found is None:
        found = exchange_of(*_one_cluster(shard, session.prompt, q), layouts, session)
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
