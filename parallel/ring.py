"""Attention over an exchange: queries and keys brought together, one ring row of keys after the other, results home."""

from collections.abc import Callable

from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.parallel.collectives import Arrival, Group
from semvid.parallel.exchange import Exchange
from semvid.parallel.phases import phase

Attend = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(q [G, Nq, D], k, v [G, Nk, D], hop) -> out, lse of the pieces over that hop's keys."""


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
        attend: computes the pieces over one hop's keys.
        ops: the backend.
        group: the ranks that share the sequence.
    """
    first = _depart(k, v, exchange, 0, ops, group)
    queries = exchange.queries.depart(q, ops, group)
    arriving = first
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
            part, part_lse = attend(joined_q, keys, values, number)
            if out is None or lse is None:
                out, lse = part, part_lse
            else:
                out, lse = ops.merge(out, lse, part, part_lse)
    assert out is not None, "an exchange has a hop"
    with phase("return"):
        return exchange.rows_home(exchange.queries.back(out, ops, group)(), ops)


def _arrived(wait: Arrival) -> Tensor:
    with phase("exchange"):
        return wait()


def _depart(k: Tensor, v: Tensor, exchange: Exchange, hop: int, ops: Ops, group: Group) -> tuple[Arrival, Arrival]:
    """Starts the way of one ring row's keys and values."""
    routes = exchange.hops[hop]
    return routes.keys.depart(k, ops, group), routes.values.depart(v, ops, group)
