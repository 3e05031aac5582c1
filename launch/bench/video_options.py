"""What `semvid bench e2e` and `bench throughput` can be asked, checked before any work. Needs no torch."""

import typing
from dataclasses import dataclass
from typing import Literal

from semvid.launch.bench.options import LEAST_DENSITY
from semvid.launch.commands.deployment import Deployment

Part = Literal["transformer", "vae", "text"]
PARTS: tuple[str, ...] = typing.get_args(Part)
TOYS = ("toy", "toy-joint")


@dataclass(frozen=True, kw_only=True, slots=True)
class E2eOptions:
    """One `semvid bench e2e`."""

    deployment: Deployment
    gpus: tuple[int, ...] = (1,)
    mesh: str | None = None
    """Degrees of the axes; None: those that serve each number of GPUs best."""
    layers: int | None = None
    """Of the transformer; None: all. With fewer, times are of fewer."""
    density: float | None = None
    """Mean over layers and heads; None: as recorded."""
    density_scale: float = 1.0
    repeats: int = 2
    """Timed forward passes of each kind."""
    parts: tuple[str, ...] = PARTS
    fp8: bool = False
    """Also with the large linear layers in FP8."""
    usp: bool = False
    """Also xfuser's USP, where the sequence is shared."""
    backend: str = "auto"
    device: str = "cuda"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputOptions:
    """One `semvid bench throughput`."""

    jobs: int = 4
    gpus: int = 1
    groups: tuple[int, ...] = ()
    """GPUs a job, one value a case; none: 1, 2, 4, … up to all."""
    device: str = "cuda"


def check_e2e(options: E2eOptions) -> None:
    """Raises ValueError if an option is outside what is accepted, naming it."""
    for count in options.gpus:
        _require(count >= 1, "--gpus", count, "1 or more")
    most = options.deployment.model.geometry.layers
    layers = options.layers
    _require(layers is None or 1 <= layers <= most, "--layers", layers, f"1 .. {most}")
    if layers is not None:
        sparse = layers > options.deployment.config.attention.dense_layers
        _require(sparse, "--layers", layers, "more than attention.dense_layers, so that one is sparse")
    density = options.density
    _require(density is None or LEAST_DENSITY <= density <= 1, "--density", density, f"{LEAST_DENSITY} .. 1")
    _require(0 < options.density_scale <= 10, "--density-scale", options.density_scale, "more than 0, up to 10")
    _require(options.repeats >= 1, "--repeats", options.repeats, "1 or more")
    if options.usp and options.deployment.model.family.joint:
        name = options.deployment.name
        raise ValueError(f"--usp is not for --config {name}, whose attention masks padding; accepted: a Wan model")
    for part in options.parts:
        _require(part in PARTS, "--parts", part, ", ".join(PARTS))
    if options.device == "cpu" and options.deployment.model.name not in TOYS:
        name = options.deployment.name
        raise ValueError(f"--config is {name!r}, which takes GPUs; accepted on a CPU: {', '.join(TOYS)}")


def check_throughput(options: ThroughputOptions) -> None:
    """Raises ValueError if an option is outside what is accepted, naming it."""
    _require(options.jobs >= 1, "--jobs", options.jobs, "1 or more")
    _require(options.gpus >= 1, "--gpus", options.gpus, "1 or more")
    for group in options.groups:
        fits = 1 <= group <= options.gpus and options.gpus % group == 0
        _require(fits, "--groups", group, f"a divisor of --gpus {options.gpus}")


def group_sizes(options: ThroughputOptions) -> list[int]:
    """Returns the GPUs a job of each case: those asked for, else the powers of two that divide all of them."""
    if options.groups:
        return list(dict.fromkeys(options.groups))
    return [2**i for i in range(options.gpus.bit_length()) if options.gpus % 2**i == 0]


def _require(condition: bool, option: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{option} is {value!r}; accepted: {accepted}")
