"""Sequence shards <-> heads and parts of heads: which rows go where, planned from gathered whole numbers alone.

Every rank clusters the tokens of its shard. It then sends each rank of its ring row the query rows of that rank's
pieces, and each rank of any row the key and value rows of the heads that rank holds a piece of. Rows leave in the order
of their labels, so packing them for the network is the permutation; on arrival they are P slivers of every cluster, and
one pass lays those together, so that attention sees one run a cluster. Results take the same way back.

Keys and values of another ring row than the rank's own come one row at a time (`Hop`): the next is on its way while one
is attended. They come from where they are, not through the ring's neighbours: every row cuts its own line of work, so
two rows hold different heads on the same place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import Permutation
from semvid.parallel.arrival import OnItsWay
from semvid.parallel.balance import Ints, Piece, balance
from semvid.parallel.collectives import Arrival, Group, all_to_all_rows
from semvid.parallel.itinerary import Placement, draw_up
from semvid.parallel.phases import phase
from semvid.parallel.ranks import Ranks


class Layout(NamedTuple):
    """How [H, n, D] rows lie in memory, counted in rows of D."""

    head: int
    token: int


class Counts(NamedTuple):
    """What the plan reads, the same on every rank."""

    queries: Tensor
    """int32 [P, H, Cq]: each shard's tokens in each query cluster."""
    keys: Tensor
    """int32 [P, H, Ck]: each shard's tokens in each key cluster."""
    keys_computed: Tensor
    """int32 [H, Cq]: keys that each query cluster computes, over all shards."""


@dataclass(frozen=True, slots=True)
class Route:
    """One movement of rows between the ranks of a sequence, and back."""

    source: Tensor
    """int32 [1, rows sent]: the row of the flat local tensor, for rank 0, then rank 1, …"""
    sent: list[int]
    """Rows for each rank."""
    received: list[int]
    """Rows from each rank."""
    target: Tensor
    """int32 [1, rows received]: where each arriving row belongs in [pieces · rows]."""
    pieces: int
    rows: int
    """Rows of a piece in the joined tensor; a piece may use fewer."""

    def depart(self, x: Tensor, ops: Ops, group: Group) -> Arrival:
        """Packs the rows of x, [H, n, D], sends them and returns what waits for those that come."""
        with phase("pack"):
            packed = ops.gather_rows(flat_rows(x), self.source)
        return all_to_all_rows(packed[0], self.sent, self.received, group)

    def join(self, arrived: Tensor, ops: Ops) -> Tensor:
        """Returns arrived rows as [pieces, rows, D], each cluster one run; rows beyond a piece's own are undefined."""
        with phase("join"):
            joined = ops.scatter_rows(arrived[None], self.target, self.pieces * self.rows)
        return joined.view(self.pieces, self.rows, arrived.shape[1])

    def back(self, x: Tensor, ops: Ops, group: Group) -> Arrival:
        """Sends the rows of x, [pieces, rows, D], the opposite way; they arrive in the order of `source`."""
        packed = ops.gather_rows(x.reshape(1, self.pieces * self.rows, x.shape[2]), self.target)
        return all_to_all_rows(packed[0], self.received, self.sent, group)


@dataclass(frozen=True, slots=True)
class Hop:
    """Keys and values of one ring row on their way to all ranks."""

    keys: Route
    values: Route
    offsets: Tensor
    """int32 [pieces, Ck + 1]: the runs of the key clusters of that row."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What this rank sends, receives and computes in one layer; kept while its map is reused."""

    pieces: list[Piece]
    """This rank's share of the work."""
    heads: Tensor
    """int64 [pieces]: the head of each."""
    queries: Route
    q_offsets: Tensor
    """int32 [pieces, Cq + 1]: the runs of each piece's query clusters; most are empty in a part of a head."""
    home: Tensor
    """int32 [1, rows]: where each returning row belongs in [q_rows, H] rows."""
    hops: list[Hop]
    """The own ring row first."""
    q_rows: int
    """Of q on this rank: its tokens, and anchors."""
    num_heads: int
    layouts: tuple[Layout, Layout, Layout]
    """How q, k and v lay in memory when it was planned, and must lie."""

    @property
    def k_offsets(self) -> list[Tensor]:
        """The runs of the key clusters of each hop."""
        return [hop.offsets for hop in self.hops]

    def rows_sent(self, rank: int) -> int:
        """Returns how many rows rank `rank`, this one, sends to others: q, k and v there, out back."""
        routes = [self.queries, *(route for hop in self.hops for route in (hop.keys, hop.values))]
        there = sum(sum(route.sent) - route.sent[rank] for route in routes)
        return there + sum(self.queries.received) - self.queries.received[rank]

    def rows_home(self, returned: Tensor, ops: Ops) -> Tensor:
        """Returns rows that came back as [H, q_rows, D], a view of memory in the order [q_rows, H, D]."""
        rows = ops.scatter_rows(returned[None], self.home, self.q_rows * self.num_heads)
        return rows.view(self.q_rows, self.num_heads, returned.shape[1]).transpose(0, 1)


