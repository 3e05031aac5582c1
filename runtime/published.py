"""Published models: the configurations of their parts, and a transformer of full size with random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from semvid.runtime.config import CONFIGS, read_toml
from semvid.runtime.families import facts
from semvid.runtime.families.facts import Facts
from semvid.runtime.folder import Geometry, geometry

if TYPE_CHECKING:
    import torch

MODELS = CONFIGS / "models"


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What a model's repository says of its parts."""

    name: str
    family: Facts
    transformer: Mapping[str, Any]
    """Of each of its transformers, as in transformer/config.json."""
    vae: Mapping[str, Any]
    text_encoders: Mapping[str, int]
    """Parameters of what encodes prompts and images."""
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
        text_encoders=table["text_encoders"],
        boundary_ratio=table.get("boundary_ratio"),
    )


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

    kind, before = getattr(diffusers, model.family.transformer), torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = kind(**{**model.transformer, **changes})
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    for name, parameter in transformer.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return transformer.requires_grad_(False).eval()
