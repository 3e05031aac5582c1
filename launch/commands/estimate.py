"""`semvid estimate`: tokens, mesh, memory and time of a video before anything is loaded, and what would fit."""

import argparse
import json
import sys
import typing
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from semvid.launch.commands import deployment as deployments
from semvid.launch.commands.deployment import Deployment, step_kinds
from semvid.parallel import mesh as meshes
from semvid.parallel.mesh import Mesh
from semvid.runtime import settings
from semvid.runtime.config import Config, Linear
from semvid.runtime.models import folder as folders
from semvid.runtime.models import predicted_memory, predicted_speed, published
from semvid.runtime.models.predicted_memory import Need

GIB = 1 << 30
# Of an H100; an H200 has 141 GB, that is 139 GiB as PyTorch sees it.
DEFAULT_GPU_GIB = 79.0
MOST_GPUS = 8
LINEAR = typing.get_args(Linear)


def add_estimate(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `estimate` to the commands."""
    parser = add_parser(
        "estimate",
        help="say what a video needs: tokens, mesh, memory, time; loads nothing",
        description="Predict tokens, mesh, memory of each GPU and time, before anything is loaded.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_estimate, parser=parser)
    add = parser.add_argument
    names = ", ".join(settings.deployments())
    add("--config", metavar="NAME|FILE", type=Path, help=f"a deployment: {names}; or a TOML file with [deployment]")
    text = f"a checkpoint folder, or a published model: {', '.join(published.names())} (default: the deployment's)"
    add("--model", metavar="DIR|NAME", help=text)
    add("--gpus", type=int, metavar="N", help="GPUs that share the job (default: the deployment's, else 1)")
    add("--mesh", metavar="AXES", help="how they share it (default: chosen, and said why)")
    add("--share-weights", action="store_true", help="as for run: each GPU holds a part of the transformer's weights")
    add("--linear", choices=LINEAR, help="as for run: fp8 keeps large linear layers in a byte a weight")
    add("--gpu-memory", type=float, metavar="GIB", help=f"of each (default: this machine's, else {DEFAULT_GPU_GIB:g})")
    for name in ("height", "width", "frames", "steps"):
        add(f"--{name}", type=int, metavar="N", help="default: the deployment's, else the configuration's")
    add("--guidance", type=float, metavar="X", help="likewise")
    add("--preset", metavar="NAME", help="likewise")
    add("--json", action="store_true", help="print one JSON object on stdout; the text goes to stderr")


def run(
    deployment: Deployment, mesh_text: str | None, gpu_bytes: float, *, share_weights: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Returns the prediction as JSON values and as lines.

    Args:
        deployment: model, video, settings and number of GPUs.
        mesh_text: degrees of the axes; None: chosen.
        gpu_bytes: memory of each GPU.
        share_weights: whether each holds a part of the weights.

    Raises:
        ValueError: the mesh can't be realised, or weights can't be shared: there is one GPU, or they are in FP8.
    """
    mesh, why = choose_mesh(deployment, mesh_text)
    if share_weights and mesh.world_size == 1:
        raise ValueError("--share-weights with one GPU, which has nobody to share with; accepted: --gpus 2 or more")
    config = deployment.config
    if share_weights and config.model.linear == "fp8":
        raise ValueError("--share-weights with --linear fp8; accepted: one of them")
    need = _need(deployment, mesh, share=share_weights)
    density = predicted_speed.DENSITY if config.attention.density is None else config.attention.density
    fp8 = config.model.linear == "fp8"
    seconds = predicted_speed.predict(deployment.model, config.video, config.attention, mesh, density=density, fp8=fp8)
    counts = step_kinds(deployment)
    passes = deployment.branches // mesh.cfg
    dense = passes * config.video.steps * seconds.dense
    fits = need.peak <= gpu_bytes
    report: dict[str, Any] = {
        "deployment": deployment.name,
        "model": deployment.model.name,
        "family": deployment.model.family.name,
        "size": [config.video.frames, config.video.height, config.video.width],
        "tokens": deployment.tokens,
        "gpus": deployment.gpus,
        "mesh": str(mesh),
        "why": why,
        "bytes": asdict(need),
        "phase_bytes": need.phases,
        "peak_bytes": need.peak,
        "gpu_bytes": round(gpu_bytes),
        "fits": fits,
        "would_fit": None if fits else alternatives(deployment, gpu_bytes),
        "share_weights": share_weights,
        "linear": config.model.linear,
        "steps": counts,
        "pass_seconds": asdict(seconds),
        "density": density,
        "denoise_seconds": seconds.of_video(counts, passes),
        "dense_denoise_seconds": dense,
    }
    return report, _lines(report, need)


def choose_mesh(deployment: Deployment, text: str | None) -> tuple[Mesh, str]:
    """Returns the mesh and why it is this one, in words.

    Raises:
        ValueError: `text` can't be realised.
    """
    guided, gpus = deployment.guided, deployment.gpus
    if text is not None:
        mesh = meshes.parse(text, gpus)
        meshes.check(mesh, gpus, guided=guided)
        return mesh, "as asked for"
    mesh = meshes.choose(gpus, guided=guided)
    if gpus == 1:
        return mesh, "one GPU has everything"
    parts = []
    if mesh.cfg == 2:
        parts.append("the two branches apart, since they talk once a step")
    elif guided:
        parts.append(f"{gpus} GPUs can't be parted into two equal groups, so both branches run on all")
    else:
        parts.append("one branch")
    if mesh.ulysses > 1:
        parts.append(f"the sequence over {mesh.ulysses} by heads and parts of heads, inside one host")
    return mesh, "; ".join(parts)


def alternatives(deployment: Deployment, gpu_bytes: float) -> str:
    """Returns what would fit where the deployment does not: FP8 or shared weights, more GPUs, or fewer frames."""
    found = []
    mesh = meshes.choose(deployment.gpus, guided=deployment.guided)
    plain = deployment.config.model.linear == "same"
    if plain and _need(with_linear(deployment, "fp8"), mesh).peak <= gpu_bytes:
        found.append("--linear fp8")
    if plain and mesh.world_size > 1 and _need(deployment, mesh, share=True).peak <= gpu_bytes:
        found.append("--share-weights")
    for gpus in range(deployment.gpus + 1, MOST_GPUS + 1):
        mesh = meshes.choose(gpus, guided=deployment.guided)
        if _need(deployment, mesh).peak <= gpu_bytes:
            found.append(f"--gpus {gpus} ({mesh})")
            break
        if plain and _need(deployment, mesh, share=True).peak <= gpu_bytes:
            found.append(f"--gpus {gpus} --share-weights ({mesh})")
            break
    mesh = meshes.choose(deployment.gpus, guided=deployment.guided)
    step = deployment.model.geometry.frames_per_latent
    for frames in range(deployment.config.video.frames - step, 0, -step):
        if _need(deployment, mesh, frames).peak <= gpu_bytes:
            found.append(f"--frames {frames}")
            break
    weights = _need(deployment, mesh, 1)
    if not found:
        found.append(f"GPUs of {weights.peak / GIB:.0f} GiB and more: one frame needs as much")
    return ", or ".join(found)


def with_linear(deployment: Deployment, linear: Linear) -> Deployment:
    """Returns a deployment with another precision of the large linear layers: "same" or "fp8"."""
    model = replace(deployment.config.model, linear=linear)
    return replace(deployment, config=replace(deployment.config, model=model))


def refuse(report: dict[str, Any]) -> None:
    """Raises ValueError if what was predicted does not fit, with what would."""
    if not report["fits"]:
        phase = max(report["phase_bytes"], key=lambda name: report["phase_bytes"][name])
        peak, there = report["peak_bytes"] / GIB, report["gpu_bytes"] / GIB
        raise ValueError(
            f"--gpus is {report['gpus']}, on which {phase} is predicted to take {peak:.1f} of {there:.1f} GiB a GPU; "
            f"would fit: {report['would_fit']}"
        )


def _need(deployment: Deployment, mesh: Mesh, frames: int | None = None, *, share: bool = False) -> Need:
    video, attention = deployment.config.video, deployment.config.attention
    if frames is not None:
        video = replace(video, frames=frames)
    how = {"guided": deployment.guided, "share_weights": share, "fp8": deployment.config.model.linear == "fp8"}
    return predicted_memory.predict(deployment.model, video, attention, mesh, **how)


def _lines(report: dict[str, Any], need: Need) -> list[str]:
    frames, height, width = report["size"]
    passes = report["pass_seconds"]
    phases = ", ".join(f"{name} {size / GIB:.1f}" for name, size in report["phase_bytes"].items())
    steps = ", ".join(f"{count} {kind}" for kind, count in report["steps"].items() if count)
    kinds = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in passes.items())
    gain = report["dense_denoise_seconds"] / report["denoise_seconds"]
    lines = [
        f"model     {report['model']} ({report['family']}), {frames} x {height} x {width}: {report['tokens']} tokens",
        f"mesh      {report['mesh']}: {report['why']}",
        f"memory    {report['peak_bytes'] / GIB:.1f} GiB a GPU at most, of {report['gpu_bytes'] / GIB:.1f}: {phases}",
        f"          weights {need.weights / GIB:.1f}, activations {need.activations / GIB:.1f}, shared rows "
        f"{need.windows / GIB:.1f}, state between steps {need.state / GIB:.1f}, encoders {need.encoders / GIB:.1f}",
        f"decoding  {'in tiles, shared among all GPUs' if need.tiled else 'whole, on the first GPU'}",
        f"steps     {steps}",
        f"seconds   {kinds} a forward pass; {report['denoise_seconds']:.0f} for all steps, dense "
        f"{report['dense_denoise_seconds']:.0f} ({gain:.2f} x)",
        "          predicted for H200s by rates measured on one; density "
        f"{report['density']:g} of the sparse calls is assumed",
    ]
    if not report["fits"]:
        lines.append(f"does not fit; would fit: {report['would_fit']}")
    return lines


