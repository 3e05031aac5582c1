"""Attention over an exchange: queries and keys brought together, one ring row of keys after the other, results home."""

from typing import Protocol

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.parallel.collectives import Arrival, Group
from semvid.parallel.exchange import Exchange, Route, flat_rows
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
    q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, attend: Attend, ops: Ops, windows: Windows
) -> Tensor:
    """Returns what `attend_exchanged` does, each row moved once; every rank of the sequence must enter.

    Args:
        q: local queries, [H, n, D], in token order; k and v likewise.
        k: keys.
        v: values.
        exchange: of this layer, direct.
        attend: computes the pieces.
        ops: the backend.
        windows: of the ranks that share the sequence.
    """
    me, (hop,) = windows.ranks.shard, exchange.hops
    views = windows.views(*exchange.room, q)
    with phase("exchange"):
        for route, x, name in ((hop.keys, k, "keys"), (hop.values, v, "values"), (exchange.queries, q, "queries")):
            rows = flat_rows(x)
            for rank, part in _others_first(route, me):
                ops.copy_rows(rows, route.source[:, part], getattr(views[rank], name), route.target[:, part])
    with phase("wait"):
        windows.barrier()
    with phase("attend"):
        own, route = views[me], exchange.queries
        keys, values = _used(own.keys, hop.keys), _used(own.values, hop.values)
        attend(_used(own.queries, route), keys, values, 0, _used(own.results, route))
    with phase("wait"):
        windows.barrier()
    with phase("return"):
        home = torch.empty(1, exchange.q_rows * exchange.num_heads, q.shape[2], dtype=q.dtype, device=q.device)
        for rank, part in _others_first(route, me):
            ops.copy_rows(views[rank].results, route.target[:, part], home, exchange.home[:, part])
        return home.view(exchange.q_rows, exchange.num_heads, q.shape[2]).transpose(0, 1)


def _used(view: Tensor, route: Route) -> Tensor:
    """Returns the part of a window that this rank's pieces take, [pieces, rows, D]."""
    return view[0, : route.pieces * route.rows].view(route.pieces, route.rows, view.shape[2])


def _others_first(route: Route, me: int) -> list[tuple[int, slice]]:
    """Returns each rank with its rows of `source`: from the next one round to this one, so that all links are busy."""
    ends = [sum(route.sent[: rank + 1]) for rank in range(len(route.sent))]
    turn = [(me + 1 + i) % len(ends) for i in range(len(ends))]
    return [(rank, slice(ends[rank] - route.sent[rank], ends[rank])) for rank in turn]


def _depart(k: Tensor, v: Tensor, exchange: Exchange, hop: int, ops: Ops, group: Group) -> tuple[Arrival, Arrival]:
    """Starts the way of one ring row's keys and values."""
    routes = exchange.hops[hop]
    return routes.keys.depart(k, ops, group), routes.values.depart(v, ops, group)


def _arrived(wait: Arrival) -> Tensor:
    with phase("exchange"):
        return wait()
