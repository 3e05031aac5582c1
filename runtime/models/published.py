"""Published models: the configurations of their parts, and a transformer of full size with random weights."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semvid.runtime.models.families import facts
from semvid.runtime.models.families.facts import Facts
from semvid.runtime.models.folder import Geometry, geometry, inspect
from semvid.runtime.settings import CONFIGS, DEMO_MODEL, read_toml

if TYPE_CHECKING:
    import torch

MODELS = CONFIGS / "models"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """One encoder of prompts or images, of the transformers library."""

    name: str
    kind: str
    """Its class."""
    parameters: int
    tokens: int
    """That it reads at most."""
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What a model's repository says of its parts."""

    name: str
    family: Facts
    transformer: Mapping[str, Any]
    """Of each of its transformers, as in transformer/config.json."""
    vae: Mapping[str, Any]
    vae_parameters: int
    encoders: tuple["Encoder", ...]
    """What encodes prompts and images."""
    boundary_ratio: float | None

    @property
    def geometry(self) -> Geometry:
        """How its latent grid lies over pixels."""
        return geometry(self.family, self.transformer, self.vae)

    @property
    def width(self) -> int:
        """Channels of its hidden states: heads · D."""
        return int(self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"])

    @property
    def feed_forward(self) -> int:
        """Channels inside its feed-forward layers."""
        return int(self.transformer.get("ffn_dim") or self.transformer["mlp_ratio"] * self.width)


def names() -> list[str]:
    """Returns the names of the published models that semvid knows."""
    return sorted(path.stem for path in MODELS.glob("*.toml"))


def read(name: str, option: str = "--model") -> Published:
    """Returns a published model.

    Raises:
        ValueError: none of `names`; the message names `option`.
    """
    if name not in names():
        raise ValueError(f"{option} is {name!r}; accepted: {', '.join(names())}")
    table = read_toml(MODELS / f"{name}.toml", option)
    return Published(
        name=name,
        family=facts.by_name(table["family"]),
        transformer=table["transformer"],
        vae=table["vae"],
        vae_parameters=table["vae_parameters"],
        encoders=tuple(Encoder(name=key, **_encoder(value)) for key, value in table["text_encoders"].items()),
        boundary_ratio=table.get("boundary_ratio"),
    )


def of_folder(folder: Path) -> Published:
    """Returns what a checkpoint folder says of the same; encoders are counted by their files, not described.

    Raises:
        ValueError: as `semvid.runtime.models.folder.inspect`.
    """
    family = inspect(folder).family
    encoders = [part for part in family.parts if "encoder" in part]
    tables = {name: json.loads((folder / name / "config.json").read_text()) for name in ("transformer", "vae")}
    return Published(
        name=folder.name,
        family=family,
        transformer=tables["transformer"],
        vae=tables["vae"],
        vae_parameters=_stored_parameters(folder / "vae"),
        encoders=tuple(
            Encoder(name=name, kind="", parameters=_stored_parameters(folder / name), tokens=0, config={})
            for name in encoders
        ),
        boundary_ratio=json.loads((folder / "model_index.json").read_text()).get("boundary_ratio"),
    )


def _stored_parameters(part: Path) -> int:
    """Returns how many parameters a component's safetensors files hold, by their headers."""
    total = 0
    for path in part.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def encoder_call(encoder: Encoder, made: Any) -> Callable[[], Any]:
    """Returns a call of an encoder on random input of the most tokens it reads."""
    import torch

    device = next(made.parameters()).device
    if "Vision" in encoder.kind:
        size = made.config.image_size
        pixels = torch.randn(1, 3, size, size, device=device, dtype=made.dtype)
        return lambda: made(pixels)
    tokens = torch.randint(10, 500, (1, encoder.tokens), device=device)
    return lambda: made(tokens)


def build_vae(model: Published, device: "torch.device") -> Any:
    """Returns the VAE of a published configuration with random weights in fp32; its statistics are 0 and 1."""
    import diffusers
    import torch

    table = dict(model.vae)
    if "z_dim" in table:
        table |= {"latents_mean": [0.0] * table["z_dim"], "latents_std": [1.0] * table["z_dim"]}
    torch.manual_seed(0)
    with torch.device(device):
        vae = getattr(diffusers, model.family.vae)(**table)
    return vae.requires_grad_(False).eval()


def build_encoder(encoder: Encoder, device: "torch.device", dtype: "torch.dtype") -> Any:
    """Returns an encoder of a published configuration with random weights."""
    import transformers

    kind = getattr(transformers, encoder.kind)
    with _made_in(device, dtype):
        made = kind(kind.config_class(**encoder.config))
    return made.requires_grad_(False).eval()


def build_pipeline(model: Published, device: "torch.device", dtype: "torch.dtype") -> Any:
    """Returns a whole pipeline of random weights, which `save_pretrained` makes a checkpoint of.

    Tokenizers are the demo model's, with the few words that it knows.
    """
    import diffusers
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL / "tokenizer", local_files_only=True)
    # In the order of their names in the family's parts.
    encoders = [build_encoder(encoder, device, dtype) for encoder in model.encoders]
    parts: dict[str, Any] = {"vae": build_vae(model, device)}
    for name in model.family.parts:
        if "tokenizer" in name:
            parts[name] = tokenizer
        elif "encoder" in name:
            parts[name] = encoders.pop(0)
        elif name == "image_processor":
            parts[name] = transformers.CLIPImageProcessor()
    for number, name in enumerate(model.family.transformers):
        parts[name] = build_transformer(model, device, dtype, seed=number)
    if model.family.joint:
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    else:
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
        parts["scheduler"] = diffusers.UniPCMultistepScheduler(**flow)
    if len(model.family.transformers) == 2:
        parts["boundary_ratio"] = model.boundary_ratio
    if model.family.name == "wan2.2-ti2v":
        parts["expand_timesteps"] = True
    return getattr(diffusers, model.family.pipeline)(**parts)


@contextlib.contextmanager
def _made_in(device: "torch.device", dtype: "torch.dtype") -> Iterator[None]:
    """Makes new parameters on a device and in a precision."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _encoder(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of an Encoder; `class` is no name in Python."""
    return {"kind": table["class"], **{key: value for key, value in table.items() if key != "class"}}


def build_transformer(
    model: Published, device: "torch.device", dtype: "torch.dtype", *, seed: int = 0, **changes: Any
) -> Any:
    """Returns a transformer of a published configuration with random weights, made where it is used.

    Nothing of it is ever on another device or on the disk: 14 billion parameters in bf16 take 29 GB of the GPU and none
    of the host. Weights are as PyTorch initialises a layer, so that activations stay finite. What a checkpoint's loader
    keeps in fp32 is fp32.

    Args:
        model: the configuration.
        device: where.
        dtype: of the weights.
        seed: of the weights.
        changes: configuration values to replace, such as num_layers.
    """
    import diffusers
    import torch

    kind = getattr(diffusers, model.family.transformer)
    torch.manual_seed(seed)
    with _made_in(device, dtype):
        transformer = kind(**{**model.transformer, **changes})
    kept = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    for name, parameter in transformer.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return transformer.requires_grad_(False).eval()
