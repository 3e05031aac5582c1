"""What a diffusers checkpoint folder holds, read and checked before any model is loaded. Needs no torch.

Only JSON, TOML and the headers of safetensors files are read.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semvid.runtime.config import DEMO_MODEL, Config, VideoConfig, check_tokens, read_toml

FAMILIES = ("Wan 2.1 text-to-video (WanPipeline)",)
DEFAULTS_FILE = "semvid.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How a model's latent grid lies over pixels, and its transformer's size."""

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
    if not (folder / "model_index.json").is_file():
        what = "has no model_index.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"--model is {str(folder)!r}, which {what}; accepted: a diffusers checkpoint folder")
    index = _read_json(folder / "model_index.json")
    _check_family(folder, index)
    for name, part in index.items():
        if isinstance(part, list) and part[0] is not None:
            _check_part(folder / name)
    transformer = _read_json(folder / "transformer" / "config.json")
    vae = _read_json(folder / "vae" / "config.json")
    try:
        return Geometry(
            frames_per_latent=int(vae.get("scale_factor_temporal", 4)),
            pixels_per_latent=int(vae.get("scale_factor_spatial", 8)),
            patch=tuple(transformer["patch_size"]),
            heads=int(transformer["num_attention_heads"]),
            layers=int(transformer["num_layers"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--model is {str(folder)!r}, whose transformer/config.json lacks {error}") from None


def check(config: Config, geometry: Geometry) -> None:
    """Raises ValueError if the video or the clusters of a configuration do not fit the model."""
    check_size(config.video, geometry)
    if config.attention.method == "clusters":
        check_tokens(config.attention, geometry.tokens(config.video))


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


def _check_family(folder: Path, index: dict[str, Any]) -> None:
    name = index.get("_class_name")
    if name != "WanPipeline":
        found = f"a {name}" if name else "of an unnamed family"
    elif index.get("transformer_2", [None])[0] is not None or index.get("boundary_ratio") is not None:
        found = "a Wan 2.2 model with two transformers"
    elif index.get("expand_timesteps"):
        found = "a Wan 2.2 TI2V model"
    else:
        return
    raise ValueError(f"--model is {str(folder)!r}, {found}; supported: {', '.join(FAMILIES)}")


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
