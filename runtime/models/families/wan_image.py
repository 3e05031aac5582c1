"""Wan 2.1 image-to-video: the image's latents beside the noise, and its tokens in cross-attention.

Both stay as the model has them: the latents are further channels of the same video tokens, and the image tokens in
cross-attention are few and attended densely.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from semvid.runtime.config import VideoConfig
from semvid.runtime.models.families import facts
from semvid.runtime.models.families.family import Inputs
from semvid.runtime.models.families.wan import Wan, read_image

# Of CLIP ViT-H: 16 × 16 patches and one more.
IMAGE_ROWS = 257


class WanImage(Wan):
    """A video that begins with an image."""

    facts = facts.WAN_IMAGE

    def prompts(self, pipeline: Any, video: VideoConfig, device: torch.device) -> list[Inputs]:
        """Returns what Wan's text-to-video does, and the image's 257 rows from CLIP in each branch.

        Raises:
            ValueError: as there.
        """
        image = pipeline.encode_image(read_image(video), device).to(pipeline.transformer.dtype)
        return [told | {"encoder_hidden_states_image": image} for told in super().prompts(pipeline, video, device)]

    def drawn_prompt(self, config: Mapping[str, Any], like: Tensor) -> Inputs:
        """Returns random rows of text and of the image."""
        image = torch.randn(1, IMAGE_ROWS, config["image_dim"], device=like.device, dtype=like.dtype)
        return super().drawn_prompt(config, like) | {"encoder_hidden_states_image": image}

    def condition(self, pipeline: Any, video: VideoConfig, latents: Tensor) -> Tensor:
        """Returns the mask of given frames and the latents of image, then grey, [1, 4 + 16, F, height, width]."""
        image = pipeline.video_processor.preprocess(read_image(video), height=video.height, width=video.width)
        _, condition = pipeline.prepare_latents(
            image.to(latents.device, torch.float32),
            1,
            latents.shape[1],
            video.height,
            video.width,
            video.frames,
            torch.float32,
            latents.device,
            latents=latents,
        )
        found: Tensor = condition
        return found

    def inputs(self, latents: Tensor, timestep: Tensor, condition: Tensor | None, dtype: torch.dtype) -> Inputs:
        """Returns the noise and the condition as one tensor."""
        assert condition is not None, "the video begins with an image"
        told = super().inputs(latents, timestep, None, dtype)
        return told | {"hidden_states": torch.cat([latents, condition], dim=1).to(dtype)}
