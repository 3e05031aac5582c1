"""Each of our ops, and the whole call, as something to check and then to time."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import BlockMap, Clusters, Plan
from semvid.launch.bench.kernels import block_cases, checks
from semvid.launch.bench.kernels.case import Case
from semvid.launch.bench.kernels.checks import Check
from semvid.launch.bench.workload import NORM_EPS, Projected, Workload, computed_pairs, padded_pairs, project
from semvid.parallel.kmeans import refine
from semvid.parallel.maps import pack_bits
from semvid.runtime.attention.call import sparse_attention
from semvid.runtime.attention.schedule import Decision, Refresh, Reuse
from semvid.runtime.attention.session import Position, Session
from semvid.runtime.attention.state import Memory


class Cases:
    """The cases of one workload and backend. What several cases need is made once, by the reference."""

    def __init__(self, work: Workload, ops: Ops) -> None:
        self.work, self.ops = work, ops
        self.queries = reference.gather_rows(work.q, work.queries.permutation.order)
        self.keys = reference.gather_rows(work.k, work.keys.permutation.order)
        self.values = reference.gather_rows(work.v, work.keys.permutation.order)
        self.truth = checks.true_rows(work.q, work.k, work.v, (work.block_map, work.queries.labels, work.keys.labels))
        self.dense_truth: checks.Rows | None = None
        self.pairs = computed_pairs(work.block_map, work.queries.sizes, work.keys.sizes)
        H, N, D = work.q.shape
        self.flops = 4 * D * self.pairs
        self.dense_flops = 4 * D * H * N * N

    def sources(self) -> dict[str, Callable[[], Case]]:
        """Returns what makes each case, by its name, in the order of the call."""
        return {
            "norm_rotary": self.norm_rotary,
            **{case.name: _maker(case) for case in block_cases.ours(self.work, self.ops)},
            "assign q": lambda: self.assign("q"),
            "assign k": lambda: self.assign("k"),
            "cluster_sums k": self.cluster_sums,
            "iteration q": lambda: self.iteration("q"),
            "iteration k": lambda: self.iteration("k"),
            "top_p_map": self.top_p_map,
            "density": self.density,
            "group q": lambda: self.group("q"),
            "group k": lambda: self.group("k"),
            "gather k": lambda: self.gather("k"),
            "gather v": lambda: self.gather("v"),
            "scatter out": self.scatter,
            "permute all": self.permute_all,
            "plan": self.plan,
            "attention": self.attention,
            "attention q_order": lambda: self.attention(ordered=True),
            "merge": self.merge,
            "refresh": lambda: self.whole("refresh", Refresh(2, seeded=False)),
            "reuse": lambda: self.whole("reuse", Reuse()),
        }

    def side(self, name: str) -> tuple[Tensor, Tensor, Clusters]:
        """Returns tokens, starting centroids and clusters of "q" or "k"."""
        w = self.work
        return (w.q, w.q_starts, w.queries) if name == "q" else (w.k, w.k_starts, w.keys)

    def norm_rotary(self) -> Case:
        """Norm, rotary embedding and split into heads, of q and of k."""
        given, heads = project(self.work), self.work.shape.heads
        rest = given.weight, NORM_EPS, given.cosines, given.sines, heads
        return turned("norm_rotary", lambda x: self.ops.norm_rotary(x, *rest), given)

    def assign(self, side: str) -> Case:
        """Nearest centroids: 2·H·N·C·D operations."""
        x, starts, _ = self.side(side)
        return Case(
            name=f"assign {side}",
            call=lambda: self.ops.assign(x, starts),
            check=lambda labels: checks.check_labels(x, starts, labels),
            useful_flops=2 * x.numel() * starts.shape[1],
        )

    def cluster_sums(self) -> Case:
        """Sums of the keys: x and the labels are read once."""
        x, starts, clusters = self.side("k")
        return Case(
            name="cluster_sums k",
            call=lambda: self.ops.cluster_sums(x, clusters.labels, starts.shape[1]),
            check=lambda result: checks.check_sums(x, clusters.labels, *result),
            moved_bytes=num_bytes(x, clusters.labels, starts, clusters.sizes),
        )

    def iteration(self, side: str) -> Case:
        """One k-means iteration as the call does it: assign, sums, means."""
        x, starts, _ = self.side(side)
        return Case(
            name=f"iteration {side}",
            call=lambda: refine([x], [starts], 1, self.ops),
            check=lambda result: checks.check_clusters(x, starts, result[0]),
            useful_flops=2 * x.numel() * starts.shape[1],
        )

    def top_p_map(self) -> Case:
        """The map of the centroids, with the preset's p and floor."""
        w = self.work
        given = (w.queries.centroids, w.keys.centroids, w.keys.sizes, w.config.p, w.config.floor)
        return Case(
            name="top_p_map",
            call=lambda: self.ops.top_p_map(*given),
            check=lambda result: checks.check_map(result, reference.top_p_map(*given)),
            moved_bytes=num_bytes(*given[:3], w.block_map.selected),
        )

    def density(self) -> Case:
        """Share of pairs computed, a head."""
        w = self.work
        given = (w.block_map, w.queries.sizes, w.keys.sizes)

        def check(result: Tensor) -> Check:
            return Check("density", (result - reference.density(*given)).abs().max().item(), 1e-6)

        moved = num_bytes(w.block_map.selected, *given[1:])
        return Case(name="density", call=lambda: self.ops.density(*given), check=check, moved_bytes=moved)

    def group(self, side: str) -> Case:
        """The stable order of the labels."""
        _, starts, clusters = self.side(side)
        permutation = clusters.permutation
        return Case(
            name=f"group {side}",
            call=lambda: self.ops.group(clusters.labels, starts.shape[1]),
            check=lambda result: checks.check_order(clusters.labels, result, permutation),
            moved_bytes=num_bytes(clusters.labels, *permutation),
        )

    def gather(self, name: str) -> Case:
        """Rows of k or v in sorted order."""
        x, order = self.work.k if name == "k" else self.work.v, self.work.keys.permutation.order
        return Case(
            name=f"gather {name}",
            call=lambda: self.ops.gather_rows(x, order),
            check=lambda result: checks.check_moved(x, order, result),
            moved_bytes=num_bytes(x, order, x),
        )

    def scatter(self) -> Case:
        """Rows of out (v stands for it) back in token order."""
        x, order = self.work.v, self.work.queries.permutation.order
        return Case(
            name="scatter out",
            call=lambda: self.ops.scatter_rows(x, order),
            check=lambda result: checks.check_moved(x, order, result, scatter=True),
            moved_bytes=num_bytes(x, order, x),
        )

    def permute_all(self) -> Case:
        """Both orders, gathers of q, k, v and the scatter of out: what a call moves if attention reads sorted rows."""
        w, ops = self.work, self.ops

        def call() -> tuple[Tensor, ...]:
            q_order = ops.group(w.queries.labels, w.queries.sizes.shape[1]).order
            k_order = ops.group(w.keys.labels, w.keys.sizes.shape[1]).order
            q, k, v = ops.gather_rows(w.q, q_order), ops.gather_rows(w.k, k_order), ops.gather_rows(w.v, k_order)
            return k, v, ops.scatter_rows(q, q_order)

        def check(result: tuple[Tensor, ...]) -> Check:
            k, v, q = result
            order = w.keys.permutation.order
            whole = checks.check_equal(q, w.q)
            return checks.worst(whole, checks.check_moved(w.k, order, k), checks.check_moved(w.v, order, v))

        orders = [w.queries.labels, w.keys.labels, *w.queries.permutation, *w.keys.permutation]
        moved = num_bytes(*orders) + 4 * num_bytes(w.q, w.q, w.queries.permutation.order)
        return Case(name="permute all", call=call, check=check, moved_bytes=moved)

    def plan(self) -> Case:
        """The plan; it is right if attention by it is."""
        return Case(
            name="plan",
            call=self.make_plan,
            check=lambda plan: self.check_grouped(self.attend(plan)),
            moved_bytes=num_bytes(self.work.block_map.selected),
        )

    def attention(self, *, ordered: bool = False) -> Case:
        """Sparse attention of grouped rows, as the call does it; `ordered`: q read, and out written, in token order."""
        plan, w = self.make_plan(), self.work
        tile = attention_tile(self.ops, w.q)
        executed = None
        if tile is not None:
            pairs = padded_pairs(w.block_map, w.queries.sizes, w.keys.sizes, rows=tile[0], keys=tile[1], halve=tile[2])
            executed = 4 * w.shape.head_dim * pairs
        return Case(
            name="attention q_order" if ordered else "attention",
            call=lambda: self.attend(plan, ordered=ordered),
            check=self.check_attention if ordered else self.check_grouped,
            useful_flops=self.flops,
            executed_flops=executed,
        )

    def merge(self) -> Case:
        """Two halves joined; q and v stand for their outs."""
        w = self.work
        lse_a, lse_b = w.q[..., 0].float(), w.q[..., 1].float()
        heads = checks.sampled_heads(w.shape.heads)

        def check(result: tuple[Tensor, Tensor]) -> Check:
            out, lse = (x[heads].float() for x in result)
            true_out, true_lse = reference.merge(w.q[heads].float(), lse_a[heads], w.v[heads].float(), lse_b[heads])
            error = ((out - true_out).norm() / true_out.norm()).item()
            gap = (lse - true_lse).abs().max().item()
            finite = torch.isfinite(result[0]).all().item()
            out_check = Check("merged out", error if finite else float("inf"), checks.ATTENTION_BOUND)
            return checks.worst(out_check, Check("merged lse", gap, 1e-5))

        return Case(
            name="merge",
            call=lambda: self.ops.merge(w.q, lse_a, w.v, lse_b),
            check=check,
            moved_bytes=num_bytes(w.q, w.v, w.q, lse_a, lse_a, lse_a),
        )

    def whole(self, name: str, todo: Decision) -> Case:
        """The whole call of `runtime/attention/call.py`: 2 iterations, map, orders, plan, gathers, attention; or none.

        The map that the call makes is replaced by the workload's, so that the density is the wanted one.
        """
        w = self.work

        def traced_map(*given: Any) -> BlockMap:
            self.ops.top_p_map(*given)
            return w.block_map

        session = Session(config=w.config, ops=self.ops._replace(top_p_map=traced_map), seed=0)
        session.enter(Position(step=0, steps=1, branch="bench"))
        plan = self.make_plan()
        before = Memory(
            queries=w.queries._replace(centroids=w.q_starts),
            keys=w.keys._replace(centroids=w.k_starts),
            density=self.ops.density(w.block_map, w.queries.sizes, w.keys.sizes),
            bits=pack_bits(w.block_map.selected),
        )

        def call() -> tuple[Tensor, Memory | None]:
            # The same start each time: a warm start from one's own result would be another problem.
            session.cache.put(0, "bench", before)
            out = sparse_attention(w.q, w.k, w.v, session, 0, todo)
            return out, session.cache.get(0, "bench")

        return Case(name=name, call=call, check=self.check_whole, part=lambda: self.attend(plan))

    def make_plan(self) -> Plan:
        """Returns the backend's plan of the workload."""
        w = self.work
        return self.ops.plan(w.queries.permutation.offsets, w.keys.permutation.offsets, w.block_map)

    def attend(self, plan: Plan, *, ordered: bool = False) -> tuple[Tensor, Tensor]:
        """Returns out and lse, grouped by query cluster, or in token order if `ordered`."""
        if ordered:
            return self.ops.attention(
                self.work.q, self.keys, self.values, plan, q_order=self.work.queries.permutation.order
            )
        return self.ops.attention(self.queries, self.keys, self.values, plan)

    def check_grouped(self, result: tuple[Tensor, Tensor]) -> Check:
        """Returns the check of grouped out and lse."""
        (out, lse), order = result, self.work.queries.permutation.order
        ungrouped = reference.scatter_rows(lse[..., None], order)[..., 0]
        return self.check_attention((reference.scatter_rows(out, order), ungrouped))

    def check_attention(self, result: tuple[Tensor, Tensor]) -> Check:
        """Returns the check of out and lse in token order."""
        return checks.check_rows(*result, self.truth)

    def check_dense(self, out: Tensor) -> Check:
        """Returns the check of a peer's dense out, [H, N, D] in token order."""
        if self.dense_truth is None:
            self.dense_truth = checks.true_rows(self.work.q, self.work.k, self.work.v)
        return checks.check_rows(out, None, self.dense_truth)

    def check_whole(self, result: tuple[Tensor, Memory]) -> Check:
        """Returns the check of a whole call's out by the labels that it found itself."""
        w, (out, memory) = self.work, result
        labels = memory.queries.labels.int(), memory.keys.labels.int()
        # A tenth of the tokens at most may be labelled otherwise than by the reference: ties and rounding, twice.
        pairs = zip(labels, (w.queries.labels, w.keys.labels), strict=True)
        moved = [checks.check_equal(*pair, "labels moved")._replace(bound=0.1) for pair in pairs]
        truth = checks.true_rows(w.q, w.k, w.v, (w.block_map, *labels))
        return checks.worst(*moved, checks.check_rows(out, None, truth))


