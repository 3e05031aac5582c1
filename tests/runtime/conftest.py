"""The stock call of a pipeline, which semvid's is compared with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from semvid.runtime.config import VideoConfig


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
