"""Who computes what: the work of one layer cut into equal parts. Pure, on whole numbers.

The work is a line of row tiles: the heads one after the other, in each head its query clusters, in each cluster tiles
of `TILE_ROWS` query rows. A tile costs what its cluster's selected keys cost, known before any token moves because
centroids are global. Where whole heads balance they stay whole; otherwise the line is cut at equal costs, so that any
number of heads runs on any number of ranks and a rank holds some whole heads and at most two partial ones.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

TILE_ROWS = 128
# A tile costs its keys and this many more: reading its queries, listing its keys, writing its rows.
TILE_OVERHEAD_KEYS = 256
# Whole heads are kept if no rank then has more than this much over the mean. (Counted in tiles; counted in pairs it can
# be one percent more.)
WHOLE_HEADS_TOLERANCE = 0.02
# A cut this near to the end of a head (as a share of a part) moves there: a split head's keys and values travel twice.
SNAP = 0.01
SWAPS_TRIED = 16


class Piece(NamedTuple):
    """Rows first .. last of one head's queries, counted through its clusters in order."""

    head: int
    first: int
    last: int


def balance(rows: Ints, keys: Ints, parts: int) -> list[list[Piece]]:
    """Returns each part's pieces: every query row of every head in exactly one, the costs of the parts nearly equal.

    Rows are counted along a head's clusters, 0 .. its sum of `rows`. Pieces without rows are left out. Cuts inside a
    cluster fall between its tiles.

    Args:
        rows: int64 [H, Cq], query rows of each cluster.
        keys: int64 [H, Cq], keys that each cluster's rows compute.
        parts: ranks that share the work, 1 or more.
    """
    tiles, tile_cost = _tiles(rows), _tile_cost(keys)
    work = head_work(rows, keys)
    groups = _whole_heads(work, parts)
    loads = np.array([work[group].sum() for group in groups])
    head_rows = rows.sum(1).tolist()
    if parts == 1 or loads.max() * parts <= (1 + WHOLE_HEADS_TOLERANCE) * loads.sum():
        return [_pieces((head, 0, head_rows[head]) for head in group) for group in groups]
    # Equal work in any order; the one whose busiest rank moves the fewest rows is taken.
    lines = (_grouped_line(groups, work), _even_line(work))
    cuts = [_cut(rows[line], tiles[line], tile_cost[line], line, parts) for line in lines]
    return min(cuts, key=lambda cut: max(_moved_rows(part, head_rows) for part in cut))


def cost(rows: Ints, keys: Ints, pieces: Sequence[Piece]) -> int:
    """Returns what `pieces` cost by the rule above: what `balance` makes equal.

    Args:
        rows: int64 [H, Cq], as given to `balance`.
        keys: int64 [H, Cq], likewise.
        pieces: of one part.
    """
    total = 0
    for head, first, last in pieces:
        share = rows_in(rows[head], first, last)
        total += int((_tiles(share) * _tile_cost(keys[head])).sum())
    return total


def head_work(rows: Ints, keys: Ints) -> Ints:
    """Returns what each head costs by the same rule, int64 [H].

    Args:
        rows: int64 [H, Cq], as given to `balance`.
        keys: int64 [H, Cq], likewise.
    """
    work: Ints = (_tiles(rows) * _tile_cost(keys)).sum(1)
    return work


def rows_in(rows: Ints, first: int, last: int) -> Ints:
    """Returns how many of each cluster's rows lie among rows first .. last of the head.

    Args:
        rows: int64 [Cq] of one head.
        first: counted through the clusters.
        last: one after the last.
    """
    bounds: Ints = np.clip(np.cumsum(np.append(0, rows)), first, last)
    return np.diff(bounds)


def contiguous(work: Ints, parts: int) -> list[list[int]]:
    """Returns the heads of each part as Ulysses places them: in order, ⌈H / P⌉ or ⌊H / P⌋ a part.

    Args:
        work: int64 [H], cost of each head.
        parts: ranks.
    """
    return [part.tolist() for part in np.array_split(np.arange(len(work)), parts)]


def longest_first(work: Ints, parts: int) -> list[list[int]]:
    """Returns the heads of each part by the longest-processing-time rule (Graham 1969), heads kept whole.

    Args:
        work: int64 [H], cost of each head.
        parts: ranks.
    """
    return _fill(work, parts, most=len(work))


