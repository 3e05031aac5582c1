"""What each self-attention call does: dense, clusters refreshed, or clusters reused. Pure; no tensor, no GPU."""

import math
from dataclasses import dataclass

from semvid.runtime.config import AttentionConfig


@dataclass(frozen=True, slots=True)
class Dense:
    """The model's own attention."""


@dataclass(frozen=True, slots=True)
class Refresh:
    """k-means for so many iterations; `seeded`: from random tokens instead of the cached centroids."""

    iterations: int
    seeded: bool


@dataclass(frozen=True, slots=True)
class Reuse:
    """Labels and map of an earlier step, as they are."""


Decision = Dense | Refresh | Reuse


def num_dense_steps(config: AttentionConfig, steps: int) -> int:
    """Returns how many of `steps` steps, from the first, are dense: ⌊dense_steps · steps⌋, as SVG2's authors round."""
    # Rounded first, so that 0.29 · 100 is 29 and not 28.
    return math.floor(round(config.dense_steps * steps, 6))


def decide(config: AttentionConfig, *, step: int, steps: int, layer: int, has_clusters: bool) -> Decision:
    """Returns what layer `layer` does at step `step`; the same for every branch and rank.

    Args:
        config: the policy.
        step: 0 .. steps - 1.
        steps: denoising steps in all.
        layer: index of the transformer block.
        has_clusters: whether this layer and branch have clusters from an earlier step of this job.
    """
    first = num_dense_steps(config, steps)
    if config.method == "dense" or layer < config.dense_layers or step < first:
        return Dense()
    if not has_clusters:
        return Refresh(config.first_iterations, seeded=True)
    if (step - first) % config.refresh_every:
        return Reuse()
    return Refresh(config.iterations, seeded=False)
