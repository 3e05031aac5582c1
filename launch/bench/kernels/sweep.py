"""`semvid bench attention`: the attention kernels over cluster counts and densities, beside dense ones, and a plot.

Clusters are those that the tokens were drawn from: k-means has no part in how attention walks.
"""

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from semvid.kernels.dispatch import Ops, select
from semvid.kernels.layout import BlockMap
from semvid.launch import machine
from semvid.launch.bench import timing, workload
from semvid.launch.bench.kernels import checks
from semvid.launch.bench.kernels.cases import attention_tile
from semvid.launch.bench.options import PEERS, SHAPES, Shape, SweepOptions, missing
from semvid.launch.bench.timing import Times, time_call
from semvid.runtime.device import resolve_device

RESULT, PLOT = "sweep.json", "sweep.png"
# Peers: dense ones are timed once a shape, the other one in every cell.
DENSE, SPARSE = ("fa3", "sdpa-cudnn"), ("flashinfer-fa3",)


class Side(NamedTuple):
    """Tokens of one side, grouped by cluster."""

    rows: Tensor
    """bf16 [H, N, D]."""
    labels: Tensor
    """int32 [H, N], ascending."""
    sizes: Tensor
    """int32 [H, C]."""
    offsets: Tensor
    """int32 [H, C + 1]."""


class Cell(NamedTuple):
    """One input: both sides, values, a map."""

    queries: Side
    keys: Side
    values: Tensor
    block_map: BlockMap
    truth: checks.Rows
    flops: int
    """Of the computed pairs."""


