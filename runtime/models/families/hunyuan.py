"""HunyuanVideo text-to-video: text in the joint sequence, double and single blocks, guidance as an input.

diffusers has no context-parallel plan for it; the one here shares the video tokens and the text rows alike. What is
before the first block (the refiner of the text, the modulation) every rank computes for itself: it is small.
"""

from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor

from semvid.runtime.attention.joint import JointProcessor, PromptHook
from semvid.runtime.attention.processors import Processor
from semvid.runtime.attention.session import Session
from semvid.runtime.config import VideoConfig
from semvid.runtime.models.families import facts
from semvid.runtime.models.families.facts import Facts
from semvid.runtime.models.families.family import Inputs, check_length
from semvid.runtime.models.sharding import PromptInput

PROMPT_ROWS = 256

PLAN: Mapping[str, Any] = {
    "rope": {
        0: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True),
        1: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True),
    },
    "transformer_blocks.0": {
        "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
        "encoder_hidden_states": PromptInput(split_dim=1, expected_dims=3),
    },
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class Hunyuan:
    """One branch: the scale of guidance is told to the model, which has learned it."""

    facts: Facts = facts.HUNYUAN

    def loader(self) -> Any:
        """Returns the pipeline class that the checkpoint names."""
        return diffusers.HunyuanVideoPipeline

    def blocks(self, transformer: Any) -> list[Any]:
        """Returns the double blocks, then the single ones."""
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def attentions(self, transformer: Any) -> list[Any]:
        """Returns the joint attention of each."""
        return [block.attn for block in self.blocks(transformer)]

    def processor(self, stock: Processor, session: Session, layer: int) -> Processor:
        """Returns the processor of a block's joint attention."""
        return JointProcessor(stock, session, layer)

    def plan(self, transformer: Any) -> Mapping[str, Any] | None:
        """Returns the plan above."""
        return PLAN

    def hooks(self, session: Session) -> list[Any]:
        """Returns the one that finds the prompt's tokens."""
        return [PromptHook(session)]

    def prompts(self, pipeline: Any, video: VideoConfig, device: torch.device) -> list[Inputs]:
        """Returns the rows of Llama with their mask, CLIP's vector, and the scale of guidance.

        CLIP reads the first 77 tokens of a longer prompt, as the authors have it.

        Raises:
            ValueError: a prompt has more than 256 of Llama's tokens.
        """
        # Its import looks for packages that other families do without, and says so.
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as FRAME

        text, most = FRAME["template"].format(video.prompt), PROMPT_ROWS + FRAME["crop_start"]
        check_length("prompt in HunyuanVideo's template", text, pipeline.tokenizer, most)
        rows, pooled, mask = pipeline.encode_prompt(prompt=video.prompt, device=device, max_sequence_length=PROMPT_ROWS)
        dtype = pipeline.transformer.dtype
        return [
            {
                "encoder_hidden_states": rows.to(dtype),
                "encoder_attention_mask": mask.to(dtype),
                "pooled_projections": pooled.to(dtype),
                "guidance": torch.tensor([video.guidance], dtype=dtype, device=device) * 1000.0,
            }
        ]

    def drawn_prompt(self, config: Mapping[str, Any], like: Tensor) -> Inputs:
        """Returns random values; a quarter of the rows is a prompt, the rest padding."""

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=like.device, dtype=like.dtype)

        mask = torch.zeros(1, PROMPT_ROWS, device=like.device, dtype=like.dtype)
        mask[:, : PROMPT_ROWS // 4] = 1
        return {
            "encoder_hidden_states": drawn(1, PROMPT_ROWS, config["text_embed_dim"]),
            "encoder_attention_mask": mask,
            "pooled_projections": drawn(1, config["pooled_projection_dim"]),
            "guidance": torch.full((1,), 6000.0, device=like.device, dtype=like.dtype),
        }

    def schedule(self, pipeline: Any, steps: int, device: torch.device) -> None:
        """Sets timesteps from evenly spaced sigmas, which the scheduler then shifts."""
        pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1], device=device)

    def channels(self, pipeline: Any) -> int:
        """Returns the channels of the transformer's input."""
        return int(pipeline.transformer.config.in_channels)

    def condition(self, pipeline: Any, video: VideoConfig, latents: Tensor) -> Tensor | None:
        """Returns None: a text says it all."""
        return None

    def inputs(self, latents: Tensor, timestep: Tensor, condition: Tensor | None, dtype: torch.dtype) -> Inputs:
        """Returns the latents in `dtype` and one timestep for all of them."""
        return {"hidden_states": latents.to(dtype), "timestep": timestep.expand(latents.shape[0]).to(latents.dtype)}

    def result(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        """Returns the latents."""
        return latents

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        """Returns the latents over the VAE's one factor."""
        scaled: Tensor = latents.to(vae.dtype) / vae.config.scaling_factor
        return scaled
