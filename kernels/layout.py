"""The nouns: tensors that travel together, their shapes said once, and the checks that refuse wrong ones.

H heads (the batch folded in), N tokens, D head dim, C clusters, Cq and Ck query and key clusters.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_LARGEST = float(torch.finfo(FP8).max)


class Permutation(NamedTuple):
    """A stable order of tokens by label: the tokens of a cluster are one run."""

    order: Tensor
    """int32 [H, N]: order[h, i] is the token that stands at sorted position i."""
    offsets: Tensor
    """int32 [H, C + 1]: cluster c is the run offsets[h, c] .. offsets[h, c + 1]."""


class Clusters(NamedTuple):
    """Tokens of every head divided by k-means."""

    labels: Tensor
    """int32 [H, N]: the cluster of each token."""
    centroids: Tensor
    """fp32 [H, C, D]: the mean of each cluster's tokens; an empty cluster keeps the centroid it had. Those that a job
    remembers are in the dtype of its tokens."""
    sizes: Tensor
    """int32 [H, C]: tokens in each cluster, over all ranks."""
    permutation: Permutation
    """The local tokens in the order of their labels."""


class Rows8(NamedTuple):
    """A matrix by rows in FP8, each row with a scale of its own."""

    values: Tensor
    """float8_e4m3fn [..., K]."""
    scales: Tensor
    """fp32 [..., 1]: value · scale is what was meant."""

    @property
    def shape(self) -> torch.Size:
        """Of the values: what asks a tensor for its shape may be handed rows in FP8."""
        return self.values.shape


class BlockMap(NamedTuple):
    """Which (query cluster, key cluster) pairs are computed."""

    selected: Tensor
    """bool [H, Cq, Ck]; an empty key cluster is never selected."""


class Plan(NamedTuple):
    """What `attention` computes: the runs of both sides, the map, and the lists a backend walks."""

    q_offsets: Tensor
    """int32 [H, Cq + 1]."""
    k_offsets: Tensor
    """int32 [H, Ck + 1]."""
    block_map: BlockMap
    """bool [H, Cq, Ck]."""
    lists: tuple[Tensor, ...] = ()
    """Made by a backend's `plan` for its own `attention`; the reference needs none."""


class Tail(NamedTuple):
    """Stand-ins for the key clusters that a query cluster does not compute (one extra column per cluster)."""

    k_mean: Tensor
    """fp32 [H, Ck, D]: mean key."""
    v_mean: Tensor
    """fp32 [H, Ck, D]: mean value."""
    log_n: Tensor
    """fp32 [H, Ck]: natural log of the cluster's size; -inf for an empty cluster."""


class Shared(NamedTuple):
    """A block of memory on each rank, all mapped into this one."""

    blocks: list[Tensor]
    """Contiguous [1, M, D] each, of one dtype."""
    steps: Tensor
    """int64 [P]: elements from the first block to each."""
    aligned: bool
    """Whether all begin at a multiple of 16 bytes and 16 elements from the first."""


class Way(NamedTuple):
    """Where on which rank the rows of [H, n, D] belong: all rows of a head for each of S spans."""

    heads: Tensor
    """int64 [S], may be strided: whose rows a span has."""
    order: Tensor
    """int32 [H, n]: the tokens of each head in the order in which a span lists them."""
    ranks: Tensor
    """uint8 [S, n]."""
    targets: Tensor
    """int32 [S, n]: the row in that rank's block."""


