"""Moving rows: into the order of clusters and back, and to other ranks' memory."""

import torch
from torch import Tensor

from semvid.kernels.layout import Shared, Way, check_index, check_rows, check_way


def gather_rows(x: Tensor, order: Tensor) -> Tensor:
    """Returns the rows of x in sorted order: out[h, i] = x[h, order[h, i]].

    Args:
        x: [H, N, D].
        order: int32 [H, n].
    """
    check_rows("x", x)
    return torch.gather(x, 1, order.long()[..., None].expand(-1, -1, x.shape[-1]))


def scatter_rows(x: Tensor, order: Tensor, rows: int | None = None) -> Tensor:
    """Returns the rows of x back in token order: out[h, order[h, i]] = x[h, i]. The inverse of `gather_rows`.

    Args:
        x: [H, N, D].
        order: int32 [H, N], different places in 0 .. rows - 1.
        rows: of the result; N if absent. What no row of x goes to is left undefined.
    """
    H, N, D = check_rows("x", x)
    out = torch.empty(H, N if rows is None else rows, D, dtype=x.dtype, device=x.device)
    return out.scatter_(1, order.long()[..., None].expand_as(x), x)


def scatter_among(x: Tensor, way: Way, blocks: Shared) -> None:
    """Copies rows into the ranks' blocks: blocks[ranks[s, i]][targets[s, i]] = x[h, order[h, i]] with h = heads[s].

    What no row goes to stays.

    Args:
        x: [H, n, D].
        way: its targets are different places on each rank.
        blocks: of x's dtype and D.
    """
    check_way(x, way, blocks)
    for span, head in enumerate(way.heads.tolist()):
        rows, targets = x[head, way.order[head].long()], way.targets[span].long()
        for rank, block in enumerate(blocks.blocks):
            going = way.ranks[span] == rank
            block[0, targets[going]] = rows[going]


def gather_among(blocks: Shared, way: Way, out: Tensor) -> None:
    """Copies rows from the ranks' blocks: out[h, order[h, i]] = blocks[ranks[s, i]][targets[s, i]] with h = heads[s].

    The heads of no span stay.

    Args:
        blocks: of out's dtype and D.
        way: of different heads.
        out: [H, n, D].
    """
    check_way(out, way, blocks)
    for span, head in enumerate(way.heads.tolist()):
        tokens, targets = way.order[head].long(), way.targets[span].long()
        for rank, block in enumerate(blocks.blocks):
            coming = way.ranks[span] == rank
            out[head, tokens[coming]] = block[0, targets[coming]]


def source_rows(order: Tensor, spans: Tensor, total: int, *steps: tuple[int, int]) -> list[Tensor]:
    """Returns where the rows of spans of sorted tokens lie in memory, int32 [1, total] for each of `steps`.

    Args:
        order: int32 [H, n]: the tokens of each head in the order of their labels.
        spans: int64 [S, 4]: where a span begins in the result, its head, its first place in `order`, its length.
            Together they cover 0 .. total.
        total: rows of the result.
        steps: (rows from head to head, rows from token to token) of a tensor that is read or written, one or two.
    """
    check_index("order", order, tuple(order.shape))
    _, head, first, length = spans.unbind(1)
    token = order.flatten()[_counted(head * order.shape[1] + first, length, total)]
    head = torch.repeat_interleave(head, length, output_size=total)
    return [(head * h + token * t).to(torch.int32)[None] for h, t in steps]


def target_rows(
    counts: Tensor, pieces: Tensor, begins: Tensor, first_source: int, total: int, most: int
) -> tuple[Tensor, Tensor]:
    """Returns where rows of pieces belong, int32 [1, total], and the runs of each piece's clusters, int32 [G, C + 1].

    Rows are listed source by source, piece by piece, cluster by cluster; they belong piece by piece, cluster by
    cluster, in a cluster source by source.

    Args:
        counts: int32 [U, H, C], each source's tokens in each cluster.
        pieces: int64 [G, 4]: head, first row and one after the last, counted through the head's clusters over all
            sources, and the place of the first.
        begins: int64 [S, G]: where the rows of a source and piece begin in the list. S sources are listed.
        first_source: the first of those that are listed.
        total: rows listed.
        most: rows of one source and piece, at most.
    """
    head, first, last, base = pieces.unbind(1)
    counts, first, last = counts[:, head].long(), first[:, None], last[:, None]
    in_cluster = counts.sum(0)
    ends = in_cluster.cumsum(-1)
    begin = ends - in_cluster + counts.cumsum(0) - counts
    listed = slice(first_source, first_source + len(begins))
    start, end = begin[listed].clamp(first, last), (begin + counts)[listed].clamp(first, last)
    # Where nothing is wanted of the list its runs are not counted.
    lengths = (end - start).flatten() if total else end.new_zeros(start.numel())
    targets = _counted((start + base[:, None] - first).flatten(), lengths, total)
    offsets = torch.nn.functional.pad(ends.clamp(first, last) - first, (1, 0))
    return targets.to(torch.int32)[None], offsets.to(torch.int32)


def addresses(
    counts: Tensor, source: int, n: int, pieces: Tensor, spans: Tensor, cuts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns where one source's rows belong, in the order of their labels, and the runs of some pieces' clusters.

    Rows of a head are counted through its clusters, in a cluster source by source; a cut takes a stretch of them. What
    is returned: ranks, uint8 [S, n], rows in those ranks' blocks, int32 [S, n], and runs, int32 [G, C + 1].

    Args:
        counts: int32 [U, H, C], each source's tokens in each cluster.
        source: which.
        n: its tokens, in each head.
        pieces: int64 [H + G, 4]: head, first row, one after the last, and the place of the first; every head as a
            whole, then the pieces whose runs are wanted.
        spans: int64 [S, 3]: a head, and the first and one after the last of `cuts` among which its rows are.
        cuts: int64 [T, 4]: first row, one after the last, rank, and the place of the first in that rank's block.
    """
    H = counts.shape[1]
    begins = torch.arange(H, device=counts.device)[None] * n
    rows = target_rows(counts, pieces[:H], begins, source, H * n, n)[0].view(H, n)
    ranks, targets = [], []
    for head, first_cut, last_cut in spans.tolist():
        row = rows[head]
        rank, target = torch.zeros_like(row), torch.zeros_like(row)
        for first, last, of_rank, place in cuts[first_cut:last_cut].tolist():
            inside = (row >= first) & (row < last)
            rank[inside] = of_rank
            target[inside] = row[inside] - first + place
        ranks.append(rank)
        targets.append(target)
    _, offsets = target_rows(counts, pieces[H:], begins[:, :0], 0, 0, 0)
    return torch.stack(ranks).to(torch.uint8), torch.stack(targets), offsets


def _counted(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Returns starts[0], starts[0] + 1, … lengths[0] of them, then those of starts[1], …: int64 [total]."""
    shifts = starts - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shifts, lengths, output_size=total) + torch.arange(total, device=starts.device)
