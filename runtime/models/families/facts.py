"""Which model families there are, what a checkpoint of each holds and what it can be told. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """One family, as its checkpoints and its options show it."""

    name: str
    """As in docs and configurations."""
    title: str
    pipeline: str
    """The diffusers pipeline that its model_index.json names."""
    transformer: str
    """The class of its transformers; `vae` likewise."""
    vae: str
    parts: tuple[str, ...]
    """Components that a checkpoint must have."""
    transformers: tuple[str, ...] = ("transformer",)
    """Components that denoise, in the order of use."""
    image: Literal["none", "optional", "required"] = "none"
    """Whether a video can begin with an image."""
    branches: int = 2
    """2: classifier-free guidance runs a second branch; 1: guidance is an input of the model."""
    heavy: tuple[str, ...] = ()
    """Where in a block the linear layers are that read video tokens; of two kinds of blocks each has some. The second
    feed-forward layer comes before the first: see `semvid.runtime.layers.fp8_linears`."""
    joint: bool = False
    """Whether text tokens are in the attended sequence; dense calls are then ours too (see
    `semvid.runtime.attention.joint`)."""

    def guided(self, guidance: float) -> bool:
        """Returns whether a job of this guidance has two branches."""
        return self.branches == 2 and guidance > 1


# Keys and values of cross-attention are made of 512 rows of text.
_WAN_HEAVY = (
    *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "attn2.to_q",
    "attn2.to_out.0",
    "ffn.net.2",
    "ffn.net.0",
)
_HUNYUAN_HEAVY = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.2",
    "ff.net.0",
    "proj_mlp",
    "proj_out",
)
_WAN_PARTS = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")

WAN = Facts(
    name="wan2.1-t2v",
    title="Wan 2.1 text-to-video",
    pipeline="WanPipeline",
    transformer="WanTransformer3DModel",
    vae="AutoencoderKLWan",
    parts=_WAN_PARTS,
    heavy=_WAN_HEAVY,
)
WAN_IMAGE = Facts(
    name="wan2.1-i2v",
    title="Wan 2.1 image-to-video",
    pipeline="WanImageToVideoPipeline",
    transformer="WanTransformer3DModel",
    vae="AutoencoderKLWan",
    parts=(*_WAN_PARTS, "image_encoder", "image_processor"),
    heavy=_WAN_HEAVY,
    image="required",
)
WAN_PAIR = Facts(
    name="wan2.2-t2v",
    title="Wan 2.2 A14B text-to-video",
    pipeline="WanPipeline",
    transformer="WanTransformer3DModel",
    vae="AutoencoderKLWan",
    parts=(*_WAN_PARTS, "transformer_2"),
    heavy=_WAN_HEAVY,
    transformers=("transformer", "transformer_2"),
)
WAN_SMALL = Facts(
    name="wan2.2-ti2v",
    title="Wan 2.2 5B text- and image-to-video",
    pipeline="WanPipeline",
    transformer="WanTransformer3DModel",
    vae="AutoencoderKLWan",
    parts=_WAN_PARTS,
    heavy=_WAN_HEAVY,
    image="optional",
)
HUNYUAN = Facts(
    name="hunyuanvideo",
    title="HunyuanVideo text-to-video",
    pipeline="HunyuanVideoPipeline",
    transformer="HunyuanVideoTransformer3DModel",
    vae="AutoencoderKLHunyuanVideo",
    parts=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "transformer", "scheduler", "vae"),
    branches=1,
    heavy=_HUNYUAN_HEAVY,
    joint=True,
)

FAMILIES = (WAN, WAN_IMAGE, WAN_PAIR, WAN_SMALL, HUNYUAN)

_REFUSED = {
    "HunyuanVideo15Pipeline": "a HunyuanVideo-1.5 model",
    "HunyuanVideo15ImageToVideoPipeline": "a HunyuanVideo-1.5 model",
    "HunyuanVideoImageToVideoPipeline": "a HunyuanVideo image-to-video model",
}


def supported() -> str:
    """Returns the titles of all families with their pipelines, as errors list them."""
    return ", ".join(f"{facts.title} ({facts.pipeline})" for facts in FAMILIES)


def by_name(name: str) -> Facts:
    """Returns the family of a name of `FAMILIES`."""
    (found,) = (facts for facts in FAMILIES if facts.name == name)
    return found


def recognize(index: Mapping[str, Any]) -> Facts:
    """Returns the family of a checkpoint by its model_index.json, or of a pipeline by its configuration.

    Args:
        index: `_class_name`, `boundary_ratio`, `expand_timesteps`, and each component's [library, class].

    Raises:
        ValueError: none of `FAMILIES`; the message says what was found, for whoever names the place.
    """
    name = index.get("_class_name")
    pair = index.get("boundary_ratio") is not None or (index.get("transformer_2") or [None])[0] is not None
    small = bool(index.get("expand_timesteps"))
    if name == "WanPipeline" and not (pair and small):
        return WAN_PAIR if pair else WAN_SMALL if small else WAN
    if name == "WanImageToVideoPipeline" and not pair and not small:
        return WAN_IMAGE
    if name == "HunyuanVideoPipeline":
        return HUNYUAN
    if name == "WanImageToVideoPipeline":
        found = "a Wan 2.2 image-to-video model"
    else:
        found = _REFUSED.get(str(name), f"a {name}") if name else "of an unnamed family"
    raise ValueError(f"{found}; supported: {supported()}")
