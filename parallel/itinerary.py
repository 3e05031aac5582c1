"""Who sends which rows to whom, in whole numbers: what one rank's exchange is made of. Pure, no tensor.

Rows of a head are counted through its clusters, in a cluster source by source; a piece is a stretch of them. A source's
share of a piece is one stretch of its own tokens sorted by label, because a piece follows the clusters' order.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from semvid.parallel.balance import Ints, Piece
from semvid.parallel.ranks import Ranks

Placement = Callable[[Ints, Ints, int], list[list[Piece]]]
"""(rows [H, Cq], keys [H, Cq], parts) -> each part's pieces, as `balance`."""


class Leg(NamedTuple):
    """One movement of rows, as one rank sees it. G pieces of its own, U sources in the ring row it receives from."""

    sent: list[int]
    """Rows for each rank of the sequence."""
    received: list[int]
    """Rows from each."""
    spans: Ints
    """int64 [S, 4], what is sent: where the span begins among the rows sent, its head, its first place in the order of
    labels, its length."""
    pieces: Ints
    """int64 [G, 4], what is received: head, first row, one after the last, and the place of the first in the joined
    tensor."""
    begins: Ints
    """int64 [U, G]: where a source's rows of a piece begin among the rows received."""
    rows: int
    """Of the longest piece, this rank's."""
    most: int
    """Rows from one source for one piece, at most; sent or received."""


class Itinerary(NamedTuple):
    """All movements of one rank in one layer."""

    pieces: list[Piece]
    """This rank's share of the work."""
    queries: Leg
    keys: list[Leg]
    """One for each ring row, the own one first; values go the same way."""
    q_rows: int
    """Of this rank's shard: its tokens, and anchors."""


def draw_up(q_counts: Ints, k_tokens: Ints, keys_computed: Ints, ranks: Ranks, place_work: Placement) -> Itinerary:
    """Returns one rank's movements. Every rank draws up the same: what one receives is what the others send.

    Args:
        q_counts: int64 [P, H, Cq], each shard's rows of q in each query cluster.
        k_tokens: int64 [P], each shard's tokens; anchors make its rows of q more.
        keys_computed: int64 [H, Cq], keys that each query cluster computes.
        ranks: the mesh and this rank's place on it.
        place_work: cuts the work of a ring row into parts.
    """
    mesh, place = ranks.mesh, ranks.place
    by_row = q_counts.reshape(mesh.ring, mesh.ulysses, *q_counts.shape[1:])
    parts = [place_work(row.sum(0), keys_computed, mesh.ulysses) for row in by_row]
    # Every head has every row.
    rows = [int(shard[0].sum()) if len(shard) else 0 for shard in q_counts]
    keys = [_key_leg(parts, k_tokens.tolist(), ranks, hop) for hop in range(mesh.ring)]
    mine = parts[place.ring][place.ulysses]
    return Itinerary(mine, _query_leg(by_row[place.ring], parts[place.ring], rows, ranks), keys, rows[ranks.shard])


def _query_leg(row_counts: Ints, parts: Sequence[Sequence[Piece]], tokens: Sequence[int], ranks: Ranks) -> Leg:
    """Returns the way of the queries, inside the own ring row."""
    mesh, own = ranks.mesh, ranks.place.ulysses
    members = _members(ranks, ranks.place.ring)
    of_row = tokens[members]

    whole = sum(of_row)

    def spans(source: int, part: Sequence[Piece]) -> list[tuple[int, int]]:
        own = (0, of_row[source])
        return [own if last - first == whole else _local_span(row_counts[:, head], source, first, last)
                for head, first, last in part]  # fmt: skip

    going = [spans(own, part) for part in parts]
    coming = [spans(source, parts[own]) for source in range(mesh.ulysses)]
    sent, received = [0] * mesh.sequence, [0] * mesh.sequence
    sent[members] = [sum(end - start for start, end in part) for part in going]
    received[members] = [sum(end - start for start, end in part) for part in coming]
    heads = [piece.head for part in parts for piece in part]
    flat = [span for part in going for span in part]
    spanned = _spans([(head, start, end - start) for head, (start, end) in zip(heads, flat, strict=True)])
    lengths = [[end - start for start, end in part] for part in coming]
    most = _most([*lengths, [end - start for start, end in flat]])
    begins, rows = _begins(lengths), longest(parts[own])
    return Leg(sent, received, spanned, places(parts[own], rows), begins, rows, most)


