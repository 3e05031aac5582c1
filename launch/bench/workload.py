"""Attention inputs as uneven as real ones: clusters of skewed sizes, block maps with recorded per-head densities."""

import json
import math
from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.dispatch import select
from semvid.kernels.layout import BlockMap, Clusters
from semvid.launch.bench.options import LEAST_DENSITY, Shape
from semvid.parallel.kmeans import refine
from semvid.runtime.config import AttentionConfig
from semvid.runtime.settings import CONFIGS

TRACES = CONFIGS / "traces" / "head_densities.json"
# Cluster sizes are lognormal. With 0.8, padding clusters of 76 keys on average to 64 and 128 wastes 43 and 101 %, and
# clusters of 252 queries 12 and 24 %: as measured on Wan's own clusters (42-49, 73-107, 12 and 26 %).
SIZE_SPREAD = 0.8
# Tokens stand twice as far from their cluster's mean, per dimension, as the means from 0: some are nearer to another
# mean, and attention is neither flat nor on one key.
MEAN_SCALE, NOISE_SCALE = 0.7, 1.4
# How far centroids of the step before stand from the means of this one.
DRIFT = 0.1
# Rows of a head differ in density by e to the power of this, typically.
ROW_SPREAD = 0.5
# Wan's, of the norm of queries and keys.
NORM_EPS = 1e-6


class Workload(NamedTuple):
    """One call's inputs, and what is known about them by the reference."""

    shape: Shape
    config: AttentionConfig
    q: Tensor
    """bf16 [H, N, D], tokens in the model's order; k and v likewise."""
    k: Tensor
    v: Tensor
    q_starts: Tensor
    """fp32 [H, Cq, D]: the centroids of the step before, which k-means starts from; k_starts likewise."""
    k_starts: Tensor
    queries: Clusters
    """After two iterations of the reference; keys likewise."""
    keys: Clusters
    block_map: BlockMap
    """Drawn at random with the wanted densities; not the map of these centroids."""


class Projected(NamedTuple):
    """Queries and keys as a model projects them, before norm and rotary embedding."""

    q: Tensor
    """bf16 [1, N, H·D]; k likewise."""
    k: Tensor
    weight: Tensor
    """bf16 [H·D], of the norm; its eps is NORM_EPS."""
    cosines: Tensor
    """fp32 [N, D], each value twice; sines likewise."""
    sines: Tensor


def make(shape: Shape, config: AttentionConfig, density: float, seed: int, device: torch.device) -> Workload:
    """Returns the inputs of `shape`; the same for the same arguments, device type and PyTorch.

    Args:
        shape: what.
        config: with `query_clusters` and `key_clusters` written out.
        density: mean over the heads, LEAST_DENSITY .. 1.
        seed: of everything drawn.
        device: where it is made.
    """
    assert config.query_clusters is not None
    assert config.key_clusters is not None
    H, N, D, Cq, Ck = shape.heads, shape.tokens, shape.head_dim, config.query_clusters, config.key_clusters
    generator = torch.Generator(device).manual_seed(seed)
    k_means = MEAN_SCALE * torch.randn(H, Ck, D, generator=generator, device=device)
    # Queries resemble keys, as they do in a trained model: half of a query mean's square is that of a key mean.
    liked = torch.randint(Ck, (H, Cq, 1), generator=generator, device=device).expand(H, Cq, D)
    own = MEAN_SCALE * torch.randn(H, Cq, D, generator=generator, device=device)
    q_means = (k_means.gather(1, liked) + own) * 0.5**0.5
    q, k = (clustered_rows(means, N, generator) for means in (q_means, k_means))
    v = torch.randn(H, N, D, generator=generator, device=device, dtype=torch.bfloat16)
    starts = [m + DRIFT * torch.randn(m.shape, generator=generator, device=device) for m in (q_means, k_means)]
    reference = select("reference", device)
    queries, keys = refine([q, k], starts, 2, reference)
    densities = head_densities(shape, density).to(device)
    return Workload(
        shape=shape,
        config=config,
        q=q,
        k=k,
        v=v,
        q_starts=starts[0],
        k_starts=starts[1],
        queries=queries,
        keys=keys,
        block_map=draw_block_map(queries.sizes, keys.sizes, densities, generator),
    )


