"""From prompt to frames in three parts: encode, the denoising loop step by step, decode.

The loop is that of diffusers' pipelines, written out, so that a step can be watched, stopped after and resumed at; it
gives the same latents bit for bit. After the start it draws no random number. What a family does differently its
adapter says.
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
from semvid.runtime.families.adapters import adapter_of
from semvid.runtime.families.family import Family, Inputs, context_name, stages
from semvid.runtime.metrics import Frames

BRANCHES = ("cond", "uncond")


@dataclass(slots=True)
class Denoising:
    """Everything the loop carries from step to step."""

    latents: Tensor
    """fp32 [1, channels, latent frames, latent height, latent width]."""
    timesteps: Tensor
    family: Family
    prompts: dict[str, Inputs]
    """What each branch is told in every forward pass; "cond" alone without classifier-free guidance."""
    guidance: tuple[float, ...]
    """Of each transformer."""
    stages: list[int]
    """The number of the transformer that runs at each step."""
    condition: Tensor | None = None
    """What of the image goes into every forward pass; see the family."""
    ranks: Ranks = field(default_factory=Ranks)
    """Says which branch this rank runs; all of them unless the mesh parts them."""
    step: int = 0
    """Steps done."""

    @property
    def branches(self) -> list[str]:
        """The names of the branches that this rank runs."""
        names = list(self.prompts)
        return [names[self.ranks.place.cfg]] if self.ranks.mesh.cfg > 1 else names

    @property
    def contexts(self) -> list[str]:
        """The names under which its transformers keep what these branches remember."""
        return [context_name(branch, number) for number in range(len(self.guidance)) for branch in self.branches]


@torch.no_grad()
def start(pipeline: Any, video: VideoConfig, ranks: Ranks | None = None) -> Denoising:
    """Returns the state before the first step: prompts and image encoded, timesteps set, noise drawn.

    The noise comes from a CPU generator: the same on every device and rank.

    Args:
        pipeline: of a supported family.
        video: what is to be seen.
        ranks: this process among those of the job; alone if absent.

    Raises:
        ValueError: a prompt is longer than the model reads (diffusers would cut it off), or the mesh parts two
            branches where there is one.
    """
    ranks, family = ranks or Ranks(), adapter_of(pipeline)
    mesh.check(ranks.mesh, ranks.mesh.world_size, guided=family.facts.guided(video.guidance))
    device = pipeline._execution_device
    told = family.prompts(pipeline, video, device)
    family.schedule(pipeline, video.steps, device)
    # Without it the scheduler looks its first step up by comparing timesteps on the host.
    pipeline.scheduler.set_begin_index(0)
    shape = (
        1,
        family.channels(pipeline),
        (video.frames - 1) // pipeline.vae_scale_factor_temporal + 1,
        video.height // pipeline.vae_scale_factor_spatial,
        video.width // pipeline.vae_scale_factor_spatial,
    )
    noise = randn_tensor(shape, generator=torch.Generator().manual_seed(video.seed), device=device, dtype=torch.float32)
    timesteps = pipeline.scheduler.timesteps
    scales = (video.guidance, video.guidance if video.guidance_2 is None else video.guidance_2)
    return Denoising(
        noise,
        timesteps,
        family,
        dict(zip(BRANCHES, told, strict=False)),
        scales[: len(family.facts.transformers)],
        stages(family.facts, pipeline, video, timesteps.tolist()),
        family.condition(pipeline, video, noise),
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
def decode(pipeline: Any, state: Denoising) -> Frames:
    """Returns the video of a finished state, uint8 [F, height, width, 3], rounded to the nearest level."""
    vae, latents = pipeline.vae, state.family.result(state.latents, state.condition)
    pixels = vae.decode(state.family.unscaled(vae, latents), return_dict=False)[0]
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
    number = state.stages[step]
    model = getattr(pipeline, state.family.facts.transformers[number])
    noise, *others = _predict(model, state, timestep, context)
    if others:
        (unguided,) = others
        noise = unguided + state.guidance[number] * (noise - unguided)
    latents: Tensor = pipeline.scheduler.step(noise, timestep, state.latents, return_dict=False)[0]
    return latents


def _predict(model: Any, state: Denoising, timestep: Tensor, context: dict[str, Any]) -> Sequence[Tensor]:
    """Returns the prediction of the conditional branch, then that of the unconditional one if there is guidance."""
    inputs = state.family.inputs(state.latents, timestep, state.condition, model.dtype)
    mine = []
    for branch in state.branches:
        with model.cache_context(branch, **context):
            mine.append(model(**inputs, **state.prompts[branch], return_dict=False)[0])
    # Every rank of the job enters, each with its branch; one that does not keeps the others waiting.
    return all_gather(mine[0].contiguous(), state.ranks.cfg).unbind() if state.ranks.mesh.cfg > 1 else mine
