"""What `semvid bench` can be asked: shapes, peers and options, checked before any work. Needs no torch."""

import dataclasses
import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from semvid.runtime.config import AttentionConfig, cluster_counts
from semvid.runtime.settings import CONFIGS, resolve

LEAST_DENSITY = 0.02
MOST_RANKS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Self-attention of one layer, one video."""

    name: str
    model: str
    """Whose recorded per-head densities the block map takes, as `configs/traces` names it."""
    heads: int
    head_dim: int
    tokens: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="wan1.3b-480p", model="Wan2.1-T2V-1.3B", heads=12, head_dim=128, tokens=32_760),
        Shape(name="wan1.3b-720p", model="Wan2.1-T2V-1.3B", heads=12, head_dim=128, tokens=75_600),
        Shape(name="wan14b-480p", model="Wan2.1-T2V-14B", heads=40, head_dim=128, tokens=32_760),
        Shape(name="wan14b-720p", model="Wan2.1-T2V-14B", heads=40, head_dim=128, tokens=75_600),
        # Long: the case that AsymHP publishes times of, on four GPUs.
        Shape(name="wan1.3b-long", model="Wan2.1-T2V-1.3B", heads=12, head_dim=128, tokens=188_760),
        Shape(name="hunyuan-720p", model="HunyuanVideo", heads=24, head_dim=128, tokens=118_800),
        Shape(name="d64-720p", model="Wan2.1-T2V-14B", heads=40, head_dim=64, tokens=75_600),
        Shape(name="toy", model="Wan2.1-T2V-1.3B", heads=2, head_dim=64, tokens=500),
    )
}
CPU_SHAPES = ("toy",)
DEFAULT_SHAPE = {"cpu": "toy", "cuda": "wan14b-720p"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Somebody else's code that is timed beside ours."""

    name: str
    packages: tuple[str, ...] = ("torch",)
    """Distributions it needs; the first one's version names it."""
    modules: tuple[str, ...] = ("torch",)
    """What these distributions are imported as."""
    needs_gpu: bool = True
    in_all: bool = True
    """Whether "all" means it too."""