def project(work: Workload) -> Projected:
    """Returns the workload's q and k as if they were yet to be normed and turned, with random weights and angles."""
    H, N, D = work.q.shape
    generator = torch.Generator(work.q.device).manual_seed(D)
    angles = 2 * math.pi * torch.rand(N, D // 2, generator=generator, device=work.q.device)
    weight = 1 + 0.2 * torch.randn(H * D, generator=generator, device=work.q.device)
    q, k = (x.transpose(0, 1).reshape(1, N, H * D) for x in (work.q, work.k))
    cosines, sines = (part.repeat_interleave(2, dim=-1) for part in (angles.cos(), angles.sin()))
    return Projected(q, k, weight.to(q.dtype), cosines, sines)


def clustered_rows(means: Tensor, N: int, generator: torch.Generator) -> Tensor:
    """Returns N tokens a head around `means`, bf16 [H, N, D], in no order; how many belong to a mean is lognormal.

    Args:
        means: fp32 [H, C, D].
        N: tokens.
        generator: on the device of `means`.
    """
    H, C, D = means.shape
    device = means.device
    weights = (SIZE_SPREAD * torch.randn(H, C, generator=generator, device=device)).exp()
    rows = torch.empty(H, N, D, dtype=torch.bfloat16, device=device)
    for h in range(H):
        label = torch.multinomial(weights[h], N, replacement=True, generator=generator)
        rows[h] = means[h, label] + NOISE_SCALE * torch.randn(N, D, generator=generator, device=device)
    return rows


def head_densities(shape: Shape, mean: float) -> Tensor:
    """Returns a density for each head, fp64 [H]: those recorded with the shape's model, scaled to `mean`.

    Of the model's traces the one with the nearest mean is taken; for another number of heads, evenly spaced ranks of
    it. After scaling each is clipped to LEAST_DENSITY .. 1.
    """
    traces = json.loads(TRACES.read_text(encoding="utf-8"))["traces"]
    recorded = [trace["density"] for trace in traces if trace["model"] == shape.model]
    nearest = min(recorded, key=lambda density: abs(sum(density) / len(density) - mean))
    density = torch.tensor(nearest, dtype=torch.float64)
    if len(nearest) != shape.heads:
        ranks = (torch.arange(shape.heads) + 0.5) / shape.heads * len(nearest)
        density = density.sort().values[ranks.long()]
    return scaled_to_mean(density, torch.ones_like(density), torch.tensor(mean), LEAST_DENSITY, 1.0)


def scaled_to_mean(values: Tensor, weights: Tensor, mean: Tensor, low: float, high: float) -> Tensor:
    """Returns values · f clipped to low .. high, f such that their weighted mean over the last dimension is `mean`.

    Args:
        values: positive, fp64 [..., n].
        weights: not negative, [..., n].
        mean: [...], between low and high.
    """
    log_low = torch.full_like(values[..., :1], -20.0)
    log_high = -log_low
    for _ in range(60):
        middle = (log_low + log_high) / 2
        reached = (values * middle.exp()).clamp(low, high).mul(weights).sum(-1, keepdim=True)
        enough = reached >= mean[..., None] * weights.sum(-1, keepdim=True)
        log_low, log_high = torch.where(enough, log_low, middle), torch.where(enough, middle, log_high)
    return (values * log_high.exp()).clamp(low, high)


def draw_block_map(q_sizes: Tensor, k_sizes: Tensor, densities: Tensor, generator: torch.Generator) -> BlockMap:
    """Returns a random map whose density in head h is densities[h], to within a cluster; its rows differ.

    Some key clusters are liked by many query clusters and others by few; neighbours in number have nothing in common,
    as k-means numbers clusters at random.

    Args:
        q_sizes: int32 [H, Cq].
        k_sizes: int32 [H, Ck].
        densities: fp64 [H].
        generator: on the device of the sizes.
    """
    (H, Cq), Ck, device = q_sizes.shape, k_sizes.shape[1], q_sizes.device
    spread = (ROW_SPREAD * torch.randn(H, Cq, generator=generator, device=device)).double().exp()
    wanted = scaled_to_mean(spread * densities[:, None], q_sizes, densities, LEAST_DENSITY, 1.0)
    liking = torch.randn(H, 1, Ck, generator=generator, device=device)
    liking = liking + torch.randn(H, Cq, Ck, generator=generator, device=device)
    occupied = (k_sizes > 0)[:, None, :].expand(H, Cq, Ck)
    ranked = liking.masked_fill(~occupied, -torch.inf).argsort(dim=-1, descending=True)
    sizes = k_sizes[:, None, :].expand(H, Cq, Ck).gather(-1, ranked)
    # A cluster is taken if its middle still fits, so that densities are neither too high nor too low on average.
    middle = sizes.cumsum(-1) - sizes / 2
    keep = middle <= wanted[..., None] * k_sizes.sum(-1)[:, None, None]
    keep[..., 0] = True
    return BlockMap(torch.zeros_like(keep).scatter_(-1, ranked, keep) & occupied)


def computed_pairs(block_map: BlockMap, q_sizes: Tensor, k_sizes: Tensor) -> int:
    """Returns how many (query, key) pairs the map computes, over all heads."""
    q, k = q_sizes.double(), k_sizes.double()
    return round(torch.einsum("hq,hqk,hk->", q, block_map.selected.double(), k).item())


def padded_pairs(
    block_map: BlockMap, q_sizes: Tensor, k_sizes: Tensor, *, rows: int, keys: int, halve: bool = False
) -> int:
    """Returns how many pairs a kernel computes that pads: the tiles it walks, times their area.

    Args:
        block_map: the map; q_sizes int32 [H, Cq] and k_sizes int32 [H, Ck] are its clusters.
        rows: queries of a tile; a query cluster begins a new one.
        keys: keys of a tile; the selected keys of a query cluster follow each other without gaps.
        halve: whether a rest of at most rows / 2 queries takes half a tile.
    """
    rest = q_sizes % rows
    last = torch.where((rest <= rows // 2) & halve, rows // 2, rows)
    padded_rows = (q_sizes - rest + torch.where(rest > 0, last, 0)).double()
    num_keys = torch.einsum("hqk,hk->hq", block_map.selected.double(), k_sizes.double())
    padded_keys = (num_keys / keys).ceil() * keys
    return round((padded_rows * padded_keys).sum().item())
