"""An exchange whose rows are written to where they belong, in the other ranks' memory; its plan waits for nobody.

Every number of rows that the host must know hangs on the cuts alone: a piece counts rows of a head, and a head has the
same rows at each refresh, whatever their clusters. So the cuts are made from the loads of the refresh before, which
have long arrived on the host, and what hangs on the clusters is worked out on the device. Every row is in exactly one
piece in any case; the balance rests on loads changing little from one refresh to the next. Where they have changed
more, the next reuse can tell, without a wait either, and is cut anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import Permutation, Way
from semvid.parallel.arrival import OnItsWay
from semvid.parallel.balance import WHOLE_HEADS_TOLERANCE, Ints, Piece, balance, cost
from semvid.parallel.exchange import Counts, on_device
from semvid.parallel.itinerary import Placement, longest, places, table
from semvid.parallel.phases import phase
from semvid.parallel.ranks import Ranks


class Loads(NamedTuple):
    """What the work of a layer is cut by."""

    rows: Ints
    """int64 [H, Cq]: rows of q in each query cluster, over all ranks."""
    keys: Ints
    """int64 [H, Cq]: keys that each query cluster computes."""
    key_rows: int
    """Of a head, over all ranks."""


class ComingLoads:
    """Loads of a refresh on their way to the host."""

    def __init__(self, counts: Counts) -> None:
        """Starts the copy."""
        self.shape = counts.keys_computed.shape
        rows, key_rows = counts.queries.sum(0, dtype=torch.int32), counts.keys[:, 0].sum(dtype=torch.int32)
        self._flat = OnItsWay(torch.cat([rows.flatten(), counts.keys_computed.flatten(), key_rows[None]]))
        self._loads: Loads | None = None

    def wait(self) -> Loads:
        """Returns the loads; waits for the device where they have not come yet."""
        if self._loads is None:
            found, size = self._flat.wait().numpy().astype(np.int64), self.shape.numel()
            rows, keys = (part.reshape(self.shape) for part in (found[:size], found[size:-1]))
            self._loads = Loads(rows, keys, int(found[-1]))
        return self._loads


class Cut(NamedTuple):
    """How the work of a layer was cut, for a job that goes on from a checkpoint: as without the break."""

    parts: list[list[Piece]]
    """Each rank's share of the work."""
    early: bool
    """Whether it is from the loads of the refresh before, and no reuse has seen to it yet."""


@dataclass(frozen=True, slots=True)
class DirectExchange:
    """What this rank sends, receives and computes in one layer; kept while its map is reused."""

    parts: list[list[Piece]]
    """Each rank's share of the work."""
    pieces: list[Piece]
    """This rank's."""
    heads: Tensor
    """int64 [pieces]: the head of each."""
    queries: Way
    """Of q to the ranks' windows, and of results home."""
    keys: Way
    """Of k and v."""
    q_offsets: Tensor
    """int32 [pieces, Cq + 1]: the runs of each piece's query clusters; most are empty in a part of a head."""
    k_offsets: list[Tensor]
    """int32 [pieces, Ck + 1]: the runs of its key clusters; of one hop, all ranks' keys at once."""
    q_rows: int
    """Of q on this rank: its tokens, and anchors."""
    piece_rows: tuple[int, int]
    """Of each piece's queries and keys in this rank's window; a piece may use fewer."""
    room: tuple[int, int]
    """Rows of the largest joined queries and of the largest joined keys of any rank."""
    loads: ComingLoads
    """Of this refresh, for the next one's cuts."""
    early: bool
    """Whether the cuts are from the loads of the refresh before."""

    def imbalance(self) -> float:
        """Returns the largest part's cost over the mean, by the loads of this refresh."""
        loads = self.loads.wait()
        costs = [cost(loads.rows, loads.keys, part) for part in self.parts]
        return max(costs) * len(costs) / max(1, sum(costs))

    def is_uneven(self) -> bool:
        """Returns whether cuts by its own loads would be better ones."""
        return self.early and self.imbalance() > 1 + WHOLE_HEADS_TOLERANCE

    def rows_sent(self, rank: int) -> int:
        """Returns how many rows rank `rank`, this one, sends to others: q, k and v there, out back. Waits."""
        there = sum(int((way.ranks != rank).sum()) for way in (self.queries, self.keys, self.keys))
        own = int((self.queries.ranks == rank).sum())
        return there + sum(piece.last - piece.first for piece in self.pieces) - own