PEERS = {
    peer.name: peer
    for peer in (
        Peer(name="sdpa-cudnn"),
        Peer(name="sdpa-flash", needs_gpu=False),
        Peer(name="fa3", packages=("fa3-fwd",), modules=("fa3_fwd_interface",)),
        Peer(name="flashinfer-fa2", packages=("flashinfer-python", "einops"), modules=("flashinfer", "einops")),
        Peer(name="flashinfer-fa3", packages=("flashinfer-python", "einops"), modules=("flashinfer", "einops")),
        Peer(name="flash-kmeans", packages=("flash-kmeans",), modules=("flash_kmeans",)),
        Peer(name="torch-permute", needs_gpu=False),
        Peer(name="torch-rotary", needs_gpu=False),
        Peer(name="torch-block", needs_gpu=False),
        # It compiles a kernel a shape, which takes longer than all the rest.
        Peer(name="flex", in_all=False),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """One `semvid bench kernels`."""

    shapes: tuple[str, ...] = ()
    """Names of SHAPES; none means the device's default."""
    backend: str = "auto"
    density: float = 0.3
    """Mean over the heads of the share of token pairs computed; the recorded densities are scaled to it."""
    query_clusters: int | None = None
    """Overrides the svg2 preset's table, as does the next."""
    key_clusters: int | None = None
    repeats: int = 30
    """At most so many timed calls; fewer, but at least 5, of what takes long."""
    warmup: int = 3
    """Calls before the timed ones, after the one that is checked."""
    peers: tuple[str, ...] = ("all",)
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """One `semvid bench plan`."""

    traces: Path = CONFIGS / "traces" / "head_densities.json"
    """A JSON file {"traces": [...]} of densities by head."""
    world_sizes: tuple[int, ...] = (2, 3, 4, 5, 8)
    query_clusters: int = 300
    """Of each head."""
    piece_cost: int = 0
    """Token pairs that a piece counts for beside its own. 0: an H100 gathers the keys and values of a 720p head in 0.04
    ms and attends in 1.7 ms at density 0.1, longer at any other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """One `semvid bench layer`."""

    shapes: tuple[str, ...]
    gpus: tuple[int, ...] = (1, 2)
    backend: str = "auto"
    densities: tuple[float, ...] = (0.3,)
    """One for all shapes, or one for each."""
    repeats: int = 10
    warmup: int = 2
    device: str = "cuda"
    """cuda or cpu: gloo processes then."""
    block: bool = True
    """Whether whole transformer blocks are timed too."""
    usp: bool = False
    """Whether xfuser's dense USP is timed beside ours."""
    windows: bool = True
    """Whether rows go through memory that the GPUs share, where they can; by collectives otherwise."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepOptions:
    """One `semvid bench attention`."""

    shapes: tuple[str, ...]
    backends: tuple[str, ...] = ("auto", "triton")
    query_clusters: tuple[int, ...] = (100, 200, 300, 400)
    key_clusters: tuple[int, ...] = (250, 500, 1000, 2000)
    densities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    peers: tuple[str, ...] = ()
    repeats: int = 10
    warmup: int = 1
    device: str = "auto"
    seed: int = 0


SWEEP_PEERS = ("fa3", "sdpa-cudnn", "flashinfer-fa3")


def check_sweep(options: SweepOptions) -> None:
    """Raises ValueError if an option of `semvid bench attention` is outside what is accepted, naming it."""
    for density in options.densities:
        check(Options(shapes=options.shapes, density=density, repeats=options.repeats, warmup=options.warmup))
    for name in options.peers:
        _require_known("--peers", name, SWEEP_PEERS)
    counts = {"--query-clusters": options.query_clusters, "--key-clusters": options.key_clusters}
    for option, values in counts.items():
        for value in values:
            most = min(SHAPES[name].tokens for name in options.shapes)
            if not 1 <= value <= most:
                raise ValueError(f"{option} is {value}; accepted: 1 .. {most}")
    for name in options.shapes:
        if options.device == "cpu" and name not in CPU_SHAPES:
            raise ValueError(f"--shape is {name!r}, which takes a GPU; accepted on a CPU: {', '.join(CPU_SHAPES)}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed is {options.seed}; accepted: 0 .. 2^63 - 1")


def check_layer(options: LayerOptions) -> None:
    """Raises ValueError if an option is outside what is accepted, naming it."""
    given, shapes = len(options.densities), len(options.shapes)
    if given not in (1, shapes):
        raise ValueError(f"--density has {given} values for {shapes} shapes; accepted: one, or one for each shape")
    same = {name: getattr(options, name) for name in ("shapes", "repeats", "warmup", "seed")}
    for density in options.densities:
        check(Options(density=density, **same))
    for count in options.gpus:
        if count < 1:
            raise ValueError(f"--gpus is {count}; accepted: 1 or more")
    for name in options.shapes:
        if options.device == "cpu" and name not in CPU_SHAPES:
            raise ValueError(f"--shape is {name!r}, which takes GPUs; accepted on a CPU: {', '.join(CPU_SHAPES)}")


def check(options: Options) -> None:
    """Raises ValueError if an option is outside what is accepted, naming it."""
    for name in options.shapes:
        _require_known("--shape", name, SHAPES)
    for name in options.peers:
        _require_known("--peers", name, ["all", "none", *PEERS])
    if "none" in options.peers and len(options.peers) > 1:
        raise ValueError("--peers is 'none' beside other names; accepted: none alone, or names without it")
    if not LEAST_DENSITY <= options.density <= 1:
        raise ValueError(f"--density is {options.density:g}; accepted: {LEAST_DENSITY} .. 1")
    counts = {"--query-clusters": options.query_clusters, "--key-clusters": options.key_clusters}
    for option, value in (counts | {"--repeats": options.repeats}).items():
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; accepted: 1 or more")
    if options.warmup < 0:
        raise ValueError(f"--warmup is {options.warmup}; accepted: 0 or more")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed is {options.seed}; accepted: 0 .. 2^63 - 1")


def check_plan(options: PlanOptions) -> None:
    """Raises ValueError if an option of `semvid bench plan` is outside what is accepted, naming it."""
    if options.query_clusters < 1:
        raise ValueError(f"--query-clusters is {options.query_clusters}; accepted: 1 or more")
    if not 0 <= options.piece_cost <= 10**15:
        raise ValueError(f"--piece-cost is {options.piece_cost}; accepted: 0 .. 10^15")


def world_sizes(values: Sequence[str]) -> tuple[int, ...]:
    """Returns the numbers of ranks in command-line words, each once.

    Raises:
        ValueError: there is none, or one is no whole number or out of range.
    """
    found = words(values)
    for word in found or ("",):
        if not word.isdecimal() or not 1 <= int(word) <= MOST_RANKS:
            raise ValueError(f"--world-sizes is {word!r}; accepted: whole numbers 1 .. {MOST_RANKS}, such as 2,4,8")
    return tuple(dict.fromkeys(int(word) for word in found))


def shapes_on(options: Options, device: str) -> list[Shape]:
    """Returns the shapes to measure on a "cpu" or "cuda" device.

    Raises:
        ValueError: a real shape on a CPU, or more clusters than tokens.
    """
    shapes = [SHAPES[name] for name in dict.fromkeys(options.shapes or (DEFAULT_SHAPE[device],))]
    for shape in shapes:
        if device == "cpu" and shape.name not in CPU_SHAPES:
            accepted = ", ".join(CPU_SHAPES)
            raise ValueError(f"--shape is {shape.name!r}, which takes a GPU; accepted on a CPU: {accepted}")
        for option, count in (("query", options.query_clusters), ("key", options.key_clusters)):
            if count is not None and count > shape.tokens:
                raise ValueError(
                    f"--{option}-clusters is {count}; accepted: 1 .. {shape.tokens}, {shape.name}'s tokens"
                )
    return shapes


def attention_config(options: Options, shape: Shape) -> AttentionConfig:
    """Returns the svg2 preset's attention with the cluster counts of `shape` written out."""
    given = {"query_clusters": options.query_clusters, "key_clusters": options.key_clusters}
    overrides = {name: count for name, count in given.items() if count is not None}
    # A job needs a prompt; this one makes no video.
    layers = {"video": {"prompt": "a benchmark"}, "attention": overrides}
    attention = resolve(None, layers, preset="svg2").attention
    query, key = cluster_counts(attention, shape.tokens)
    return dataclasses.replace(attention, query_clusters=query, key_clusters=key)


def peers_on(options: Options, device: str) -> dict[str, str | None]:
    """Returns the peers asked for, each with the reason why it can't run on a "cpu" or "cuda" device, or None.

    Raises:
        ValueError: a peer that is asked for by name can't run.
    """
    named = [name for name in dict.fromkeys(options.peers) if name in PEERS]
    for name in named:
        reason = missing(PEERS[name], device)
        if reason is not None:
            raise ValueError(f"--peers is {name!r}, which can't run here: {reason}")
    general = [name for name, peer in PEERS.items() if peer.in_all] if "all" in options.peers else []
    return {name: missing(PEERS[name], device) for name in dict.fromkeys([*general, *named])}


def missing(peer: Peer, device: str) -> str | None:
    """Returns why `peer` can't run on a "cpu" or "cuda" device, or None; imports nothing."""
    absent = [p for p, m in zip(peer.packages, peer.modules, strict=True) if importlib.util.find_spec(m) is None]
    if absent:
        return f"not installed (pip install {' '.join(absent)})"
    return "it needs an NVIDIA GPU" if peer.needs_gpu and device != "cuda" else None


def words(values: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names in command-line words that hold them apart by spaces or commas."""
    return tuple(name for value in values or () for name in value.split(",") if name)


def _require_known(option: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{option} is {name!r}; accepted: {', '.join(known)}{guess}")