def shared(blocks: list[Tensor], device: torch.device) -> Shared:
    """Returns each rank's block with the way from one to the next.

    Args:
        blocks: of all ranks.
        device: this rank's own.

    Raises:
        ValueError: a block is not contiguous, or of another dtype than the first.
    """
    if any(block.dtype != blocks[0].dtype or not block.is_contiguous() for block in blocks):
        raise ValueError(f"blocks must be contiguous and of one dtype, not {[block.dtype for block in blocks]}")
    places, size = [block.data_ptr() for block in blocks], blocks[0].element_size()
    steps = [(place - places[0]) // size for place in places]
    found = torch.tensor(steps, dtype=torch.int64, device=device)
    return Shared(blocks, found, all(p % 16 == 0 for p in places) and all(step % 16 == 0 for step in steps))


def check_way(x: Tensor, way: Way, blocks: Shared) -> tuple[int, int, int]:
    """Returns (S, n, D) of rows of x that go to blocks or come from them.

    Raises:
        ValueError: a shape or dtype does not fit the others, or a row of x is not contiguous.
    """
    H, n, D = check_rows("x", x)
    (S,), far = way.heads.shape, blocks.blocks[0]
    check_index("order", way.order, (H, n))
    check_index("targets", way.targets, (S, n))
    if way.ranks.dtype != torch.uint8 or tuple(way.ranks.shape) != (S, n):
        raise ValueError(f"ranks must be uint8 [{S}, {n}], not {way.ranks.dtype} {list(way.ranks.shape)}")
    if far.dtype != x.dtype or far.shape[2] != D or (D > 1 and x.stride(2) != 1):
        raise ValueError(f"rows must be contiguous {far.dtype} of {far.shape[2]}, not {x.dtype} of {D}")
    return S, n, D


def check_rows(name: str, x: Tensor) -> tuple[int, int, int]:
    """Returns (H, N, D) of a floating [H, N, D] tensor.

    Raises:
        ValueError: `x` has another number of dimensions or is not floating.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating [H, N, D] tensor, not {x.dtype} {list(x.shape)}")
    return x.shape[0], x.shape[1], x.shape[2]


def check_index(name: str, index: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `index` is an int32 tensor of `shape`."""
    if index.dtype != torch.int32 or tuple(index.shape) != shape:
        raise ValueError(f"{name} must be int32 {list(shape)}, not {index.dtype} {list(index.shape)}")


def check_update(sums: Tensor, counts: Tensor, previous: Tensor, out: Tensor | None) -> None:
    """Raises ValueError unless the inputs of `centroids_of` fit each other."""
    for name, x in (("sums", sums), ("previous", previous), ("out", sums if out is None else out)):
        if x.dtype != torch.float32 or x.shape != sums.shape or x.ndim != 3:
            raise ValueError(f"{name} must be float32 {list(sums.shape)}, not {x.dtype} {list(x.shape)}")
    if counts.dtype not in (torch.int32, torch.float32) or counts.shape != sums.shape[:2]:
        wanted = list(sums.shape[:2])
        raise ValueError(f"counts must be int32 or float32 {wanted}, not {counts.dtype} {list(counts.shape)}")
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out must be contiguous, its strides are {out.stride()}")


def check_budget(p: float | Tensor, floor: float | Tensor, bias: Tensor | None, H: int, Ck: int) -> None:
    """Raises ValueError unless `p` and `floor`, where they are tensors, are fp32 [H] and `bias` fp32 [H, Ck]."""
    for name, x, shape in (("p", p, (H,)), ("floor", floor, (H,)), ("bias", bias, (H, Ck))):
        if isinstance(x, Tensor) and (x.dtype != torch.float32 or tuple(x.shape) != shape):
            raise ValueError(f"{name} must be fp32 {list(shape)}, not {x.dtype} {list(x.shape)}")


def least_clusters(floor: float | Tensor, H: int, Ck: int, device: torch.device) -> Tensor:
    """Returns how many of Ck key clusters a floor keeps in each head, int32 [H]: its share of them, rounded up.

    A number is taken as fp32, so that it keeps what a tensor of it keeps. Does not wait for the device.

    Args:
        floor: 0 .. 1; of each head if it is a tensor, fp32 [H].
        H: heads.
        Ck: key clusters of a head, less than 2^22.
        device: of what is returned.
    """
    share = floor if isinstance(floor, Tensor) else torch.tensor(floor, dtype=torch.float32, device="cpu")
    # fp32 is within 2^-25 of the share that is meant: what is over by no more than that is not rounded up, so that 0.1
    # of 1000 keeps 100 clusters and not 101.
    least = ((share.double() - 2.0**-24) * Ck).ceil().int()
    if isinstance(floor, Tensor):
        return least
    return torch.full((H,), int(least), dtype=torch.int32, device=device)


def check_plan(q_offsets: Tensor, k_offsets: Tensor, block_map: BlockMap) -> tuple[int, int, int]:
    """Returns (H, Cq, Ck) of the inputs of `plan`.

    Raises:
        ValueError: a shape or dtype does not fit the others; the message names it.
    """
    H, Cq, Ck = block_map.selected.shape
    if block_map.selected.dtype != torch.bool:
        raise ValueError(f"block_map must be bool [H, Cq, Ck], not {block_map.selected.dtype}")
    check_index("q_offsets", q_offsets, (H, Cq + 1))
    check_index("k_offsets", k_offsets, (H, Ck + 1))
    return H, Cq, Ck


def check_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[int, int, int, int]:
    """Returns (H, Nq, Nk, D) of the inputs of `attention`.

    Raises:
        ValueError: a shape or dtype does not fit the others; the message names it.
    """
    H, Nq, D = check_rows("q", q)
    Nk = k.shape[1] if k.ndim == 3 else -1
    if tuple(k.shape) != (H, Nk, D) or v.shape != k.shape:
        raise ValueError(f"k and v must both be [{H}, Nk, {D}], not {list(k.shape)} and {list(v.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if plan.q_offsets.shape[0] != H:
        raise ValueError(f"the plan is for {plan.q_offsets.shape[0]} heads, q has {H}")
    return H, Nq, Nk, D


def result_like(q: Tensor, out: Tensor | None) -> Tensor:
    """Returns `out`, or new contiguous memory of q's shape and dtype if it is None.

    Raises:
        ValueError: `out` is not contiguous or differs from q.
    """
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {q.dtype} {list(q.shape)}, not {out.dtype} {list(out.shape)}")
    return out


def new_rows8(x: Tensor) -> Rows8:
    """Returns rows of x's shape in FP8, not yet written."""
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    return Rows8(values, torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device))


def check_same(name: str, t: Tensor | None, x: Tensor) -> None:
    """Raises ValueError if t is there and has another shape or dtype than x."""
    if t is not None and (t.shape != x.shape or t.dtype != x.dtype):
        raise ValueError(f"{name} must be {x.dtype} {list(x.shape)}, not {t.dtype} {list(t.shape)}")


def check_per_row(name: str, t: Tensor, x: Tensor) -> Tensor:
    """Returns t over the rows of x [B, N, C], [B, N, C] with strides of 0 where it is the same for all.

    Raises:
        ValueError: t is neither [C] nor [1 or B, 1 or N, C].
    """
    C = x.shape[-1]
    fits = all(have in (1, want) for have, want in zip(t.shape[:-1], x.shape, strict=False))
    if t.dim() not in (1, 3) or t.shape[-1] != C or not fits:
        raise ValueError(f"{name} must be [{C}] or [1 or {x.shape[0]}, 1 or {x.shape[1]}, {C}], not {list(t.shape)}")
    return (t if t.stride(-1) == 1 else t.contiguous()).expand(x.shape)


def check_rotary(x: Tensor, weight: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> tuple[int, int, int]:
    """Returns (B, N, D) of the inputs of `norm_rotary`.

    Raises:
        ValueError: a shape or dtype does not fit the others; the message names it.
    """
    B, N, width = check_rows("x", x)
    D = width // heads
    if D * heads != width or D % 2:
        raise ValueError(f"x is {width} wide; accepted: heads · D with D even, heads {heads}")
    if tuple(weight.shape) not in ((width,), (D,)):
        raise ValueError(f"weight must be [{width}], or [{D}] for a norm of each head, not {list(weight.shape)}")
    for name, angles in (("cosines", cosines), ("sines", sines)):
        if tuple(angles.shape) != (N, D) or angles.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 [{N}, {D}], not {angles.dtype} {list(angles.shape)}")
    return B, N, D