def _estimate(args: argparse.Namespace) -> int:
    deployment = _deployment(args)
    if args.linear is not None:
        deployment = with_linear(deployment, args.linear)
    report, lines = run(deployment, args.mesh, _gpu_bytes(args.gpu_memory), share_weights=args.share_weights)
    print("\n".join(lines), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, allow_nan=False))
    refuse(report)
    return 0


def _deployment(args: argparse.Namespace) -> Deployment:
    """Returns what the command line asks about.

    Raises:
        ValueError: neither --config nor --model, an unknown one, or a size that does not fit the model.
    """
    names = ("height", "width", "frames", "steps", "guidance")
    video = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.config is None and args.model is None:
        accepted = f"--config NAME ({', '.join(settings.deployments())}) or --model DIR"
        raise ValueError(f"nothing to estimate; accepted: {accepted}")
    if args.config is not None and args.model is None:
        return deployments.read(args.config, args.preset, video=video, gpus=args.gpus)
    known = args.model in published.names()
    model = published.read(args.model) if known else published.of_folder(folders.locate(args.model))
    file = {} if args.config is None else settings.read_toml(settings.config_file(args.config), "--config")
    config: Config = settings.resolve(file, {"video": {"prompt": "an estimate", **video}}, preset=args.preset)
    return deployments.made(args.model, model, config, 1 if args.gpus is None else args.gpus)


def _gpu_bytes(given: float | None) -> float:
    """Returns the memory of a GPU: what was said, else this machine's, else an H100's."""
    if given is not None:
        if not given > 0:
            raise ValueError(f"--gpu-memory is {given}; accepted: more than 0 GiB")
        return given * GIB
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return DEFAULT_GPU_GIB * GIB
