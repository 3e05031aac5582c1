"""Recorded densities in a model of random weights: each layer's map is made, and then replaced by a drawn one."""

import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import BlockMap
from semvid.launch.bench.options import LEAST_DENSITY
from semvid.launch.bench.workload import TRACES, draw_block_map, scaled_to_mean
from semvid.parallel.maps import own_heads, pack_bits
from semvid.parallel.ranks import Ranks
from semvid.runtime.models.published import Published

SOURCE = "first-step traces of SVG2 at 115,200 tokens; each layer takes the recorded one nearest to it"


def layer_densities(model: Published, layers: int, *, scale: float = 1.0, mean: float | None = None) -> Tensor:
    """Returns a density for each layer and head, fp64 [layers, H], 0 .. 1: the trace of the nearest recorded layer.

    For a number of heads that was not recorded evenly spaced ranks of it are taken.

    Args:
        model: whose; HunyuanVideo, Wan 1.3B and Wan 14B were recorded.
        layers: how many.
        scale: of all densities, as another preset's are to svg2's.
        mean: what they are scaled to instead, over all layers and heads.
    """
    traces = json.loads(TRACES.read_text(encoding="utf-8"))["traces"]
    heads, name = int(model.transformer["num_attention_heads"]), trace_model(model)
    recorded = [trace for trace in traces if trace["model"] == name]
    rows = []
    for layer in range(layers):
        nearest = min(recorded, key=lambda trace: (abs(trace["layer"] - layer), trace["layer"]))
        density = torch.tensor(nearest["density"], dtype=torch.float64)
        if len(density) != heads:
            ranks = (torch.arange(heads) + 0.5) / heads * len(density)
            density = density.sort().values[ranks.long()]
        rows.append(density)
    found = torch.stack(rows)
    if mean is None:
        return (found * scale).clamp(LEAST_DENSITY, 1.0)
    flat = found.flatten()
    return scaled_to_mean(flat, torch.ones_like(flat), torch.tensor(mean), LEAST_DENSITY, 1.0).view_as(found)


def trace_model(model: Published) -> str:
    """Returns the name of the traces that stand in for a model."""
    if model.family.joint:
        return "HunyuanVideo"
    return "Wan2.1-T2V-1.3B" if model.transformer["num_attention_heads"] <= 12 else "Wan2.1-T2V-14B"


class Replay:
    """Stands in for a backend's `top_p_map` in a whole model, and knows which layer calls.

    A layer's map is drawn at its first refresh and stays. The real map is made each time, so that its cost counts.
    """

    def __init__(self, ops: Ops, densities: Tensor, ranks: Ranks, seed: int) -> None:
        self.real = ops
        self.densities = densities
        self.ranks = ranks
        self.seed = seed
        self.layer = 0
        self.drawn: dict[int, Tensor] = {}

    def ops(self) -> Ops:
        """Returns the backend with the drawn maps."""
        return self.real._replace(top_p_map=self._map)

    def follow(self, attentions: list[Any]) -> None:
        """Notes from now on which of the attention modules computes.

        By hooks, since diffusers asks a processor's signature what to hand it.
        """
        for layer, attention in enumerate(attentions):
            attention.register_forward_pre_hook(partial(self._note, layer))

    def _note(self, layer: int, *_: Any) -> None:
        self.layer = layer

    def _map(self, q_centroids: Tensor, k_centroids: Tensor, k_sizes: Tensor, *rule: Any, **more: Any) -> BlockMap:
        self.real.top_p_map(q_centroids, k_centroids, k_sizes, *rule, **more)
        if self.layer not in self.drawn:
            # In bits: what a benchmark keeps is not to be seen in a model's peak memory.
            self.drawn[self.layer] = pack_bits(self._draw(q_centroids, k_sizes))
        bits = self.drawn[self.layer]
        heads = torch.arange(bits.shape[0], device=bits.device)
        return BlockMap(self.real.unpack_map(bits, heads, k_sizes.shape[1]) & (k_sizes > 0)[:, None])

    def _draw(self, q_centroids: Tensor, k_sizes: Tensor) -> Tensor:
        """Returns a map of the heads whose maps this rank makes, with the layer's densities."""
        H, Cq, _ = q_centroids.shape
        densities = self.densities[self.layer].to(k_sizes.device)
        if self.ranks.mesh.sequence > 1:
            densities = densities[own_heads(len(densities), self.ranks, k_sizes.device)]
        else:
            # A batch is folded into the heads.
            densities = densities.repeat(H // len(densities))
        seed = (self.seed * 1000 + self.layer) * 1000 + self.ranks.shard
        generator = torch.Generator(k_sizes.device).manual_seed(seed)
        even = torch.ones(H, Cq, dtype=torch.int32, device=k_sizes.device)
        return draw_block_map(even, k_sizes, densities, generator).selected
