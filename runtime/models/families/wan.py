"""Wan 2.1 text-to-video, and what every Wan model has in common with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image, ImageOps
from torch import Tensor

from semvid.runtime.attention.processors import Processor, WanProcessor
from semvid.runtime.attention.session import Session
from semvid.runtime.config import VideoConfig
from semvid.runtime.models.families import facts
from semvid.runtime.models.families.facts import Facts
from semvid.runtime.models.families.family import Inputs, check_length

PROMPT_ROWS = 512


class Wan:
    """One transformer, two branches, text in cross-attention alone."""

    facts: Facts = facts.WAN

    def loader(self) -> Any:
        """Returns the pipeline class that the checkpoint names."""
        return getattr(diffusers, self.facts.pipeline)

    def blocks(self, transformer: Any) -> list[Any]:
        """Returns the blocks."""
        return list(transformer.blocks)

    def attentions(self, transformer: Any) -> list[Any]:
        """Returns the self-attention of every block; cross-attention stays as it is, text and image tokens alike."""
        return [block.attn1 for block in self.blocks(transformer)]

    def processor(self, stock: Processor, session: Session, layer: int) -> Processor:
        """Returns the processor of a block's self-attention."""
        return WanProcessor(stock, session, layer)

    def plan(self, transformer: Any) -> Mapping[str, Any] | None:
        """Returns diffusers' own plan."""
        plan: Mapping[str, Any] | None = getattr(transformer, "_cp_plan", None)
        return plan

    def hooks(self, session: Session) -> list[Any]:
        """Returns none: the sequence holds video tokens alone."""
        return []

    def prompts(self, pipeline: Any, video: VideoConfig, device: torch.device) -> list[Inputs]:
        """Returns the rows of the prompt, and without guidance nothing else, [1, 512, text width] each.

        Raises:
            ValueError: a prompt has more than 512 tokens.
        """
        for name in ("prompt", "negative_prompt"):
            check_length(name, getattr(video, name), pipeline.tokenizer, PROMPT_ROWS)
        found = pipeline.encode_prompt(
            prompt=video.prompt,
            negative_prompt=video.negative_prompt,
            do_classifier_free_guidance=video.guidance > 1,
            max_sequence_length=PROMPT_ROWS,
            device=device,
        )
        dtype = pipeline.transformer.dtype
        return [{"encoder_hidden_states": rows.to(dtype)} for rows in found if rows is not None]

    def drawn_prompt(self, config: Mapping[str, Any], like: Tensor) -> Inputs:
        """Returns random rows; half of them zeros, as the padding of a prompt is."""
        rows = torch.randn(1, PROMPT_ROWS, config["text_dim"], device=like.device, dtype=like.dtype)
        rows[:, PROMPT_ROWS // 2 :] = 0
        return {"encoder_hidden_states": rows}

    def schedule(self, pipeline: Any, steps: int, device: torch.device) -> None:
        """Sets the timesteps that the scheduler's own configuration gives."""
        pipeline.scheduler.set_timesteps(steps, device=device)

    def channels(self, pipeline: Any) -> int:
        """Returns the channels of the VAE."""
        return int(pipeline.vae.config.z_dim)

    def condition(self, pipeline: Any, video: VideoConfig, latents: Tensor) -> Tensor | None:
        """Returns None: a text says it all."""
        return None

    def inputs(self, latents: Tensor, timestep: Tensor, condition: Tensor | None, dtype: torch.dtype) -> Inputs:
        """Returns the latents in `dtype` and one timestep for all of them."""
        return {"hidden_states": latents.to(dtype), "timestep": timestep.expand(latents.shape[0])}

    def result(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        """Returns the latents."""
        return latents

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        """Returns latents · deviation + mean, channel by channel."""
        per_channel = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean, device=latents.device, dtype=vae.dtype).view(per_channel)
        std = torch.tensor(vae.config.latents_std, device=latents.device, dtype=vae.dtype).view(per_channel)
        return latents.to(vae.dtype) * std + mean


def read_image(video: VideoConfig) -> Image.Image:
    """Returns the picture that `video` begins with, in its size: scaled to cover it, what sticks out cut off evenly."""
    assert video.image is not None, "the options are checked"
    with Image.open(Path(video.image)) as image:
        return ImageOps.fit(image.convert("RGB"), (video.width, video.height), Image.Resampling.LANCZOS)
