"""A tiny checkpoint of every model family, from its published configuration, shrunk; saved as diffusers saves it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tokenizers
import torch
import transformers

from semvid.runtime import published
from semvid.runtime.config import DEMO_MODEL, Config, VideoConfig, resolve
from semvid.runtime.published import Published

# 45 or 75 tokens: neither two nor three ranks share them alike.
SIZES: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {"height": 80, "width": 80, "frames": 9, "guidance": 3.0},
    "wan2.1-i2v-14b": {"height": 80, "width": 80, "frames": 9, "guidance": 3.0},
    "wan2.2-t2v-a14b": {"height": 80, "width": 80, "frames": 9, "guidance": 4.0, "guidance_2": 2.0},
    "wan2.2-ti2v-5b": {"height": 96, "width": 160, "frames": 9, "guidance": 3.0},
    "hunyuanvideo": {"height": 80, "width": 80, "frames": 9, "guidance": 6.0},
}
SETTINGS = {"query_clusters": 6, "key_clusters": 9, "first_iterations": 5, "dense_steps": 0.25}


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 80 × 80 pixels."""
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "gradient.png"
    Image.linear_gradient("L").resize((80, 80)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the tiny checkpoint of a published model, once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            model = published.read(name)
            (_hunyuan if name == "hunyuanvideo" else _wan)(model).save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture
def family_config(family_model: Callable[[str], Path], image: Path) -> Callable[..., Config]:
    """Makes configurations of a short job with a tiny model, from its name, [attention] and [video]."""

    def make(name: str, attention: dict[str, Any] | None = None, **video: Any) -> Config:
        told = {"prompt": "a red ball", "steps": 4, **SIZES[name]}
        if name == "wan2.1-i2v-14b":
            told["image"] = str(image)
        model = {"path": str(family_model(name)), "dtype": "fp32", "device": "cpu"}
        options = {"model": model, "video": told | video, "attention": SETTINGS | (attention or {})}
        return resolve(None, options, preset="svg2")

    return make


def _wan(model: Published) -> Any:
    """The demo model's text encoder and, where it fits, its VAE; a transformer with three layers."""
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "text_dim": 128}
    if model.family.image == "required":
        sizes |= {"image_dim": 16, "added_kv_proj_dim": 32}
    parts = {
        "tokenizer": transformers.AutoTokenizer.from_pretrained(DEMO_MODEL / "tokenizer"),
        "text_encoder": transformers.UMT5EncoderModel.from_pretrained(DEMO_MODEL / "text_encoder"),
        "scheduler": diffusers.UniPCMultistepScheduler.from_pretrained(DEMO_MODEL / "scheduler"),
        "vae": diffusers.AutoencoderKLWan.from_pretrained(DEMO_MODEL / "vae"),
    }
    if model.family.name == "wan2.2-ti2v":
        tiny = {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1}
        means = {"latents_mean": [0.1] * 48, "latents_std": [1.5] * 48}
        parts["vae"] = diffusers.AutoencoderKLWan(**{**model.vae, **tiny, **means})
        parts["expand_timesteps"] = True
    for name in model.family.transformers:
        parts[name] = diffusers.WanTransformer3DModel(**{**model.transformer, **sizes})
    if model.boundary_ratio is not None:
        parts["boundary_ratio"] = model.boundary_ratio
    if model.family.image == "required":
        config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision = transformers.CLIPVisionConfig(**config, image_size=28, patch_size=14)
        parts["image_encoder"] = transformers.CLIPVisionModel(vision)
        square = {"height": 28, "width": 28}
        parts["image_processor"] = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square)
    return getattr(diffusers, model.family.pipeline)(**parts)


def _hunyuan(model: Published) -> Any:
    """A tokenizer of words, random encoders, two double and two single blocks."""
    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "ball", "blue", "sky"])}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **special)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(**size, num_key_value_heads=1, vocab_size=1024, max_position_embeddings=512)
    clip = transformers.CLIPTextConfig(**size, vocab_size=1024, projection_dim=32, eos_token_id=1, bos_token_id=0)
    sizes = {
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "rope_axes_dim": [4, 6, 6],
        "text_embed_dim": 32,
        "pooled_projection_dim": 32,
    }
    tiny = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    return diffusers.HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.LlamaModel(llama),
        tokenizer_2=tokenizer,
        text_encoder_2=transformers.CLIPTextModel(clip),
        transformer=diffusers.HunyuanVideoTransformer3DModel(**{**model.transformer, **sizes}),
        vae=diffusers.AutoencoderKLHunyuanVideo(**{**model.vae, **tiny}),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def stock_latents(pipeline: Any, video: VideoConfig) -> torch.Tensor:
    """The stock call of a pipeline of any family."""
    from PIL import Image

    told: dict[str, Any] = {"num_inference_steps": video.steps, "guidance_scale": video.guidance}
    if video.guidance_2 is not None:
        told["guidance_scale_2"] = video.guidance_2
    if video.image is not None:
        told["image"] = Image.open(video.image).convert("RGB").resize((video.width, video.height))
    found: torch.Tensor = pipeline(
        prompt=video.prompt,
        height=video.height,
        width=video.width,
        num_frames=video.frames,
        generator=torch.Generator().manual_seed(video.seed),
        output_type="latent",
        **told,
    ).frames
    return found


@pytest.fixture
def stock() -> Callable[[Any, VideoConfig], torch.Tensor]:
    """The stock call of a pipeline of any family."""
    return stock_latents