def run(options: SweepOptions, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the report of `semvid bench attention`, and its lines for a reader; writes both and a plot.

    The JSON file grows: an interrupted run leaves what it had measured.

    Args:
        options: checked.
        folder: made if it is not there.

    Raises:
        ValueError: a backend or a peer can't run here; before any work.
    """
    device = resolve_device(options.device)
    backends = [select(name, device) for name in options.backends]
    for name in options.peers:
        reason = missing(PEERS[name], device.type)
        if reason is not None:
            raise ValueError(f"--peers is {name!r}, which can't run here: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "bench": "attention",
        **machine.surroundings(device.type),
        "clock": timing.CLOCK_NOTE[device.type],
        "repeats_at_most": options.repeats,
        "shapes": [],
    }
    lines = [f"device   {report['device']}, torch {report['versions']['torch']}, commit {report['commit']}"]
    for name in options.shapes:
        shape = SHAPES[name]
        size = {"heads": shape.heads, "tokens": shape.tokens, "head_dim": shape.head_dim}
        found: dict[str, Any] = {"shape": name, **size, "dense": {}, "cells": []}
        report["shapes"].append(found)
        found["dense"] = {peer: _dense(peer, shape, options, device) for peer in DENSE if peer in options.peers}
        lines += ["", f"{name}: {shape.heads} heads x {shape.tokens} tokens x {shape.head_dim}", *_dense_lines(found)]
        for cell in _cells(shape, options, device, backends):
            _compare(cell, found["dense"])
            found["cells"].append(cell)
            _say(_line(cell))
            (folder / RESULT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        lines += [_line(cell) for cell in found["cells"]]
    problem = plot(report, folder / PLOT)
    return report, [*lines, *([problem] if problem else []), "", f"results  {folder / RESULT}"]


def _cells(shape: Shape, options: SweepOptions, device: torch.device, backends: list[Ops]) -> Iterator[dict[str, Any]]:
    """Yields what was measured for each (query clusters, key clusters, density)."""
    _say(f"{shape.name}: making inputs")
    for num_queries, num_keys in itertools.product(options.query_clusters, options.key_clusters):
        generator = torch.Generator(device).manual_seed(options.seed)
        keys, queries = (_side(shape, count, generator, device) for count in (num_keys, num_queries))
        values = torch.randn(keys.rows.shape, generator=generator, device=device, dtype=keys.rows.dtype)
        for density in options.densities:
            wanted = workload.head_densities(shape, density).to(device)
            block_map = workload.draw_block_map(queries.sizes, keys.sizes, wanted, generator)
            truth = checks.true_rows(queries.rows, keys.rows, values, (block_map, queries.labels, keys.labels))
            pairs = workload.computed_pairs(block_map, queries.sizes, keys.sizes)
            cell = Cell(queries, keys, values, block_map, truth, 4 * shape.head_dim * pairs)
            results = {ops.name: _measure_ours(ops, cell, options) for ops in backends}
            if SPARSE[0] in options.peers:
                results |= _measure_flashinfer(cell, options)
            reached = pairs / (shape.heads * shape.tokens**2)
            yield {"query_clusters": num_queries, "key_clusters": num_keys, "density": reached, "results": results}


def _side(shape: Shape, clusters: int, generator: torch.Generator, device: torch.device) -> Side:
    """Returns tokens around `clusters` means, in clusters of lognormal sizes, grouped."""
    H, N, D = shape.heads, shape.tokens, shape.head_dim
    means = workload.MEAN_SCALE * torch.randn(H, clusters, D, generator=generator, device=device)
    weights = (workload.SIZE_SPREAD * torch.randn(H, clusters, generator=generator, device=device)).exp()
    labels = torch.multinomial(weights, N, replacement=True, generator=generator).sort(-1).values
    rows = torch.empty(H, N, D, dtype=torch.bfloat16, device=device)
    for h in range(H):
        noise = torch.randn(N, D, generator=generator, device=device)
        rows[h] = means[h, labels[h]] + workload.NOISE_SCALE * noise
    sizes = torch.zeros(H, clusters, dtype=torch.int64, device=device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    offsets = torch.cat([sizes.new_zeros(H, 1), sizes.cumsum(-1)], 1)
    return Side(rows, labels.int(), sizes.int(), offsets.int())


def _measure_ours(ops: Ops, cell: Cell, options: SweepOptions) -> dict[str, Any]:
    """Returns ms and rates of one of our kernels, its result checked against fp32 first."""
    queries, keys, values, block_map = cell[:4]
    plan = ops.plan(queries.offsets, keys.offsets, block_map)
    tile = attention_tile(ops, queries.rows)
    executed = None
    if tile is not None:
        rows, columns, halve = tile
        sizes = queries.sizes, keys.sizes
        padded = workload.padded_pairs(block_map, *sizes, rows=rows, keys=columns, halve=halve)
        executed = 4 * queries.rows.shape[2] * padded

    def call() -> tuple[Tensor, Tensor]:
        return ops.attention(queries.rows, keys.rows, values, plan)

    with checks.poisoned_memory():
        check = checks.check_rows(*call(), cell.truth)
    return _timed(call, check, cell.flops, executed, options, queries.rows.device)


def _measure_flashinfer(cell: Cell, options: SweepOptions) -> dict[str, dict[str, Any]]:
    """Returns ms and rates of FlashInfer's variable-block attention, run and plan apart."""
    from flashinfer import VariableBlockSparseAttentionWrapper

    queries, keys, values, block_map = cell[:4]
    H, _, D = queries.rows.shape
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=values.device)
    wrapper = VariableBlockSparseAttentionWrapper(workspace, backend="fa3")

    def plan() -> None:
        wrapper.plan(block_map.selected, queries.sizes, keys.sizes, H, H, D, q_data_type=values.dtype)

    def call() -> Tensor:
        out: Tensor = wrapper.run(queries.rows, keys.rows, values)
        return out

    plan()
    check = checks.check_rows(call(), None, cell.truth)
    run = _timed(call, check, cell.flops, None, options, values.device)
    planned = _timed(plan, check, None, None, options, values.device)
    return {"flashinfer-fa3 run": run, "flashinfer-fa3 plan": planned}


def _dense(peer: str, shape: Shape, options: SweepOptions, device: torch.device) -> dict[str, Any]:
    """Returns ms and rate of dense attention over rows that resemble the sparse ones'."""
    generator = torch.Generator(device).manual_seed(options.seed)
    q, k, v = (_side(shape, 300, generator, device).rows for _ in range(3))
    call = _dense_call(peer, q, k, v)
    check = checks.check_rows(call(), None, checks.true_rows(q, k, v))
    flops = 4 * shape.head_dim * shape.heads * shape.tokens**2
    return _timed(call, check, flops, flops, options, device)