def _key_leg(parts: Sequence[Sequence[Sequence[Piece]]], tokens: Sequence[int], ranks: Ranks, hop: int) -> Leg:
    """Returns the way of keys and values from ring row r + hop to row r, for every r: whole heads, to all that hold a
    piece of one.
    """
    mesh, place = ranks.mesh, ranks.place
    reader, giver = (place.ring - hop) % mesh.ring, (place.ring + hop) % mesh.ring
    here, there = _members(ranks, reader), _members(ranks, giver)
    own, mine = tokens[ranks.shard], parts[place.ring][place.ulysses]
    sent, received = [0] * mesh.sequence, [0] * mesh.sequence
    sent[here] = [own * len(part) for part in parts[reader]]
    received[there] = [n * len(mine) for n in tokens[there]]
    rows = sum(tokens[there])
    spanned = _spans([(piece.head, 0, own) for part in parts[reader] for piece in part])
    lengths = [[n] * len(mine) for n in tokens[there]]
    pieces = places([Piece(piece.head, 0, rows) for piece in mine], rows)
    return Leg(sent, received, spanned, pieces, _begins(lengths), rows, max(own, _most(lengths)))


def _local_span(counts: Ints, source: int, first: int, last: int) -> tuple[int, int]:
    """Returns which of a source's rows of a head, in the order of their labels, are among rows first .. last of it.

    Args:
        counts: int64 [U, Cq], each source's rows of each cluster.
        source: which.
        first: counted over all sources, as is the next.
        last: one after.
    """
    own, in_cluster = counts[source], counts.sum(0)
    begin = np.cumsum(in_cluster) - in_cluster + counts[:source].sum(0)
    start, end = (int(np.minimum(np.maximum(row - begin, 0), own).sum()) for row in (first, last))
    return start, end


def _spans(spans: Sequence[tuple[int, int, int]]) -> Ints:
    """Returns spans (head, first place, length) with their beginnings before them."""
    found = table(spans, 3)
    return np.column_stack([np.cumsum(found[:, 2]) - found[:, 2], found])


def places(pieces: Sequence[Piece], rows: int) -> Ints:
    """Returns pieces with the place of each one's first row, if each has `rows` of them in the joined tensor."""
    return table([(*piece, place * rows) for place, piece in enumerate(pieces)], 4)


def _begins(lengths: Sequence[Sequence[int]]) -> Ints:
    """Returns where each of the stretches begins, one after the other."""
    found = np.array(lengths, np.int64)
    begins: Ints = (np.cumsum(found) - found.ravel()).reshape(found.shape)
    return begins


def _most(lengths: Sequence[Sequence[int]]) -> int:
    return max((length for part in lengths for length in part), default=0)


def longest(pieces: Sequence[Piece]) -> int:
    """Returns the rows of the longest piece, 0 where there is none."""
    return max((piece.last - piece.first for piece in pieces), default=0)


def table(rows: Sequence[tuple[int, ...]], columns: int) -> Ints:
    """Returns rows of whole numbers as int64 [rows, columns], also where there is none."""
    return np.array(rows, np.int64).reshape(-1, columns)


def _members(ranks: Ranks, ring: int) -> slice:
    """Returns the shards of a ring row."""
    return slice(ring * ranks.mesh.ulysses, (ring + 1) * ranks.mesh.ulysses)