def plan_direct(
    counts: Counts,
    permutations: tuple[Permutation, Permutation],
    ranks: Ranks,
    ops: Ops,
    place_work: Placement = balance,
    before: DirectExchange | None = None,
    cut: Cut | None = None,
) -> DirectExchange:
    """Returns the exchange of one layer through windows; no collective. The host waits only where nothing was before.

    Args:
        counts: gathered; see `Counts`.
        permutations: this rank's order of its queries and of its keys.
        ranks: the mesh, of one ring row, and this rank's place on it.
        ops: the backend.
        place_work: cuts the work into parts.
        before: the exchange of the refresh before, the same on every rank.
        cut: instead of another, that of a checkpoint.
    """
    assert ranks.mesh.ring == 1, "windows serve one ring row"
    of_q, of_k = (side.order for side in permutations)
    (H, n), me = of_q.shape, ranks.shard
    loads = ComingLoads(counts)
    early = before is not None and _fits(before, counts, n)
    known = before.loads.wait() if before is not None and early else loads.wait()
    with phase("plan on host", on_host=True):
        parts = place_work(known.rows, known.keys, ranks.mesh.sequence) if cut is None else cut.parts
        # Every head has every row.
        of_queries = _tables(parts, me, H, int(known.rows[0].sum()))
        of_keys = _key_tables(parts, me, H, known.key_rows)
        tables = on_device([*of_queries, *of_keys], counts.queries)
    *queries, q_offsets = ops.addresses(counts.queries, me, n, *tables[:3])
    *keys, k_offsets = ops.addresses(counts.keys, me, of_k.shape[1], *tables[3:])
    mine, rows = parts[me], [longest(part) for part in parts]
    return DirectExchange(
        parts,
        mine,
        tables[0][H:, 0],
        Way(tables[1][:, 0], of_q, *queries),
        Way(tables[4][:, 0], of_k, *keys),
        q_offsets,
        [k_offsets],
        n,
        (rows[me], known.key_rows),
        (
            max(len(part) * most for part, most in zip(parts, rows, strict=True)),
            known.key_rows * max(len(part) for part in parts),
        ),
        loads,
        early if cut is None else cut.early,
    )


def _fits(before: DirectExchange, counts: Counts, n: int) -> bool:
    """Returns whether a refresh has the rows of the one before."""
    return before.q_rows == n and before.loads.shape == counts.keys_computed.shape


def _tables(parts: Sequence[Sequence[Piece]], me: int, H: int, rows: int) -> tuple[Ints, Ints, Ints]:
    """Returns pieces, spans and cuts of the queries for `addresses`: one span a head, cut where pieces end."""
    cuts: list[list[tuple[int, ...]]] = [[] for _ in range(H)]
    for rank, part in enumerate(parts):
        most = longest(part)
        for place, piece in enumerate(part):
            cuts[piece.head].append((piece.first, piece.last, rank, place * most))
    ends = np.cumsum([0, *map(len, cuts)])
    spans = [(head, int(ends[head]), int(ends[head + 1])) for head in range(H)]
    pieces = np.concatenate([_whole(H, rows), places(parts[me], longest(parts[me]))])
    return pieces, table(spans, 3), table([cut for of_head in cuts for cut in of_head], 4)


def _key_tables(parts: Sequence[Sequence[Piece]], me: int, H: int, rows: int) -> tuple[Ints, Ints, Ints]:
    """Returns those of the keys: one span for each piece of a head, its keys as a whole to the rank that has it."""
    goals = [(piece.head, rank, place * rows) for rank, part in enumerate(parts) for place, piece in enumerate(part)]
    spans = [(head, at, at + 1) for at, (head, _, _) in enumerate(goals)]
    cuts = [(0, rows, rank, place) for _, rank, place in goals]
    own = places([Piece(piece.head, 0, rows) for piece in parts[me]], rows)
    return np.concatenate([_whole(H, rows), own]), table(spans, 3), table(cuts, 4)


def _whole(H: int, rows: int) -> Ints:
    """Returns every head as a piece."""
    return table([(head, 0, rows, 0) for head in range(H)], 4)
