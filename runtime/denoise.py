"""From prompt to frames in three parts: encode, the denoising loop step by step, decode.

The loop is WanPipeline's own, written out, so that a step can be watched, stopped after and resumed at; it gives
the same latents bit for bit. After the start it draws no random number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from semvid.parallel import mesh
from semvid.parallel.collectives import all_gather
from semvid.parallel.ranks import Ranks
from semvid.runtime.config import VideoConfig
from semvid.runtime.metrics import Frames

PROMPT_ROWS = 512


@dataclass(slots=True)
class Denoising:
    """Everything the loop carries from step to step."""

    latents: Tensor
    """fp32 [1, channels, latent frames, latent height, latent width]."""
    timesteps: Tensor
    prompt: Tensor
    """[1, 512, text width], in the transformer's dtype."""
    negative_prompt: Tensor | None
    """None without classifier-free guidance."""
    guidance: float
    ranks: Ranks = field(default_factory=Ranks)
    """Says which branch this rank runs; all of them unless the mesh parts them."""
    step: int = 0
    """Steps done."""

    @property
    def branches(self) -> list[str]:
        """The names of the branches that this rank runs."""
        names = ["cond"] if self.negative_prompt is None else ["cond", "uncond"]
        return [names[self.ranks.place.cfg]] if self.ranks.mesh.cfg > 1 else names


@torch.no_grad()
def start(pipeline: Any, video: VideoConfig, ranks: Ranks | None = None) -> Denoising:
    """Returns the state before the first step: prompts encoded, timesteps set, noise drawn.

    The noise comes from a CPU generator: the same on every device and rank.

    Args:
        pipeline: a WanPipeline.
        video: what is to be seen.
        ranks: this process among those of the job; alone if absent.

    Raises:
        ValueError: a prompt is longer than the model reads (diffusers would cut it off), or the mesh parts two
            branches where there is one.
    """
    ranks = ranks or Ranks()
    mesh.check(ranks.mesh, ranks.mesh.world_size, guided=video.guidance > 1)
    device = pipeline._execution_device
    for name, text in (("prompt", video.prompt), ("negative_prompt", video.negative_prompt)):
        length = len(pipeline.tokenizer(text).input_ids)
        if length > PROMPT_ROWS:
            raise ValueError(f"{name} has {length} tokens; accepted: {PROMPT_ROWS} or fewer")
    prompt, negative = pipeline.encode_prompt(
        prompt=video.prompt,
        negative_prompt=video.negative_prompt,
        do_classifier_free_guidance=video.guidance > 1,
        max_sequence_length=PROMPT_ROWS,
        device=device,
    )
    dtype = pipeline.transformer.dtype
    pipeline.scheduler.set_timesteps(video.steps, device=device)
    # Without it the scheduler looks its first step up by comparing timesteps on the host.
    pipeline.scheduler.set_begin_index(0)
    shape = (
        1,
        pipeline.transformer.config.in_channels,
        (video.frames - 1) // pipeline.vae_scale_factor_temporal + 1,
        video.height // pipeline.vae_scale_factor_spatial,
        video.width // pipeline.vae_scale_factor_spatial,
    )
    noise = randn_tensor(shape, generator=torch.Generator().manual_seed(video.seed), device=device, dtype=torch.float32)
    return Denoising(
        noise,
        pipeline.scheduler.timesteps,
        prompt.to(dtype),
        None if negative is None else negative.to(dtype),
        video.guidance,
        ranks,
    )


def steps(pipeline: Any, state: Denoising) -> Iterator[int]:
    """Runs one denoising step per item and yields its index, .. steps - 1; `state.latents` is the step's result.

    The first is `state.step`. Every rank of the job must run every step. The result has the same bits on all of them.
    """
    for step, timestep in enumerate(state.timesteps):
        if step < state.step:
            continue
        with torch.no_grad():
            state.latents = _step(pipeline, state, step, timestep)
        state.step = step + 1
        yield step


def finish(pipeline: Any) -> None:
    """Ends the job on the pipeline's side, as WanPipeline does: the hooks forget their state."""
    pipeline.maybe_free_model_hooks()


@torch.no_grad()
def decode(pipeline: Any, latents: Tensor) -> Frames:
    """Returns the video of `latents`, uint8 [F, height, width, 3], rounded to the nearest level."""
    vae = pipeline.vae
    per_channel = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=latents.device, dtype=vae.dtype).view(per_channel)
    std = torch.tensor(vae.config.latents_std, device=latents.device, dtype=vae.dtype).view(per_channel)
    pixels = vae.decode(latents.to(vae.dtype) * std + mean, return_dict=False)[0]
    video = pipeline.video_processor.postprocess_video(pixels, output_type="pt")[0]
    frames: Frames = np.ascontiguousarray(video.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    return frames


def _step(pipeline: Any, state: Denoising, step: int, timestep: Tensor) -> Tensor:
    """Returns the latents after one step: a forward pass a branch, guidance, the scheduler."""
    context = {
        "step_index": step,
        "sigma": float(pipeline.scheduler.sigmas[step]),
        "num_inference_steps": len(state.timesteps),
    }
    noise, *others = _predict(pipeline.transformer, state, timestep, context)
    if others:
        (unguided,) = others
        noise = unguided + state.guidance * (noise - unguided)
    latents: Tensor = pipeline.scheduler.step(noise, timestep, state.latents, return_dict=False)[0]
    return latents


def _predict(model: Any, state: Denoising, timestep: Tensor, context: dict[str, Any]) -> Sequence[Tensor]:
    """Returns the prediction of the conditional branch, then that of the unconditional one if there is guidance."""
    prompts = {"cond": state.prompt, "uncond": state.negative_prompt}
    mine = [_forward(model, state, prompts[branch], timestep, branch, context) for branch in state.branches]
    # Every rank of the job enters, each with its branch; one that does not keeps the others waiting.
    return all_gather(mine[0].contiguous(), state.ranks.cfg).unbind() if state.ranks.mesh.cfg > 1 else mine


def _forward(
    model: Any, state: Denoising, prompt: Tensor | None, timestep: Tensor, branch: str, context: dict[str, Any]
) -> Tensor:
    with model.cache_context(branch, **context):
        noise: Tensor = model(
            hidden_states=state.latents.to(model.dtype),
            timestep=timestep.expand(state.latents.shape[0]),
            encoder_hidden_states=prompt,
            return_dict=False,
        )[0]
    return noise
