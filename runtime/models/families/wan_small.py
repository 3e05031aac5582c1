"""Wan 2.2 5B: a VAE of 16 × 16 pixels and 48 channels, and a timestep for every token; from text, or from an image.

With an image the first latent frame is the image's own, at timestep 0, in every forward pass and at the end.
"""

from typing import Any

import torch
from torch import Tensor

from semvid.runtime.config import VideoConfig
from semvid.runtime.models.families import facts
from semvid.runtime.models.families.family import Inputs
from semvid.runtime.models.families.wan import Wan, read_image


class WanSmall(Wan):
    """One model for both."""

    facts = facts.WAN_SMALL

    def condition(self, pipeline: Any, video: VideoConfig, latents: Tensor) -> Tensor | None:
        """Returns the latents of the image, [1, 48, 1, height, width]; None without one."""
        if video.image is None:
            return None
        from diffusers import WanImageToVideoPipeline

        # The same parts; only that pipeline's class has the method.
        parts = {name: part for name, part in pipeline.components.items() if name not in ("transformer_2",)}
        other = WanImageToVideoPipeline(**parts, expand_timesteps=True)
        image = other.video_processor.preprocess(read_image(video), height=video.height, width=video.width)
        size = (video.height, video.width, video.frames)
        _, condition, _ = other.prepare_latents(
            image.to(latents.device, torch.float32),
            1,
            latents.shape[1],
            *size,
            torch.float32,
            latents.device,
            latents=latents,
        )
        found: Tensor = condition
        return found

    def inputs(self, latents: Tensor, timestep: Tensor, condition: Tensor | None, dtype: torch.dtype) -> Inputs:
        """Returns the latents, of the image where they are given, and each token's timestep [1, N]: there 0."""
        kept = _kept(latents, condition)
        # A token is 2 × 2 latents of one frame.
        each = (kept[0, 0, :, ::2, ::2] * timestep).flatten()[None].expand(latents.shape[0], -1)
        return {"hidden_states": self.result(latents, condition).to(dtype), "timestep": each}

    def result(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        """Returns the latents, of the image where they are given."""
        if condition is None:
            return latents
        kept = _kept(latents, condition)
        return (1 - kept) * condition + kept * latents


def _kept(latents: Tensor, condition: Tensor | None) -> Tensor:
    """Returns 1 where latents are the model's, 0 where the image gives them, fp32 [1, 1, F, height, width]."""
    kept = torch.ones(1, 1, *latents.shape[2:], dtype=torch.float32, device=latents.device)
    if condition is not None:
        kept[:, :, 0] = 0
    return kept
