"""What must hold before an op is timed: its result against fp32 (or fp64) PyTorch, on sampled heads and rows."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semvid.kernels.layout import BlockMap, Clusters, Permutation

# Sampled query rows a head, sampled tokens a head, sampled heads.
ROWS, TOKENS, HEADS = 64, 256, 3
# Weights and outputs are rounded to bf16, each by at most 2^-8; their errors add up like noise.
ATTENTION_BOUND = 1e-2
# Norm and result are rounded to bf16, each by at most 2^-8, and a turn changes no length. Triton's interpreter, which
# cuts off, errs a little more.
TURNED_BOUND = 1e-2
# Sums of up to some thousand fp32 numbers, in any order.
SUMS_BOUND = 1e-5
# Centroids may be rounded to bf16 for the matrix unit: see `assign` in kernels/kmeans.py. Some more for fp32 rounding.
LABELS_BOUND = 2.0**-8 + 1e-5
# Clusters on the edge of p: sums of masses differ by rounding.
MAP_BOUND = 1e-4


class Check(NamedTuple):
    """An error and how large it may be."""

    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.error <= self.bound


class Rows(NamedTuple):
    """What attention must give for sampled tokens."""

    tokens: Tensor
    """int64 [H, R]."""
    out: Tensor
    """fp32 [H, R, D]."""
    lse: Tensor
    """fp32 [H, R], natural log."""


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, memory from torch.empty and torch.empty_like is full of NaN (integers: -7777), so that gaps show."""
    plain: dict[str, Callable[..., Tensor]] = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(math.nan)
            return x.fill_(-7777) if x.dtype in (torch.int16, torch.int32, torch.int64) else x

        return poisoned

    try:
        for name, allocate in plain.items():
            setattr(torch, name, poisoning(allocate))
        yield
    finally:
        for name, allocate in plain.items():
            setattr(torch, name, allocate)


def worst(*checks: Check) -> Check:
    """Returns the check whose error is the largest beside its bound; one that fails, if any does."""
    failed = [check for check in checks if not check.passed]
    return max(failed or checks, key=lambda check: check.error / max(check.bound, 1e-30))


def sampled_heads(H: int) -> list[int]:
    """Returns up to HEADS heads; the first and the last (whose addresses are the largest) among them."""
    return sorted({round(i * (H - 1) / max(1, HEADS - 1)) for i in range(HEADS)})


def sampled_tokens(H: int, N: int, count: int, device: torch.device) -> Tensor:
    """Returns up to `count` tokens a head, int64 [H, n]; the first and the last among them."""
    generator = torch.Generator(device).manual_seed(count)
    tokens = torch.rand(H, N, generator=generator, device=device).topk(min(count, N), dim=-1).indices
    tokens[:, 0], tokens[:, -1] = 0, N - 1
    return tokens


def true_rows(
    q: Tensor, k: Tensor, v: Tensor, sparse: tuple[BlockMap, Tensor, Tensor] | None = None, scale: float | None = None
) -> Rows:
    """Returns attention of sampled tokens by fp32 PyTorch, from masks of tokens: no order, run or plan is in it.

    Args:
        q: [H, N, D], in token order; k and v likewise.
        k: keys.
        v: values.
        sparse: the map and the labels of queries and keys, int32 [H, N]; None is dense. Every row selects something.
        scale: of the scores; 1/√D if absent.
    """
    H, N, D = q.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    tokens = sampled_tokens(H, N, ROWS, q.device)
    outs, lses = [], []
    for h in range(H):
        scores = q[h, tokens[h]].float() * scale @ k[h].float().mT
        if sparse is not None:
            block_map, q_labels, k_labels = sparse
            computed = block_map.selected[h, q_labels[h, tokens[h]].long()][:, k_labels[h].long()]
            scores.masked_fill_(~computed, -math.inf)
        lses.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ v[h].float())
    return Rows(tokens, torch.stack(outs), torch.stack(lses))


def check_rows(out: Tensor, lse: Tensor | None, truth: Rows) -> Check:
    """Returns the largest relative error ‖out - true‖ / ‖true‖ of a sampled row, and that of the lse if there is one.

    Args:
        out: [H, N, D], in token order. Infinite or NaN anywhere, sampled or not, fails.
        lse: fp32 [H, N], or None.
        truth: from `true_rows`.
    """
    what = f"row of out, {truth.tokens.shape[1]} a head"
    if not torch.isfinite(out).all() or (lse is not None and lse.isnan().any()):
        return Check("NaN or infinity in out", math.inf, ATTENTION_BOUND)
    got = out.gather(1, truth.tokens[..., None].expand(-1, -1, out.shape[-1])).float()
    # A row that averages many values is near 0, and its error is not smaller: it counts as a usual one.
    size = truth.out.norm(dim=-1)
    size = size.maximum(size.mean(-1, keepdim=True))
    error = ((got - truth.out).norm(dim=-1) / size).max().item()
    if lse is None:
        return Check(what, error, ATTENTION_BOUND)
    gap = (lse.gather(1, truth.tokens) - truth.lse).abs().max().item()
    return worst(Check(what, error, ATTENTION_BOUND), Check("lse", gap, ATTENTION_BOUND))


