"""What describes a job on a command line, and the configuration that it comes to."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from semvid.launch.commands import launchers
from semvid.runtime import settings
from semvid.runtime.config import AttentionConfig, Config, JobConfig, ModelConfig
from semvid.runtime.jobs import job as jobs
from semvid.runtime.models import folder as folders

JSON_HELP = "print one JSON object on stdout; the summary goes to stderr"
VIDEO_OPTIONS = (
    "prompt", "seed", "steps", "height", "width", "frames", "image", "guidance", "guidance_2", "boundary",
    "negative_prompt",
)  # fmt: skip


def presets_text() -> str:
    """Returns what names a preset, for --help."""
    return f"{', '.join(settings.presets())}, or a TOML file with [attention]"


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Adds what describes a job. Defaults are the checkpoint's own, then those of the config classes."""
    text = "default: the checkpoint's"
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help=f"what is to be seen ({text}, if it has one)")
    add = parser.add_argument
    add("--model", metavar="DIR", help="a diffusers checkpoint folder (default: demo, the small model semvid carries)")
    add(
        "--config",
        metavar="FILE",
        type=Path,
        help="a TOML file: preset, [model], [video], [attention], [job]; a job.toml; or a deployment: "
        + ", ".join(settings.deployments()),
    )
    add("--seed", type=int, help="of the noise and the first centroids (default: 0)")
    add("--steps", type=int, help=f"denoising steps ({text})")
    add("--height", type=int, help=f"pixels ({text})")
    add("--width", type=int, help=f"pixels ({text})")
    add("--frames", type=int, help=f"frames, 4k + 1 ({text})")
    add("--image", metavar="FILE", help="a picture that the video begins with, for models that take one")
    add("--guidance", type=float, help=f"classifier-free guidance; 1 or less: none ({text})")
    add("--guidance-2", type=float, metavar="X", help="of the second of two transformers (default: as --guidance)")
    text_2 = "share of the noise below which the second of two transformers runs (default: the checkpoint's)"
    add("--boundary", type=float, metavar="X", help=text_2)
    add("--negative-prompt", metavar="TEXT", help="what is not to be seen (default: nothing)")
    add("--device", choices=choices(ModelConfig, "device"), help="default: auto, the GPU if there is one")
    add("--dtype", choices=choices(ModelConfig, "dtype"), help="default: auto, bf16 where the device computes in it")
    text_8 = "fp8: the transformer's large linear layers in FP8, faster and nearly the same (default: same, as --dtype)"
    add("--linear", choices=choices(ModelConfig, "linear"), help=text_8)
    add(
        "--backend",
        choices=choices(AttentionConfig, "backend"),
        help="sparse attention's kernels (default: auto, the fastest here)",
    )
    add("--out", metavar="DIR", type=Path, help=f"the job folder (default: a new one in {jobs.DEFAULT_ROOT}/)")
    add("--json", action="store_true", help=JSON_HELP)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds what describes a job that can be resumed."""
    add_job_options(parser)
    default = f"that of --config, else the checkpoint's, else {Config().preset}"
    preset = f"{presets_text()} (default: {default}); replaces [attention] of --config"
    parser.add_argument("--preset", metavar="NAME", help=preset)
    text = f"denoising steps from one checkpoint to the next; 0: none (default: {JobConfig().checkpoint_steps})"
    parser.add_argument("--checkpoint-every", type=int, metavar="STEPS", help=text)
    text = "each GPU holds a part of the transformer's weights: for models that one can't hold"
    parser.add_argument("--share-weights", action="store_true", default=None, help=text)


def choices(cls: type, field: str) -> tuple[str, ...]:
    """Returns what a Literal field of a config class accepts."""
    return typing.get_args(typing.get_type_hints(cls)[field])


def config_of(args: argparse.Namespace, preset: str | None, preset_option: str = "--preset") -> Config:
    """Returns the checked configuration of a command line; loads no model."""
    file = settings.read_toml(settings.config_file(args.config), "--config") if args.config else {}
    video = {name: getattr(args, name) for name in VIDEO_OPTIONS if getattr(args, name) is not None}
    named = {"path": args.model, "device": args.device, "dtype": args.dtype, "linear": args.linear}
    model = {name: value for name, value in named.items() if value is not None}
    attention = {} if args.backend is None else {"backend": args.backend}
    table = file.get("model", {})
    path = args.model or (table.get("path") if isinstance(table, dict) else None) or ModelConfig().path
    folder = folders.locate(str(path))
    geometry = folders.inspect(folder)
    # What `compare` makes can't be resumed.
    every = getattr(args, "checkpoint_every", 0)
    job = {} if every is None else {"checkpoint_steps": every}
    if getattr(args, "share_weights", None):
        job["share_weights"] = True
    options = {"video": video, "model": model, "attention": attention, "job": job}
    config = settings.resolve(
        file, options, checkpoint=folders.defaults(folder), preset=preset, preset_option=preset_option
    )
    # A job goes on from wherever its command is given, and its ranks may start in other folders.
    if config.model.path != ModelConfig().path:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder.absolute())))
    if config.video.image is not None:
        image = str(Path(config.video.image).absolute())
        config = dataclasses.replace(config, video=dataclasses.replace(config.video, image=image))
    folders.check(config, geometry)
    check_device(config, args)
    return config


def replaced(args: argparse.Namespace, video: dict[str, Any]) -> Config:
    """Returns the configuration of a command line with some options of [video] replaced."""
    for name in video:
        if name not in VIDEO_OPTIONS:
            raise ValueError(f"unknown option {name!r} in [[video]]; accepted: {', '.join(VIDEO_OPTIONS)}")
    return config_of(argparse.Namespace(**{**vars(args), **video}), args.preset)


def check_device(config: Config, args: argparse.Namespace) -> None:
    """Raises ValueError if the device, backend or FP8 asked for is not there; a cluster's can't be seen from here."""
    model, fp8 = config.model, config.model.linear == "fp8"
    asked = model.device == "cuda" or config.attention.backend != AttentionConfig().backend
    if launchers.is_elsewhere(args) or not (asked or fp8):
        return
    from semvid.kernels.dispatch import select
    from semvid.runtime.device import resolve_device

    device = resolve_device(model.device)
    select(config.attention.backend, device)
    if fp8:
        from semvid.runtime.device import resolve_dtype
        from semvid.runtime.layers.fp8_linears import check_fp8

        check_fp8(device, resolve_dtype(model.dtype, device))
