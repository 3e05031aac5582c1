"""Attention over an exchange: queries and keys brought together, one ring row of keys after the other, results home."""

from typing import Protocol

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.parallel.collectives import Arrival, Group
from semvid.parallel.direct import DirectExchange
from semvid.parallel.exchange import Exchange
from semvid.parallel.phases import phase
from semvid.parallel.windows import Windows


class Attend(Protocol):
    """Computes the pieces [G, Nq, D] of a rank over one hop's keys and values [G, Nk, D], and returns out and lse."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, hop: int, out: Tensor | None) -> tuple[Tensor, Tensor]: ...


def attend_exchanged(
    q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, attend: Attend, ops: Ops, group: Group
) -> Tensor:
    """Returns attention of the local queries over the keys of every shard, [H, n, D]; every rank of `group` must enter.

    While the rows of one tensor travel, those of the next are packed; while one ring row's keys are attended, those of
    the next travel. The result is a view of memory in the order [n, H, D].

    Args:
        q: local queries, [H, n, D], in token order; k and v likewise.
        k: keys.
        v: values.
        exchange: of this layer.
        attend: computes the pieces.
        ops: the backend.
        group: the ranks that share the sequence.
    """
    arriving = _depart(k, v, exchange, 0, ops, group)
    queries = exchange.queries.depart(q, ops, group)
    out = lse = joined_q = None
    for number, hop in enumerate(exchange.hops):
        keys, values = (
            route.join(_arrived(wait), ops) for route, wait in zip((hop.keys, hop.values), arriving, strict=True)
        )
        if joined_q is None:
            joined_q = exchange.queries.join(_arrived(queries), ops)
        if number + 1 < len(exchange.hops):
            arriving = _depart(k, v, exchange, number + 1, ops, group)
        with phase("attend"):
            part, part_lse = attend(joined_q, keys, values, number, None)
            if out is None or lse is None:
                out, lse = part, part_lse
            else:
                out, lse = ops.merge(out, lse, part, part_lse)
    assert out is not None, "an exchange has a hop"
    with phase("return"):
        return exchange.rows_home(exchange.queries.back(out, ops, group)(), ops)


def attend_through_windows(
    q: Tensor, k: Tensor, v: Tensor, exchange: DirectExchange, attend: Attend, ops: Ops, windows: Windows
) -> Tensor:
    """Returns what `attend_exchanged` does, each row moved once; every rank of the sequence must enter.

    Args:
        q: local queries, [H, n, D], in token order; k and v likewise.
        k: keys.
        v: values.
        exchange: of this layer.
        attend: computes the pieces.
        ops: the backend.
        windows: of the ranks that share the sequence.
    """
    (H, n, D), me, G = q.shape, windows.ranks.shard, len(exchange.pieces)
    far = windows.views(*exchange.room, q)
    with phase("exchange"):
        of_keys = exchange.keys
        for x, way, blocks in ((k, of_keys, far.keys), (v, of_keys, far.values), (q, exchange.queries, far.queries)):
            ops.scatter_among(x, way, blocks)
    with phase("wait"):
        windows.barrier()
    with phase("attend"):
        own_q, own_k, own_v, own_out = (blocks.blocks[me][0] for blocks in far)
        of_q, of_k = exchange.piece_rows
        keys, values = (x[: G * of_k].view(G, of_k, D) for x in (own_k, own_v))
        queries, results = (x[: G * of_q].view(G, of_q, D) for x in (own_q, own_out))
        attend(queries, keys, values, 0, results)
    with phase("wait"):
        windows.barrier()
    with phase("return"):
        # As the model wants results: tokens first.
        home = torch.empty(n, H, D, dtype=q.dtype, device=q.device).transpose(0, 1)
        ops.gather_among(far.results, exchange.queries, home)
        return home


def _depart(k: Tensor, v: Tensor, exchange: Exchange, hop: int, ops: Ops, group: Group) -> tuple[Arrival, Arrival]:
    """Starts the way of one ring row's keys and values."""
    routes = exchange.hops[hop]
    return routes.keys.depart(k, ops, group), routes.values.depart(v, ops, group)


def _arrived(wait: Arrival) -> Tensor:
    with phase("exchange"):
        return wait()
