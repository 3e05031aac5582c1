"""What a sparse call keeps and errs, against exact attention of sampled rows, and how far its map is from the best."""

import itertools
from typing import Any

import torch
from torch import Tensor

from semvid.kernels.reference import unpack_map
from semvid.launch.bench.quality.baselines import exact_mass, fewest_keys
from semvid.parallel.budget import Sides
from semvid.parallel.tail import squares, weigh
from semvid.runtime.attention.session import Session
from semvid.runtime.attention.state import Memory

ROWS = 256
"""Query rows of each head that are compared, drawn at random once a size."""
RECALLS = (0.8, 0.9)
SWEEP = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.99)


class Probe:
    """Compares the sparse calls of chosen steps with exact attention; called by the session after each."""

    def __init__(self, session: Session, every: int, *, gap: bool = False) -> None:
        """Looks at every `every`-th step; with `gap` at each map's distance from an oracle's too."""
        self.session = session
        self.every = every
        self.gap = gap
        self.found: list[dict[str, Any]] = []

    def looks_at(self, step: int) -> bool:
        """Returns whether the calls of a step are compared; these take longer than they should."""
        return step % self.every == self.every - 1

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, memory: Memory) -> None:
        """Compares one call."""
        here = self.session.here()
        if not self.looks_at(here.step):
            return
        rows = _sample(q.shape[1], q.device)
        recall, error = compare(q, k, v, out, memory, rows)
        entry = {"step": here.step, "layer": layer, "branch": here.branch, "recall": recall, "error": error}
        if self.gap and here.branch == "cond":
            entry["gap"] = oracle_gap(q, k, memory)
        self.found.append(entry)


def compare(q: Tensor, k: Tensor, v: Tensor, out: Tensor, memory: Memory, rows: Tensor) -> tuple[float, float]:
    """Returns the softmax mass on selected keys and ‖out − exact‖ / ‖exact‖ over `rows`, means over heads.

    Args:
        q: [H, N, D], in token order; k, v and out likewise.
        k: keys.
        v: values.
        out: of the sparse call.
        memory: that it went by.
        rows: int64 [R].
    """
    weights = (q[:, rows].float() @ k.float().mT / q.shape[2] ** 0.5).softmax(-1)
    exact = weights @ v.float()
    error = (out[:, rows].float() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    H, Ck, _ = memory.keys.centroids.shape
    selected = unpack_map(memory.bits, torch.arange(H, device=q.device), Ck)
    clusters = memory.queries.labels[:, rows].long()
    of_rows = torch.gather(selected, 1, clusters[..., None].expand(-1, -1, selected.shape[2]))
    labels = memory.keys.labels.long()[:, None].expand(-1, len(rows), -1)
    recall = torch.where(torch.gather(of_rows, 2, labels), weights, 0.0).sum(-1)
    return float(recall.mean()), float(error.mean())


def oracle_gap(q: Tensor, k: Tensor, memory: Memory) -> dict[str, dict[str, float | None]]:
    """Returns how many times the oracle's density each rule needs for the same recall, by rule and recall.

    The clusters are the memory's. The oracle takes, for each query cluster, the fewest keys that hold p of its exact
    mass; the rules estimate the mass from centroids as they are now. p is swept, recall and density are read off the
    sweeps by interpolation; None where a sweep does not reach a recall.
    """
    queries, keys = memory.queries, memory.keys
    mass = exact_mass(q, k, queries, keys)
    sides = _sides(q, k, memory)
    rules = {"mass": (mass_rule, None), "error": (mass_rule, sides.bias)}
    best = [_point(fewest_keys(mass, keys.sizes, p).selected, mass, sides) for p in SWEEP]
    found: dict[str, dict[str, float | None]] = {}
    for name, (rule, bias) in rules.items():
        points = [_point(rule(sides, p, bias), mass, sides) for p in SWEEP]
        found[name] = {f"{recall:g}": _ratio(points, best, recall) for recall in RECALLS}
    return found


def mass_rule(sides: Sides, p: float, bias: Tensor | None) -> Tensor:
    """Returns the map of `top_p_map`, by the reference, so that any number of clusters is taken."""
    from semvid.kernels.reference import top_p_map

    return top_p_map(sides.q_centroids, sides.k_centroids, sides.k_sizes, p, 0.0, bias).selected


def _sides(q: Tensor, k: Tensor, memory: Memory) -> Sides:
    from semvid.kernels.reference import sums_by_runs

    queries, keys = (
        side._replace(centroids=sums_by_runs(x, side.permutation)[0] / side.sizes.clamp(min=1)[..., None])
        for side, x in ((memory.queries, q), (memory.keys, k))
    )
    weights = weigh(queries, keys, sums_by_runs(squares(k), keys.permutation)[0])
    return Sides(queries.centroids, queries.sizes, keys.centroids, keys.sizes, weights.bias)


def _point(selected: Tensor, mass: Tensor, sides: Sides) -> tuple[float, float]:
    """Returns (recall, density) of a map, means over heads and query tokens."""
    rows = sides.q_sizes.float() / sides.q_sizes.sum(-1, keepdim=True)
    recall = (torch.where(selected, mass, 0.0).sum(-1) * rows).sum(-1).mean()
    keys = torch.where(selected, sides.k_sizes[:, None], 0).sum(-1) / sides.k_sizes.sum(-1, keepdim=True)
    return float(recall), float((keys * rows).sum(-1).mean())


def _ratio(points: list[tuple[float, float]], best: list[tuple[float, float]], recall: float) -> float | None:
    ours, theirs = (_density_at(side, recall) for side in (points, best))
    return None if ours is None or theirs is None else ours / theirs


def _density_at(points: list[tuple[float, float]], recall: float) -> float | None:
    """Returns the density at a recall, by interpolation between points that rise in both."""
    for (r0, d0), (r1, d1) in itertools.pairwise(points):
        if r0 <= recall <= r1:
            return d0 + (d1 - d0) * (recall - r0) / max(r1 - r0, 1e-12)
    return None


def _sample(tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randperm(tokens, generator=generator)[:ROWS].to(device)
