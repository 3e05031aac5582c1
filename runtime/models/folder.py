"""What a diffusers checkpoint folder holds, read and checked before any model is loaded. Needs no torch.

Only JSON, TOML and the headers of safetensors files are read.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semvid.runtime.config import AttentionConfig, Config, VideoConfig, check_tokens
from semvid.runtime.models.families import facts
from semvid.runtime.models.families.facts import Facts
from semvid.runtime.settings import DEMO_MODEL, read_toml

DEFAULTS_FILE = "semvid.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How a model's latent grid lies over pixels, and its transformer's size."""

    family: Facts
    frames_per_latent: int
    """VAE compression in time: f frames make (f - 1) / this + 1 latent frames."""
    pixels_per_latent: int
    """VAE compression in height and width."""
    patch: tuple[int, int, int]
    """Latent frames, rows and columns in one token."""
    heads: int
    layers: int

    def tokens(self, video: VideoConfig) -> int:
        """Returns the number of tokens of `video`."""
        latent_frames = (video.frames - 1) // self.frames_per_latent + 1
        rows, columns = (self.pixels_per_latent * self.patch[1], self.pixels_per_latent * self.patch[2])
        return latent_frames // self.patch[0] * (video.height // rows) * (video.width // columns)


def locate(path: str) -> Path:
    """Returns the folder of a model: `path`, or the embedded one for "demo"."""
    return DEMO_MODEL if path == "demo" else Path(path)


def defaults(folder: Path) -> dict[str, Any]:
    """Returns the checkpoint's own defaults: preset and [video] of its `semvid.toml`, {} if it has none.

    Raises:
        ValueError: the file is unreadable or holds something other than these.
    """
    path = folder / DEFAULTS_FILE
    if not path.is_file():
        return {}
    layer = read_toml(path, "--model's semvid.toml")
    stray = sorted(set(layer) - {"video", "preset"})
    if stray:
        raise ValueError(f"{path} holds {stray[0]!r}; a checkpoint's defaults are preset and [video] alone")
    return layer


