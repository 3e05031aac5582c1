"""The methods that `semvid bench quality` compares: settings of our attention, and others by their way of selecting."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from semvid.runtime.config import AttentionConfig, cluster_counts
from semvid.runtime.settings import presets, resolve

# The point that the parts are switched off from, and that its counts of clusters and its interval are varied around.
OURS: Mapping[str, Any] = {
    "p": 0.05,
    "floor": 0.1,
    "selection": "error",
    "tail": "second",
    "seeding": "spread",
    "first_iterations": 2,
    "iterations": 1,
    "refresh_every": 10,
    "share_branches": "yes",
}
# Each part of ours as it is in svg2.
WITHOUT: Mapping[str, Mapping[str, Any]] = {
    "floor": {"floor": 0.0, "p": 0.5},
    "tail": {"tail": "none", "selection": "mass"},
    "spread": {"tail": "first"},
    "error-selection": {"selection": "mass"},
    "seeding": {"seeding": "random", "first_iterations": 50},
    "reuse": {"refresh_every": 1, "iterations": 2},
    "sharing": {"share_branches": "no"},
}
# Floors of ours; the last has about the density of svg2-p0.9.
FRONT = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.42)
SVG2_FRONT = (0.7, 0.9, 0.95)
INTERVALS = (1, 5, 40)
# Blocks of so many tokens, and p.
BLOCKS = ((64, 0.7), (64, 0.9), (128, 0.9))
FAMILIES = ("noise", "svg2", "ours", "without", "clusters", "interval", "schedule", "blocks", "oracle", "presets")


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One run of each prompt."""

    name: str
    family: str
    attention: Mapping[str, Any] = field(default_factory=dict)
    """Over the svg2 preset."""
    rival: str | None = None
    """Another way to select: "blocks" of tokens in their own order, "oracle"."""
    block: int = 0
    """Tokens of a block."""


def methods(tokens: int) -> list[Method]:
    """Returns all methods for sequences of so many tokens, family by family; "dense" itself is not among them."""
    return [
        Method(name="dense-other-backend", family="noise", attention={"method": "dense"}),
        *(Method(name=_at("svg2", p), family="svg2", attention={"p": p}) for p in SVG2_FRONT),
        *(_ours(f"ours-{floor:g}", "ours", {"floor": floor}) for floor in FRONT),
        *(_ours(f"ours-without-{part}", "without", change) for part, change in WITHOUT.items()),
        *_cluster_counts(tokens),
        *(_ours(f"ours-every-{n}", "interval", {"refresh_every": n}) for n in INTERVALS),
        _ours("ours-growing", "schedule", {"refresh": "growing", "refresh_every": 2, "refresh_most": 10}),
        _ours("ours-drift", "schedule", {"refresh": "drift", "refresh_every": 5}),
        Method(name="svg2-branches-share", family="schedule", attention={"share_branches": "yes"}),
        *(_blocks(block, p) for block, p in BLOCKS),
        Method(name="oracle-p0.9", family="oracle", attention=_oracle(0.9), rival="oracle"),
        *(Method(name=f"preset-{name}", family="presets", attention=preset_layer(name)) for name in own_presets()),
    ]


def chosen(all_methods: Sequence[Method], words: Sequence[str]) -> list[Method]:
    """Returns the methods that names or families pick, all of them without any, in the order of `all_methods`.

    Raises:
        ValueError: a word that is neither.
    """
    names = [method.name for method in all_methods]
    families = list(dict.fromkeys(method.family for method in all_methods))
    for word in words:
        if word not in names and word not in families:
            raise ValueError(f"--methods is {word!r}; accepted: {', '.join(families)}, or {', '.join(names)}")
    return [method for method in all_methods if not words or method.name in words or method.family in words]


def config_of(method: Method) -> AttentionConfig:
    """Returns the whole setting of a method."""
    layer = {"video": {"prompt": "-"}, "attention": method.attention}
    return resolve(None, layer, preset="svg2").attention


def own_presets() -> list[str]:
    """Returns the names of the presets that are neither dense nor svg2."""
    return [name for name in presets() if name not in ("dense", "svg2")]


def preset_layer(name: str) -> dict[str, Any]:
    """Returns all options of a preset, so that nothing of svg2 shows through where they are laid over it."""
    found = asdict(resolve(None, {"video": {"prompt": "-"}}, preset=name).attention)
    return {**found, "clusters": list(found["clusters"])}


def _at(name: str, p: float) -> str:
    return f"{name}-p{p:g}"


def _ours(name: str, family: str, change: Mapping[str, Any]) -> Method:
    return Method(name=name, family=family, attention={**OURS, **change})


def _cluster_counts(tokens: int) -> list[Method]:
    query, key = cluster_counts(config_of(Method(name="", family="")), tokens)
    return [
        _ours(f"ours-{side}-x{factor:g}", "clusters", {f"{what}_clusters": min(tokens, round(count * factor))})
        for side, what, count in (("cq", "query", query), ("ck", "key", key))
        for factor in (0.5, 2)
    ]


def _blocks(block: int, p: float) -> Method:
    change = {"p": p, "floor": 0.0, "iterations": 1, "first_iterations": 1}
    return Method(name=_at(f"blocks-{block}", p), family="blocks", attention=change, rival="blocks", block=block)


def _oracle(p: float) -> dict[str, Any]:
    return {**OURS, "p": p, "floor": 0.0, "tail": "none", "selection": "mass", "refresh_every": 3}
