"""Index lists of the exchange: the Triton kernels against the reference, and the reference against a plain loop."""

import pytest
import torch
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.dispatch import select


def routes(S: int, H: int, C: int, G: int, seed: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Counts, pieces (whole heads and parts of heads), and where the sources' rows begin, as an itinerary has them."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (S, H, C), generator=generator, dtype=torch.int32)
    counts[:, :, C // 2] = 0
    pieces, lengths = [], torch.zeros(S, G, dtype=torch.int64)
    for g in range(G):
        head = int(torch.randint(H, (1,), generator=generator))
        total = int(counts[:, head].sum())
        first, last = sorted(torch.randint(0, total + 1, (2,), generator=generator).tolist()) if g % 2 else (0, total)
        pieces.append((head, first, last))
        row = 0
        for c in range(C):
            for s in range(S):
                for _ in range(int(counts[s, head, c])):
                    lengths[s, g] += first <= row < last
                    row += 1
    begins = (lengths.flatten().cumsum(0) - lengths.flatten()).view(S, G)
    rows = max((last - first for _, first, last in pieces), default=0)
    table = torch.tensor([(*piece, g * rows) for g, piece in enumerate(pieces)], dtype=torch.int64).view(-1, 4)
    return counts, table, begins, int(lengths.sum()), int(lengths.max()) if lengths.numel() else 0


def by_hand(counts: Tensor, pieces: Tensor) -> list[int]:
    """Every arriving row's place, source by source, piece by piece, cluster by cluster."""
    S, _, C = counts.shape
    places = []
    for source in range(S):
        for head, first, last, base in pieces.tolist():
            row = 0
            for c in range(C):
                for s in range(S):
                    for _ in range(int(counts[s, head, c])):
                        if s == source and first <= row < last:
                            places.append(base + row - first)
                        row += 1
    return places


CASES = [(1, 1, 1, 1), (2, 3, 5, 4), (3, 2, 17, 5), (2, 2, 40, 2), (4, 3, 3, 0)]


@pytest.mark.parametrize(("S", "H", "C", "G"), CASES)
def test_the_reference_places_every_row(S: int, H: int, C: int, G: int) -> None:
    for seed in range(3):
        counts, pieces, begins, total, most = routes(S, H, C, G, seed)
        targets, offsets = reference.target_rows(counts, pieces, begins, 0, total, most)
        assert targets[0].tolist() == by_hand(counts, pieces)
        for g, (head, first, last, _) in enumerate(pieces.tolist()):
            ends = counts[:, head].sum(0).cumsum(0).clamp(first, last) - first
            assert offsets[g].tolist() == [0, *ends.tolist()]


@pytest.mark.parametrize(("S", "H", "C", "G"), [*CASES, (2, 2, 1100, 3)])
def test_targets_equal_the_reference(S: int, H: int, C: int, G: int, device: torch.device) -> None:
    counts, pieces, begins, total, most = routes(S, H, C, G, 7)
    # Counts of queries and keys lie side by side, and sources of one ring row among others.
    wide = torch.zeros(S + 2, H, C + 3, dtype=torch.int32)
    wide[1 : S + 1, :, 2 : C + 2] = counts
    counts = wide.to(device)[1 : S + 1, :, 2 : C + 2]
    given = counts, pieces.to(device), begins.to(device), 0, total, most
    found, expected = select("triton", device).target_rows(*given), reference.target_rows(*given)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    # One source alone, as a sender lists its own rows; and none, where only the runs are wanted.
    last = S - 1
    ends = torch.cat([begins.flatten(), torch.tensor([total])]).diff().view(S, G)[last]
    alone = counts, given[1], (ends.cumsum(0) - ends)[None].to(device), last, int(ends.sum()), most
    for case in (alone, (*given[:4], 0, most)):
        found, expected = select("triton", device).target_rows(*case), reference.target_rows(*case)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)
    listed = reference.target_rows(*alone)[0][0]
    assert torch.equal(listed, reference.target_rows(*given)[0][0, total - len(listed) :])


@pytest.mark.parametrize("n", [1, 7, 1500])
def test_sources_equal_the_reference(n: int, device: torch.device) -> None:
    H, generator = 3, torch.Generator().manual_seed(n)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(H)]).to(torch.int32).to(device)
    spans = [(2, 0, n), (0, n // 2, n - n // 2), (1, 0, 0), (0, 0, n // 2)]
    begins = [sum(span[2] for span in spans[:i]) for i in range(len(spans))]
    table = torch.tensor([(begin, *span) for begin, span in zip(begins, spans, strict=True)], device=device)
    given = order, table, 2 * n, (n, 1), (1, H)
    found, expected = select("triton", device).source_rows(*given), reference.source_rows(*given)
    assert len(found) == 2
    for mine, theirs, (head_step, token_step) in zip(found, expected, given[3:], strict=True):
        rows = [
            h * head_step + int(t) * token_step for h, first, length in spans for t in order[h, first : first + length]
        ]
        assert mine[0].tolist() == theirs[0].tolist() == rows
    assert torch.equal(select("triton", device).source_rows(*given[:4])[0], expected[0])


@pytest.mark.parametrize(("U", "H", "C", "seed"), [(1, 1, 1, 0), (2, 3, 5, 1), (3, 2, 17, 2), (4, 5, 40, 3)])
def test_addresses_say_where_every_row_belongs(U: int, H: int, C: int, seed: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Every head has the same rows of each source.
    labels = torch.randint(C, (U, H, 1 + 7 * U), generator=generator)
    counts = torch.nn.functional.one_hot(labels, C).sum(2).to(torch.int32)
    n, source = labels.shape[2], U - 1
    order = labels[source].argsort(dim=1, stable=True)
    # Each head cut in two, for ranks 4 and 5; the places of a rank one after the other.
    middle = [int(torch.randint(U * n + 1, (1,), generator=generator)) for _ in range(H)]
    cuts = [cut for h, m in enumerate(middle) for cut in ((0, m, 4, 1000 * h), (m, U * n, 5, 1000 * h + 7))]
    spans = [(h, 2 * h, 2 * h + 2) for h in reversed(range(H))]
    pieces = [*((h, 0, U * n, 0) for h in range(H)), (H - 1, 0, middle[-1], 0), (0, 1, U * n, 50)]
    tables = [torch.tensor(table, dtype=torch.int64) for table in (pieces, spans, cuts)]
    wide = torch.zeros(U, H, C + 3, dtype=torch.int32)
    wide[..., 2 : C + 2] = counts
    given = [wide.to(device)[..., 2 : C + 2], source, n, *(table.to(device) for table in tables)]
    found = select("triton", device).addresses(*given)
    expected = reference.addresses(counts, source, n, *tables)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    ranks, targets, _ = expected
    # By hand: a token's place in its head is behind all of smaller clusters and those of its own from earlier sources.
    for span, (h, _, _) in enumerate(spans):
        for i in range(n):
            token = int(order[h, i])
            label = int(labels[source, h, token])
            row = int((labels[:, h] < label).sum() + (labels[:source, h] == label).sum())
            row += int((labels[source, h, :token] == label).sum())
            first, _, rank, place = cuts[2 * h + (row >= middle[h])]
            assert (int(ranks[span, i]), int(targets[span, i])) == (rank, place + row - first)


@pytest.mark.parametrize("C", [1, 8, 9, 1001])
def test_maps_unpack_as_in_the_reference(C: int, device: torch.device) -> None:
    bits = torch.randint(256, (3, 4, -(-C // 8) + 4), generator=torch.Generator().manual_seed(C), dtype=torch.uint8)
    # Other bytes stand behind the map's in the record that is gathered.
    bits = bits.to(device)[..., :-4]
    heads = torch.tensor([[2, 9], [0, 9], [2, 9]], device=device)[:, 0]
    assert torch.equal(select("triton", device).unpack_map(bits, heads, C), reference.unpack_map(bits, heads, C))
