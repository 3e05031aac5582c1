"""The counting sort and the movement of rows against the reference; stable orders, so compared exactly."""

import pytest
import torch
from torch import Tensor

from semvid.kernels import permute, reference
from semvid.kernels.layout import Way, shared

SIZES = [1, 63, 64, 100, 257]
KINDS = ["random", "skewed", "all in the last", "one token each", "sorted"]


@pytest.fixture
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks at toy sizes: the interpreter takes seconds for one of the real length."""
    monkeypatch.setattr(permute, "SORT_BLOCK", 64)


def make_labels(kind: str, H: int, N: int, C: int, device: torch.device) -> Tensor:
    labels = torch.randint(C, (H, N))
    if kind == "skewed":
        labels = torch.where(torch.rand(H, N) < 0.8, C // 2, labels)
    elif kind == "all in the last":
        labels.fill_(C - 1)
    elif kind == "one token each":
        labels = torch.stack([torch.randperm(max(N, C))[:N] % C for _ in range(H)])
    elif kind == "sorted":
        labels = labels.sort(-1, descending=True).values
    return labels.to(torch.int32).to(device)


@pytest.mark.usefixtures("_short_blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", SIZES)
def test_group_is_the_stable_sort(N: int, kind: str, device: torch.device) -> None:
    C = 37
    labels = make_labels(kind, 2, N, C, device)
    order, offsets = permute.group(labels, C)
    expected = reference.group(labels, C)
    assert torch.equal(order, expected.order)
    assert torch.equal(offsets, expected.offsets)
    assert order.dtype == offsets.dtype == torch.int32


@pytest.mark.usefixtures("_short_blocks")
@pytest.mark.parametrize("C", [1, 2, 1025])
def test_group_takes_any_number_of_clusters(C: int, device: torch.device) -> None:
    labels = make_labels("random", 1, 130, C, device)
    order, offsets = permute.group(labels, C)
    expected = reference.group(labels, C)
    assert torch.equal(order, expected.order)
    assert torch.equal(offsets, expected.offsets)


def test_group_at_the_real_block_length(device: torch.device) -> None:
    labels = make_labels("skewed", 1, 1100, 5, device)
    assert torch.equal(permute.group(labels, 5).order, reference.group(labels, 5).order)


@pytest.mark.usefixtures("_short_blocks")
def test_group_adds_up_more_blocks_than_one_tile_holds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permute, "SORT_BLOCK", 4)
    labels = make_labels("random", 1, 600, 3, device)
    assert torch.equal(permute.group(labels, 3).order, reference.group(labels, 3).order)


@pytest.mark.usefixtures("_short_blocks")
def test_group_reads_strided_labels(device: torch.device) -> None:
    labels = make_labels("random", 100, 3, 7, device).mT
    assert torch.equal(permute.group(labels, 7).order, reference.group(labels, 7).order)


def test_no_tokens_give_empty_runs(device: torch.device) -> None:
    order, offsets = permute.group(torch.zeros(2, 0, dtype=torch.int32, device=device), 3)
    assert order.shape == (2, 0)
    assert torch.equal(offsets, torch.zeros(2, 4, dtype=torch.int32, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("N", "D"), [(1, 64), (63, 128), (100, 48), (257, 1), (257, 64)])
def test_gather_and_scatter_move_every_row(N: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(3, N, D, device=device).to(dtype)
    order = torch.stack([torch.randperm(N, device=device) for _ in range(3)]).to(torch.int32)
    gathered = permute.gather_rows(x, order)
    assert torch.equal(gathered, reference.gather_rows(x, order))
    assert torch.equal(permute.scatter_rows(x, order), reference.scatter_rows(x, order))
    assert torch.equal(permute.scatter_rows(gathered, order), x)


@pytest.mark.parametrize("n", [0, 5, 200])
def test_gather_takes_fewer_or_more_rows_than_there_are(n: int, device: torch.device) -> None:
    x = torch.randn(2, 63, 64, device=device)
    order = torch.randint(63, (2, n), device=device, dtype=torch.int32)
    assert torch.equal(permute.gather_rows(x, order), reference.gather_rows(x, order))


@pytest.mark.parametrize("view", ["transposed heads", "transposed rows"])
def test_rows_are_moved_from_strided_tensors(view: str, device: torch.device) -> None:
    stored = (
        torch.randn(100, 3, 64, device=device) if view == "transposed heads" else torch.randn(3, 64, 100, device=device)
    )
    x = stored.transpose(0, 1) if view == "transposed heads" else stored.mT
    order = torch.stack([torch.randperm(100, device=device) for _ in range(3)]).to(torch.int32)
    assert torch.equal(permute.gather_rows(x, order), reference.gather_rows(x, order))
    assert torch.equal(permute.scatter_rows(x, order), reference.scatter_rows(x, order))


def test_wrong_index_tensors_are_refused(device: torch.device) -> None:
    x = torch.randn(2, 5, 16, device=device)
    with pytest.raises(ValueError, match=r"order must be int32 \[2, 5\], not torch.int64"):
        permute.gather_rows(x, torch.zeros(2, 5, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"order must be int32 \[2, 5\]"):
        permute.scatter_rows(x, torch.zeros(2, 4, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="C is 0; accepted: 1"):
        permute.group(torch.zeros(2, 5, dtype=torch.int32, device=device), 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "N"), [(40, 75600), (24, 118800)])
@pytest.mark.parametrize(
    ("C", "kind"), [(1000, "random"), (4096, "skewed"), (1000, "all in the last"), (300, "sorted")]
)
def test_group_at_real_sizes(H: int, N: int, C: int, kind: str, device: torch.device) -> None:
    labels = make_labels(kind, H, N, C, device)
    first, second = permute.group(labels, C), permute.group(labels, C)
    expected = reference.group(labels, C)
    assert torch.equal(first.order, expected.order)
    assert torch.equal(first.offsets, expected.offsets)
    assert torch.equal(first.order, second.order)


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "N"), [(40, 75600), (24, 118800)])
def test_rows_move_at_real_sizes(H: int, N: int, device: torch.device) -> None:
    x = torch.randn(H, N, 128, device=device, dtype=torch.bfloat16)
    order = torch.rand(H, N, device=device).argsort(-1).to(torch.int32)
    gathered = permute.gather_rows(x, order)
    for h in (0, H // 2, H - 1):
        assert torch.equal(gathered[h], x[h][order[h].long()])
    assert torch.equal(permute.scatter_rows(gathered, order), x)


@pytest.mark.gpu
def test_addresses_past_two_to_the_31_are_right(device: torch.device) -> None:
    x = torch.randn(220, 80_000, 128, device=device, dtype=torch.bfloat16)
    order = torch.arange(79_999, -1, -1, device=device, dtype=torch.int32).expand(220, -1).contiguous()
    assert torch.equal(permute.gather_rows(x, order)[-1], x[-1].flip(0))


@pytest.mark.parametrize(
    ("n", "heads", "D", "odd"),
    [
        (1, [0], 16, 0),
        (37, [2, 0], 64, 0),
        (150, [1, 2], 20, 0),
        (150, [0, 2], 64, 3),
        (0, [0, 1], 8, 0),
        (9, [], 8, 0),
    ],
)
@pytest.mark.parametrize("tokens_first", [False, True])
def test_rows_go_among_blocks_and_back_and_nothing_else_changes(
    n: int,
    heads: list[int],
    D: int,
    odd: int,
    tokens_first: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Several programs, also where rows are few.
    monkeypatch.setattr(permute, "BYTES_MOVED", 2048)
    generator = torch.Generator().manual_seed(n)
    P, H, S = 3, 3, len(heads)
    R, M = S * n, S * n + 4
    x = torch.randn(H, n, D, generator=generator).to(device)
    if tokens_first:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(H)]).to(torch.int32).to(device)
    targets = torch.randperm(M, generator=generator)[:R].view(S, n).to(torch.int32).to(device)
    ranks = torch.randint(P, (S, n), generator=generator, dtype=torch.uint8).to(device)
    # A column of a table.
    way = Way(torch.tensor([[h, -1, -1] for h in heads], device=device).view(S, 3)[:, 0].long(), order, ranks, targets)
    found = []
    for ops in (reference, permute):
        # A block may begin anywhere.
        flat = [torch.full((M * D + odd,), 7.0, device=device)[odd if rank == 1 else 0 :] for rank in range(P)]
        blocks = shared([part[: M * D].view(1, M, D) for part in flat], device)
        assert blocks.aligned == (odd == 0)
        ops.scatter_among(x, way, blocks)
        home = torch.full_like(x, 7.0)
        ops.gather_among(blocks, way, home)
        found.append([*blocks.blocks, home])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
    *blocks_found, home = found[1]
    assert sum(int((block != 7.0).all(-1).sum()) for block in blocks_found) == R
    for head in range(H):
        assert torch.equal(home[head], x[head] if head in heads else torch.full_like(x[head], 7.0))


def test_what_has_no_span_or_two_goes_nowhere_or_to_two_ranks(device: torch.device) -> None:
    x = torch.arange(12.0, device=device).view(2, 3, 2)
    order = torch.tensor([[0, 1, 2], [2, 0, 1]], dtype=torch.int32, device=device)
    ranks = torch.tensor([[0, 0, 0], [1, 1, 1]], dtype=torch.uint8, device=device)
    targets = torch.tensor([[0, 1, 2], [4, 3, 2]], dtype=torch.int32, device=device)
    for ops in (reference, permute):
        blocks = shared([torch.full((1, 5, 2), 7.0, device=device) for _ in range(2)], device)
        ops.scatter_among(x, Way(torch.tensor([1, 1], device=device), order, ranks, targets), blocks)
        assert blocks.blocks[0][0, :, 0].tolist() == [10.0, 6.0, 8.0, 7.0, 7.0]
        assert blocks.blocks[1][0, :, 0].tolist() == [7.0, 7.0, 8.0, 6.0, 10.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"order": torch.zeros(2, 4, dtype=torch.int32)}, r"order must be int32 \[2, 3\]"),
        ({"targets": torch.zeros(1, 3)}, r"targets must be int32 \[1, 3\], not torch.float32"),
        ({"ranks": torch.zeros(1, 3, dtype=torch.int32)}, r"ranks must be uint8 \[1, 3\], not torch.int32 \[1, 3\]"),
    ],
)
def test_a_way_fits_the_rows(changed: dict[str, torch.Tensor], message: str) -> None:
    x, blocks = torch.zeros(2, 3, 4), shared([torch.zeros(1, 9, 4)], torch.device("cpu"))
    index = torch.zeros(1, 3, dtype=torch.int32)
    way = Way(torch.zeros(1, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int32), index.to(torch.uint8), index)
    for ops in (reference, permute):
        with pytest.raises(ValueError, match=message):
            ops.scatter_among(x, way._replace(**changed), blocks)
        with pytest.raises(ValueError, match="rows must be contiguous torch.float32 of 4, not torch.float32 of 4"):
            ops.gather_among(blocks, way, torch.zeros(2, 4, 3).transpose(1, 2))
        with pytest.raises(ValueError, match="rows must be contiguous torch.float32 of 4, not torch.float16 of 4"):
            ops.gather_among(blocks, way, x.half())


def test_blocks_of_one_dtype_are_shared() -> None:
    with pytest.raises(ValueError, match="blocks must be contiguous and of one dtype"):
        shared([torch.zeros(1, 2, 4), torch.zeros(1, 2, 4, dtype=torch.bfloat16)], torch.device("cpu"))