def check_labels(x: Tensor, centroids: Tensor, labels: Tensor) -> Check:
    """Returns how much farther than the nearest centroid a sampled token's own is, over the two centroids' norms.

    Rounding the centroids to bf16 explains 2^-8; equal distances are thus no error.

    Args:
        x: [H, N, D].
        centroids: fp32 [H, C, D].
        labels: integers [H, N]; one out of range anywhere fails.
    """
    (H, N, D), C = x.shape, centroids.shape[1]
    if labels.min() < 0 or labels.max() >= C:
        return Check("label out of range", math.inf, LABELS_BOUND)
    tokens = sampled_tokens(H, N, TOKENS, x.device)
    rows = x.gather(1, tokens[..., None].expand(-1, -1, D)).double()
    distances = torch.cdist(rows, centroids.double())
    chosen = labels.gather(1, tokens).long()[..., None]
    best = distances.argmin(-1, keepdim=True)
    farther = distances.gather(-1, chosen) - distances.gather(-1, best)
    norms = centroids.double().norm(dim=-1)[:, None, :].expand_as(distances)
    error = (farther / (norms.gather(-1, chosen) + norms.gather(-1, best))).max().item()
    return Check("distance to the centroid", error, LABELS_BOUND)


def check_sums(x: Tensor, labels: Tensor, sums: Tensor, counts: Tensor) -> Check:
    """Returns the relative error of cluster sums in sampled heads against fp64; counts must be exact.

    Args:
        x: [H, N, D].
        labels: int32 [H, N].
        sums: [H, C, D].
        counts: int32 [H, C].
    """
    error = 0.0
    for h in sampled_heads(x.shape[0]):
        true = torch.zeros_like(sums[h], dtype=torch.float64).index_add_(0, labels[h].long(), x[h].double())
        if not torch.equal(labels[h].bincount(minlength=counts.shape[1]), counts[h].long()):
            return Check("counts", math.inf, 0.0)
        error = max(error, ((sums[h] - true).norm() / true.norm()).item())
    finite = torch.isfinite(sums).all().item()
    return Check("cluster sums", error if finite else math.inf, SUMS_BOUND)


def check_clusters(x: Tensor, starts: Tensor, clusters: Clusters) -> Check:
    """Returns whether one k-means iteration from `starts` gave these clusters: labels, and the means of those labels.

    Args:
        x: [H, N, D].
        starts: fp32 [H, C, D].
        clusters: the result.
    """
    labels, centroids, sizes, _ = clusters
    # An empty cluster keeps its centroid: times its size it counts 0 on both sides.
    means = check_sums(x, labels, centroids.double() * sizes[..., None], sizes)
    kept = torch.where((sizes == 0)[..., None], centroids - starts, 0.0).abs().max().item()
    return worst(check_labels(x, starts, labels), means, Check("centroid of an empty cluster", kept, 0.0))


def check_equal(got: Tensor, true: Tensor, what: str = "elements that differ") -> Check:
    """Returns the share of elements that differ; none may."""
    if got.shape != true.shape or got.dtype != true.dtype:
        return Check(f"{got.dtype} {list(got.shape)}, not {true.dtype} {list(true.shape)}", math.inf, 0.0)
    return Check(what, (got != true).sum().item() / max(1, got.numel()), 0.0)


def check_order(labels: Tensor, got: Permutation, true: Permutation) -> Check:
    """Returns the share of places that differ from the only stable order of `labels`; none may."""
    assert labels.shape == true.order.shape
    return worst(check_equal(got.order, true.order), check_equal(got.offsets, true.offsets))


def check_map(got: BlockMap, true: BlockMap) -> Check:
    """Returns the share of (query, key) cluster pairs that differ; those on the edge of p may."""
    return check_equal(got.selected, true.selected)._replace(bound=MAP_BOUND)


def check_turned(x: Tensor, weight: Tensor, eps: float, cosines: Tensor, sines: Tensor, got: Tensor) -> Check:
    """Returns the largest relative error of a head of a sampled token against fp64, its pairs as complex numbers.

    Args:
        x: [1, N, H·D], before the norm.
        weight: [H·D], of the norm.
        eps: of the norm.
        cosines: fp32 [N, D], each value twice.
        sines: likewise.
        got: [H, N, D]. Infinite or NaN anywhere, sampled or not, fails.
    """
    if not torch.isfinite(got).all():
        return Check("NaN or infinity in out", math.inf, TURNED_BOUND)
    N, D = cosines.shape
    tokens = sampled_tokens(1, N, TOKENS, x.device)[0]
    wide = x[0, tokens].double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    turn = torch.complex(cosines[tokens, ::2].double(), sines[tokens, ::2].double())
    turned = torch.view_as_complex(normed.view(len(tokens), -1, D // 2, 2)) * turn[:, None]
    true = torch.view_as_real(turned).flatten(-2).transpose(0, 1)
    error = ((got[:, tokens] - true).norm(dim=-1) / true.norm(dim=-1)).max().item()
    return Check(f"turned head, {len(tokens)} tokens", error, TURNED_BOUND)


def check_moved(x: Tensor, order: Tensor, got: Tensor, *, scatter: bool = False) -> Check:
    """Returns the share of elements that `gather_rows` (or `scatter_rows`) got wrong in sampled heads; no NaN may be.

    Args:
        x: [H, N, D], what was moved.
        order: int32 [H, N].
        got: [H, N, D].
        scatter: out[order[i]] = x[i], and not out[i] = x[order[i]].
    """
    if got.isnan().any():
        return Check("NaN in out", math.inf, 0.0)
    checks = []
    for h in sampled_heads(x.shape[0]):
        place = order[h].long()
        checks.append(check_equal(got[h][place] if scatter else got[h], x[h] if scatter else x[h][place]))
    return worst(*checks)
