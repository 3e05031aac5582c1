"""What each self-attention call does: dense, clusters refreshed, or clusters reused. Pure; no tensor, no GPU."""

import math
from dataclasses import dataclass

from semvid.runtime.config import AttentionConfig


@dataclass(frozen=True, slots=True)
class Dense:
    """The model's own attention."""


@dataclass(frozen=True, slots=True)
class Refresh:
    """k-means for so many iterations; `seeded`: from tokens instead of the cached centroids."""

    iterations: int
    seeded: bool


@dataclass(frozen=True, slots=True)
class Reuse:
    """Labels and map of an earlier step, as they are."""


Decision = Dense | Refresh | Reuse


def num_dense_steps(config: AttentionConfig, steps: int) -> int:
    """Returns how many of `steps` steps, from the first, are dense.

    ⌊dense_steps · steps⌋, as SVG2's authors round, but at least `least_dense_steps`, or half of all where that is less.
    """
    # Rounded first, so that 0.29 · 100 is 29 and not 28.
    share = math.floor(round(config.dense_steps * steps, 6))
    return max(share, min(config.least_dense_steps, steps // 2))


@dataclass(frozen=True, slots=True)
class Refreshed:
    """The last refresh of a layer and branch: all of the past that a decision reads."""

    step: int
    interval: int
    """Steps since the refresh before it, as they were planned; 0: it was seeded."""
    drift: float | None
    """Share of the labels that it changed, 0 .. 1; None if it was seeded, or nobody counts."""


def decide(config: AttentionConfig, *, step: int, steps: int, layer: int, last: Refreshed | None) -> Decision:
    """Returns what layer `layer` does at step `step`; the same for every rank of a branch and for every rerun.

    Args:
        config: the policy.
        step: 0 .. steps - 1.
        steps: denoising steps in all.
        layer: index of the transformer block.
        last: the last refresh of this layer and branch, at an earlier step of this job; None before the first.
    """
    if config.method == "dense" or layer < config.dense_layers or step < num_dense_steps(config, steps):
        return Dense()
    if last is None:
        return Refresh(config.first_iterations, seeded=True)
    if step < last.step + next_interval(config, last):
        return Reuse()
    return Refresh(config.iterations, seeded=False)


def next_interval(config: AttentionConfig, last: Refreshed) -> int:
    """Returns how many steps after `last` the next refresh comes, by the policy."""
    if config.refresh == "fixed" or last.interval == 0:
        return config.refresh_every
    if config.refresh == "growing":
        return min(config.refresh_most, math.ceil(round(last.interval * config.refresh_growth, 6)))
    assert last.drift is not None, "this policy counts the labels that change"
    if last.drift > config.drift:
        return max(1, last.interval // 2)
    return min(config.refresh_most, 2 * last.interval) if last.drift < config.drift / 2 else last.interval


def plan(config: AttentionConfig, steps: int, layers: int, drift: float = 0.0) -> list[list[Decision]]:
    """Returns what every layer does at every step of a job, [layers][steps]; the branches do alike.

    Args:
        config: the policy.
        steps: denoising steps in all.
        layers: transformer blocks.
        drift: what every refresh is taken to change, where the policy asks for it.
    """
    return [_plan_layer(config, steps, layer, drift) for layer in range(layers)]


def _plan_layer(config: AttentionConfig, steps: int, layer: int, drift: float) -> list[Decision]:
    decisions, last = [], None
    for step in range(steps):
        decisions.append(decide(config, step=step, steps=steps, layer=layer, last=last))
        if isinstance(decisions[-1], Refresh):
            interval = 0 if last is None else next_interval(config, last)
            last = Refreshed(step, interval, None if last is None else drift)
    return decisions