def flat_rows(x: Tensor) -> Tensor:
    """Returns [H, n, D] as its rows in memory, [1, rows, D]; row h · head + i · token of its `layout` is x[h, i]."""
    head, token = layout(x)
    H, n, D = x.shape
    rows = 0 if x.numel() == 0 else (H - 1) * head + (n - 1) * token + 1
    return x.as_strided((1, rows, D), (rows * D, D, 1))


def layout(x: Tensor) -> Layout:
    """Returns how the rows of x, [H, n, D], lie in memory.

    Raises:
        ValueError: a row is not contiguous, or heads or tokens are not whole rows apart.
    """
    D = x.shape[2]
    if x.numel() and (x.stride(2) != 1 or x.stride(0) % D or x.stride(1) % D):
        raise ValueError(f"rows of {D} must lie whole in memory, strides are {x.stride()}")
    return Layout(x.stride(0) // D, x.stride(1) // D)


def plan_exchange(
    counts: Counts,
    permutations: tuple[Permutation, Permutation],
    layouts: tuple[Layout, Layout, Layout],
    ranks: Ranks,
    ops: Ops,
    place_work: Placement = balance,
) -> Exchange:
    """Returns the exchange of one layer. One host synchronisation, for the counts; no collective.

    Args:
        counts: gathered; see `Counts`.
        permutations: this rank's order of its queries and of its keys.
        layouts: of q, k and v.
        ranks: the mesh and this rank's place on it.
        ops: the backend.
        place_work: cuts the work of a ring row into parts.
    """
    # Every head has every token.
    k_tokens = counts.keys[:, :1].sum((1, 2), dtype=torch.int32)
    q_counts, k_tokens_there, keys_computed = _on_host([counts.queries, k_tokens, counts.keys_computed])
    with phase("plan on host", on_host=True):
        plan = draw_up(q_counts, k_tokens_there, keys_computed, ranks, place_work)
    mesh, place, H = ranks.mesh, ranks.place, counts.queries.shape[1]
    legs = [plan.queries, *plan.keys]
    tables = on_device([x for leg in legs for x in (leg.spans, leg.pieces, leg.begins)], counts.queries)
    # Values lie as the model left them, results as the model wants them: tokens first.
    steps = [(layouts[0], Layout(1, H)), *[layouts[1:]] * mesh.ring]
    orders = [permutations[0].order, *[permutations[1].order] * mesh.ring]
    rows = [place.ring, *((place.ring + hop) % mesh.ring for hop in range(mesh.ring))]
    sides = [counts.queries, *[counts.keys] * mesh.ring]
    made = []
    for i, leg in enumerate(legs):
        spans, pieces, begins = tables[3 * i : 3 * i + 3]
        sources = ops.source_rows(orders[i], spans, sum(leg.sent), *steps[i])
        of_row = sides[i][rows[i] * mesh.ulysses : (rows[i] + 1) * mesh.ulysses]
        target, offsets = ops.target_rows(of_row, pieces, begins, 0, sum(leg.received), leg.most)
        routes = [Route(source, leg.sent, leg.received, target, len(pieces), leg.rows) for source in sources]
        made.append((routes, offsets))
    ((queries, home), q_offsets), *hops = made
    return Exchange(
        plan.pieces,
        tables[1][:, 0],
        queries,
        q_offsets,
        home.source,
        [Hop(keys, values, offsets) for (keys, values), offsets in hops],
        plan.q_rows,
        H,
        layouts,
    )


def on_device(tables: Sequence[Ints], like: Tensor) -> list[Tensor]:
    """Returns tables of whole numbers as int64 tensors on the device of `like`: one copy, no wait."""
    flat = torch.from_numpy(np.concatenate([table.ravel() for table in tables]))
    if like.is_cuda:
        pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        flat = pinned.copy_(flat).to(like.device, non_blocking=True)
    parts = flat.split([table.size for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def _on_host(tensors: Sequence[Tensor]) -> list[Ints]:
    """Returns int32 tensors as int64 arrays: one copy, one wait."""
    flat = OnItsWay(torch.cat([x.flatten() for x in tensors])).wait()
    parts = np.split(flat.numpy().astype(np.int64), np.cumsum([x.numel() for x in tensors])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, tensors, strict=True)]