def turned(name: str, turn: Callable[[Tensor], Tensor], given: Projected, *, beside: str | None = None) -> Case:
    """Returns the case of `turn`, which takes [1, N, H·D] before the norm to [H, N, D]: called on q, then on k."""
    rest = given.weight, NORM_EPS, given.cosines, given.sines

    def check(result: tuple[Tensor, Tensor]) -> Check:
        return checks.worst(*(checks.check_turned(x, *rest, out) for x, out in zip(given[:2], result, strict=True)))

    # q and k are read and written, weight and tables read once for each of the two.
    moved = 2 * num_bytes(*given)
    return Case(name=name, call=lambda: (turn(given.q), turn(given.k)), check=check, moved_bytes=moved, beside=beside)


def _maker(case: Case) -> Callable[[], Case]:
    return lambda: case


def attention_tile(ops: Ops, q: Tensor) -> tuple[int, int, bool] | None:
    """Returns queries and keys of a tile and whether half tiles exist, of a backend whose module says so, or None."""
    tile_for = getattr(sys.modules[ops.attention.__module__], "tile_for", None)
    if tile_for is None:
        return None
    # The interpreter has no limit of shared memory.
    shared = 1 << 20
    if q.is_cuda:
        shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    tile = tile_for(q.shape[2], q.dtype, shared)
    return tile.rows, tile.keys, tile.halve


def num_bytes(*tensors: Tensor) -> int:
    """Returns how many bytes the tensors hold."""
    return sum(x.numel() * x.element_size() for x in tensors)
