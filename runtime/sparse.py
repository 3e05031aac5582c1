"""The story of one self-attention call: decide, cluster, map, permute, attend, return."""

import zlib

from torch import Tensor

from semvid.parallel.kmeans import random_tokens, refine
from semvid.runtime.cache import Memory
from semvid.runtime.config import cluster_counts
from semvid.runtime.schedule import Decision, Dense, Refresh, decide
from semvid.runtime.session import Session


def decision(session: Session, layer: int) -> Decision:
    """Returns what `layer` does in the current forward pass."""
    here = session.here()
    has_clusters = session.cache.get(layer, here.branch) is not None
    return decide(session.config, step=here.step, steps=here.steps, layer=layer, has_clusters=has_clusters)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, session: Session, layer: int, todo: Decision) -> Tensor:
    """Returns softmax(q·kᵀ/√D)·v over the selected blocks, [H, N, D] in token order and q's dtype.

    Method: Sparse VideoGen2 (arXiv 2505.18875).

    Args:
        q: post-norm, post-rotary queries, [H, N, D], the batch folded into H; k and v likewise.
        k: keys.
        v: values.
        session: clusters of earlier steps come from it, new ones go into it.
        layer: index of the transformer block.
        todo: a Refresh or a Reuse from `decision`.
    """
    assert not isinstance(todo, Dense), "dense calls are the model's own"
    branch = session.here().branch
    memory = session.cache.get(layer, branch)
    if isinstance(todo, Refresh):
        memory = _refresh(q, k, session, layer, todo)
        session.cache.put(layer, branch, memory)
    assert memory is not None, "the schedule reuses only what is there"
    ops, by_query, by_key = session.ops, memory.queries.permutation.order, memory.keys.permutation.order
    queries, keys, values = ops.gather_rows(q, by_query), ops.gather_rows(k, by_key), ops.gather_rows(v, by_key)
    grouped, _ = ops.attention(queries, keys, values, memory.plan)
    out = ops.scatter_rows(grouped, by_query)
    session.meter.count_sparse(memory.density)
    return out


def _refresh(q: Tensor, k: Tensor, session: Session, layer: int, todo: Refresh) -> Memory:
    """Returns new clusters of q and k, in order, and what follows from them: map and plan."""
    ops, config = session.ops, session.config
    queries, keys = refine([q, k], _starts(q, k, session, layer, todo), todo.iterations, ops, session.group)
    block_map = ops.top_p_map(queries.centroids, keys.centroids, keys.sizes, config.p, config.floor)
    density = ops.density(block_map, queries.sizes, keys.sizes)
    plan = ops.plan(queries.permutation.offsets, keys.permutation.offsets, block_map)
    return Memory(queries, keys, plan, density)


def _starts(q: Tensor, k: Tensor, session: Session, layer: int, todo: Refresh) -> list[Tensor]:
    """Returns the centroids that k-means starts from: random tokens, or those of the refresh before."""
    here = session.here()
    if not todo.seeded:
        memory = session.cache.get(layer, here.branch)
        assert memory is not None, "the schedule warm-starts only what is there"
        return [memory.queries.centroids, memory.keys.centroids]
    tokens = q.shape[1]
    key = (session.seed, layer, zlib.crc32(here.branch.encode()), here.step)
    counts = cluster_counts(session.config, tokens)
    return [
        random_tokens(x, C, (*key, side), tokens, group=session.group)
        for side, (x, C) in enumerate(zip((q, k), counts, strict=True))
    ]