def _whole_heads(work: Ints, parts: int) -> list[list[int]]:
    """Returns heads in groups of nearly equal number and cost: longest first, no group over ⌈H / P⌉, then swaps."""
    groups = _fill(work, parts, most=-(-len(work) // parts))
    goal = work.sum() / parts
    for _ in range(SWAPS_TRIED):
        loads = np.array([work[group].sum() for group in groups])
        high = int(loads.argmax())
        if loads[high] <= (1 + WHOLE_HEADS_TOLERANCE) * goal or not _swap(groups, loads, work, high):
            break
    return groups


def _fill(work: Ints, parts: int, most: int) -> list[list[int]]:
    """Returns groups of at most `most` heads: the costliest head next, to the group with the least so far."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for head in np.argsort(-work, kind="stable").tolist():
        open_groups = (part for part in range(parts) if len(groups[part]) < most)
        part = min(open_groups, key=lambda part: (loads[part], len(groups[part]), part))
        groups[part].append(head)
        loads[part] += int(work[head])
    return groups


def _swap(groups: list[list[int]], loads: Ints, work: Ints, high: int) -> bool:
    """Swaps one head of group `high` with one elsewhere so that the larger of the two loads falls most.

    Returns:
        False if no swap lowers it.
    """
    best, choice = int(loads[high]), None
    mine = work[groups[high]]
    for part, group in enumerate(groups):
        if part == high or not group:
            continue
        moved = mine[:, None] - work[group][None, :]
        larger = np.maximum(loads[high] - moved, loads[part] + moved)
        i, j = divmod(int(larger.argmin()), len(group))
        if larger[i, j] < best:
            best, choice = int(larger[i, j]), (part, i, j)
    if choice is None:
        return False
    part, i, j = choice
    groups[high][i], groups[part][j] = groups[part][j], groups[high][i]
    return True


def _tiles(rows: Ints) -> Ints:
    """Returns how many tiles the rows of each cluster take."""
    return -(-rows // TILE_ROWS)


def _tile_cost(keys: Ints) -> Ints:
    """Returns what a tile of each cluster costs, in pairs."""
    return TILE_ROWS * (keys + TILE_OVERHEAD_KEYS)


def _moved_rows(pieces: Sequence[Piece], head_rows: Sequence[int]) -> int:
    """Returns the rows of q, k, v and out that a part moves: keys and values of whole heads, queries of its own."""
    return sum(2 * head_rows[head] + 2 * (last - first) for head, first, last in pieces)


def _even_line(work: Ints) -> list[int]:
    """Returns the order of heads on the line in which light and heavy ones are mixed: work grows as heads do."""
    left, line, done, total = dict(enumerate(work.tolist())), [], 0, int(work.sum())
    for place in range(1, len(work) + 1):
        goal = total * place / len(work)
        head = min(left, key=lambda head: (abs(done + left[head] - goal), head))
        done += left.pop(head)
        line.append(head)
    return line


def _grouped_line(groups: list[list[int]], work: Ints) -> list[int]:
    """Returns the order of heads on the line: groups so that their sums stay near the equal cuts, heavy heads outside.

    A cut then falls near a group's end, into a heavy head, and moves little else: work and bytes both stay even.
    """
    goal = work.sum() / len(groups)
    left = {part: int(work[group].sum()) for part, group in enumerate(groups)}
    line: list[int] = []
    done = 0
    for place in range(1, len(groups) + 1):
        part = min(left, key=lambda part: (abs(done + left[part] - place * goal), part))
        done += left.pop(part)
        falling = sorted(groups[part], key=lambda head: (-work[head], head))
        line += falling[0::2] + falling[1::2][::-1]
    return line


def _cut(rows: Ints, tiles: Ints, tile_cost: Ints, line: list[int], parts: int) -> list[list[Piece]]:
    """Returns the pieces of each part of a line of heads cut at equal costs; arrays are in the order of the line."""
    ends = np.cumsum((tiles * tile_cost).ravel())
    head_ends = ends.reshape(rows.shape)[:, -1]
    row_ends = np.cumsum(rows, axis=1)
    total, clusters = int(ends[-1]), rows.shape[1]
    cuts = [(0, 0)]
    for part in range(1, parts):
        goal = total * part / parts
        near = int(np.abs(head_ends - goal).argmin())
        if abs(head_ends[near] - goal) <= SNAP * total / parts:
            cuts.append((near + 1, 0))
            continue
        place = int(np.searchsorted(ends, goal, side="left"))
        head, cluster = divmod(place, clusters)
        before = int(ends[place] - tiles[head, cluster] * tile_cost[head, cluster])
        whole = round((goal - before) / int(tile_cost[head, cluster]))
        row = int(row_ends[head, cluster] - rows[head, cluster]) + min(int(rows[head, cluster]), whole * TILE_ROWS)
        cuts.append((head, row))
    cuts.append((len(line), 0))
    # Rounding and snapping keep the order, but equal cuts are possible: such a part is empty.
    result = []
    for (head, row), (last_head, last_row) in pairwise(cuts):
        spans = []
        for place in range(head, min(last_head, len(line) - 1) + 1):
            first = row if place == head else 0
            last = last_row if place == last_head else int(row_ends[place, -1])
            spans.append((line[place], first, last))
        result.append(_pieces(spans))
    return result


def _pieces(spans: Iterable[tuple[int, int, int]]) -> list[Piece]:
    return [Piece(*span) for span in spans if span[2] > span[1]]