def _dense_call(peer: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Returns what computes dense attention, [H, N, D]. fa3 reads [B, N, H, D], as a model has it."""
    if peer == "fa3":
        from fa3_fwd_interface import flash_attn_func

        across = [x.transpose(0, 1).contiguous()[None] for x in (q, k, v)]

        def call() -> Tensor:
            out: Tensor = flash_attn_func(*across)
            return out[0].transpose(0, 1)
    else:

        def call() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q[None], k[None], v[None])[0]

    return call


def _timed(
    call: Callable[[], Any],
    check: checks.Check,
    useful: int | None,
    executed: int | None,
    options: SweepOptions,
    device: torch.device,
) -> dict[str, Any]:
    """Returns times and rates as JSON values; of a call whose check failed, only that."""
    found: dict[str, Any] = {"check": check.what, "error": check.error, "bound": check.bound, "passed": check.passed}
    if not check.passed:
        return found | dict.fromkeys(("median_ms", "useful_tflops", "executed_tflops"))
    times: Times = time_call(call, device, warmup=options.warmup, repeats=options.repeats)
    rates = {
        name: None if flops is None else flops / times.median_ms / 1e9
        for name, flops in (("useful_tflops", useful), ("executed_tflops", executed))
    }
    return found | {"median_ms": times.median_ms, "ms_20": times.ms_20, "ms_80": times.ms_80} | rates


def _compare(cell: dict[str, Any], dense: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds, to every result that has a rate, its share of each dense peer's."""
    for result in cell["results"].values():
        rate = result["useful_tflops"]
        if rate:
            full = {name: peer["useful_tflops"] for name, peer in dense.items()}
            result["of_dense"] = {name: rate / whole for name, whole in full.items() if whole}


def plot(report: Mapping[str, Any], path: Path) -> str | None:
    """Writes a PNG: useful TFLOP/s over density, a plot for each number of query clusters, lines by key clusters.

    Returns:
        Why there is none, with the command that brings what is missing; None if it was written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is missing (pip install matplotlib)"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = report["shapes"]
    counts = sorted({cell["query_clusters"] for shape in shapes for cell in shape["cells"]})
    figure = Figure(figsize=(3.4 * len(counts), 3.2 * len(shapes) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shapes), len(counts), squeeze=False, sharey=True)
    for plots, shape in zip(grid, shapes, strict=True):
        for axes, count in zip(plots, counts, strict=True):
            _draw(axes, shape, [cell for cell in shape["cells"] if cell["query_clusters"] == count])
            axes.set_title(f"{shape['shape']}, {count} query clusters", fontsize=9)
        plots[0].set_ylabel("useful TFLOP/s", fontsize=8)
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(f"{report['device']}, torch {report['versions']['torch']}, commit {report['commit']}", fontsize=9)
    figure.savefig(path, dpi=90)
    return None


def _draw(axes: Any, shape: Mapping[str, Any], cells: list[Mapping[str, Any]]) -> None:
    """Draws the cells of one number of query clusters: a colour for each number of key clusters, a style a kernel."""
    names = dict.fromkeys(name for cell in cells for name in cell["results"] if not name.endswith("plan"))
    clusters = sorted({cell["key_clusters"] for cell in cells})
    for colour, count in enumerate(clusters):
        for name, style in zip(names, ("-", "--", ":", "-."), strict=False):
            points = [(c["density"], c["results"][name]["useful_tflops"]) for c in cells if c["key_clusters"] == count]
            points = [(x, y) for x, y in points if y]
            if points:
                label = f"{name}, {count} key clusters"
                axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=label, lw=1.3, marker=".")
    for name, grey in zip(shape["dense"], ("0.2", "0.6"), strict=False):
        rate = shape["dense"][name]["useful_tflops"]
        if rate:
            axes.axhline(rate, color=grey, lw=1, label=f"{name}, dense")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("density", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _dense_lines(found: Mapping[str, Any]) -> list[str]:
    return [f"dense {name}: {_figures(result)}" for name, result in found["dense"].items()]


def _line(cell: Mapping[str, Any]) -> str:
    """One cell for a reader."""
    results = "; ".join(f"{name} {_figures(result)}" for name, result in cell["results"].items())
    return f"  Cq {cell['query_clusters']:4} Ck {cell['key_clusters']:4} density {cell['density']:.3f}: {results}"


def _figures(result: Mapping[str, Any]) -> str:
    if result["median_ms"] is None:
        return f"FAILED its check: {result['check']} {result['error']:.2g} > {result['bound']:.2g}"
    text = f"{result['median_ms']:.2f} ms"
    if result["useful_tflops"]:
        text += f" {result['useful_tflops']:.0f} TFLOP/s"
    if result["executed_tflops"] and result["executed_tflops"] != result["useful_tflops"]:
        text += f" ({result['executed_tflops']:.0f} executed)"
    return text + "".join(f", {share:.2f} of {name}" for name, share in result.get("of_dense", {}).items())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