def inspect(folder: Path) -> Geometry:
    """Returns the geometry of a checkpoint whose every file is there and whole.

    Raises:
        ValueError: no checkpoint, an unsupported family, a missing or truncated file; the message says which.
    """
    index, family = _index(folder), family_of(folder)
    for name in family.parts:
        if (index.get(name) or [None])[0] is None:
            raise ValueError(f"--model is {str(folder)!r}, a {family.title} model without {name!r}, which it needs")
    for name in family.transformers:
        if index[name][1] != family.transformer:
            raise ValueError(f"--model's {name!r} is a {index[name][1]}; {family.title} has a {family.transformer}")
    for name, part in index.items():
        if isinstance(part, list) and part[0] is not None:
            _check_part(folder / name)
    configs = [_read_json(folder / name / "config.json") for name in family.transformers]
    try:
        return geometry(family, configs[0], _read_json(folder / "vae" / "config.json"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--model is {str(folder)!r}, whose transformer/config.json lacks {error}") from None


def geometry(family: Facts, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Returns the geometry of a model by the configurations of its (first) transformer and its VAE.

    Raises:
        KeyError: one of them lacks what a model of this family has.
    """
    patch = transformer["patch_size"]
    if "patch_size_t" in transformer:
        patch = (transformer["patch_size_t"], patch, patch)
    return Geometry(
        family=family,
        # Wan's VAEs and HunyuanVideo's have different words for it.
        frames_per_latent=int(vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 4),
        pixels_per_latent=int(vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio") or 8),
        patch=(int(patch[0]), int(patch[1]), int(patch[2])),
        heads=int(transformer["num_attention_heads"]),
        layers=int(transformer["num_layers"]) + int(transformer.get("num_single_layers", 0)),
    )


def family_of(folder: Path) -> Facts:
    """Returns the family of a checkpoint; reads its model_index.json alone.

    Raises:
        ValueError: no checkpoint, or an unsupported family.
    """
    index = _index(folder)
    try:
        return facts.recognize(index)
    except ValueError as error:
        raise ValueError(f"--model is {str(folder)!r}, {error}") from None


def is_guided(config: Config) -> bool:
    """Returns whether the job of a configuration has two branches.

    Raises:
        ValueError: as `family_of`.
    """
    return family_of(locate(config.model.path)).guided(config.video.guidance)


def check(config: Config, geometry: Geometry) -> None:
    """Raises ValueError if the video or the clusters of a configuration do not fit the model."""
    check_size(config.video, geometry)
    check_options(config.video, geometry.family)
    if config.job.share_weights and config.model.linear == "fp8":
        raise ValueError("job.share_weights is True with model.linear 'fp8'; accepted: one of them")
    check_anchors(config.attention, geometry.family)
    if config.attention.method == "clusters":
        check_tokens(config.attention, geometry.tokens(config.video), joint=geometry.family.joint)


def check_anchors(attention: AttentionConfig, family: Facts) -> None:
    """Raises ValueError if anchors are insisted on for a family that has text in the sequence."""
    if attention.anchors == "yes" and family.joint:
        what = f"{family.title} with its text in the sequence has not"
        raise ValueError(f"attention.anchors is 'yes', which {what}; accepted: no, or auto, which is no there")


def check_options(video: VideoConfig, family: Facts) -> None:
    """Raises ValueError if `video` has an option that a family has not, or lacks one that it needs."""
    if family.image == "required" and video.image is None:
        raise ValueError(f"image is None; accepted: --image FILE, which a video of {family.title} begins with")
    if family.image == "none" and video.image is not None:
        raise ValueError(f"image is {video.image!r}, but {family.title} begins with none; accepted: no --image")
    if video.image is not None:
        check_image(Path(video.image))
    if len(family.transformers) == 1:
        for name in ("guidance_2", "boundary"):
            if getattr(video, name) is not None:
                value, what = getattr(video, name), f"{family.title}, which has one transformer"
                raise ValueError(f"{name} is {value}, but the model is {what}; accepted: to leave it out")
    if family.branches == 1 and video.negative_prompt:
        what = f"{family.title} has no unconditional branch"
        raise ValueError(f"negative_prompt is {video.negative_prompt!r}, but {what}; accepted: none")


def check_image(path: Path) -> None:
    """Raises ValueError unless `path` is a picture that can be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            # All of it: verify() passes over a JPEG that was cut short.
            image.load()
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        reason = getattr(error, "strerror", None) or "no picture that can be read"
        raise ValueError(f"image is {str(path)!r}: {reason.lower()}; accepted: a PNG, JPEG or WebP file") from None


def check_size(video: VideoConfig, geometry: Geometry) -> None:
    """Raises ValueError unless the model can make `video`'s size; the message says the nearest that it can."""
    _check_divisible("frames", video.frames - 1, geometry.frames_per_latent, 1)
    _check_divisible("height", video.height, geometry.pixels_per_latent * geometry.patch[1], 0)
    _check_divisible("width", video.width, geometry.pixels_per_latent * geometry.patch[2], 0)


def _check_divisible(name: str, value: int, step: int, offset: int) -> None:
    if value % step == 0:
        return
    least = 0 if offset else step
    near = sorted({max(least, value // step * step) + offset, math.ceil(value / step) * step + offset})
    form = f"{step}k + {offset}" if offset else f"a multiple of {step}"
    raise ValueError(f"{name} is {value + offset}; accepted: {form}, nearest {' and '.join(map(str, near))}")


def _index(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's model_index.json."""
    if not (folder / "model_index.json").is_file():
        what = "has no model_index.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"--model is {str(folder)!r}, which {what}; accepted: a diffusers checkpoint folder")
    return _read_json(folder / "model_index.json")


def _check_part(part: Path) -> None:
    """Raises ValueError if a component's folder is missing or one of its weight files is missing or truncated."""
    if not part.is_dir():
        raise ValueError(f"--model lacks the folder {str(part)!r}")
    for index in part.glob("*.safetensors.index.json"):
        for name in sorted(set(_read_json(index).get("weight_map", {}).values())):
            if not (part / name).is_file():
                raise ValueError(f"--model lacks the file {str(part / name)!r}")
    weights = sorted(part.glob("*.safetensors"))
    config = _read_json(part / "config.json") if (part / "config.json").is_file() else {}
    if not weights and ("_class_name" in config or "architectures" in config):
        raise ValueError(f"--model has no safetensors file in {str(part)!r}; other formats are not read")
    for path in weights:
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """Raises ValueError unless the file is as long as its header says (format: length u64, JSON header, data)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"--model holds a truncated file: {path} ({size} bytes, header incomplete)")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"--model holds a damaged file: {path} (its header is no safetensors header)") from None
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise ValueError(f"--model holds a truncated file: {path} ({size} of {whole} bytes)")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model holds {str(path)!r}, which can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--model holds {str(path)!r}, which is no JSON object")
    return content
