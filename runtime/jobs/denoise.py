"""From prompt to frames in three parts: encode, the denoising loop step by step, decode.

The loop is that of diffusers' pipelines, written out, so that a step can be watched, stopped after and resumed at; it
gives the same latents bit for bit. After the start it draws no random number. What a family does differently its
adapter says.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from semvid.parallel import mesh
from semvid.parallel.collectives import all_gather, from_first
from semvid.parallel.ranks import Ranks
from semvid.runtime.config import VideoConfig
from semvid.runtime.jobs.likeness import Frames
from semvid.runtime.models import vae_tiles
from semvid.runtime.models.families.adapters import adapter_of
from semvid.runtime.models.families.family import Family, Inputs, context_name, stages
from semvid.runtime.models.predicted_memory import is_tiled

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
    told, condition = _told(pipeline, family, video, noise, ranks)
    scales = (video.guidance, video.guidance if video.guidance_2 is None else video.guidance_2)
    return Denoising(
        noise,
        timesteps,
        family,
        told,
        scales[: len(family.facts.transformers)],
        stages(family.facts, pipeline, video, timesteps.tolist()),
        condition,
        ranks,
    )


def _told(
    pipeline: Any, family: Family, video: VideoConfig, noise: Tensor, ranks: Ranks
) -> tuple[dict[str, Inputs], Tensor | None]:
    """Returns what each branch is told and what of the image goes beside the latents, the same on every rank.

    The first rank alone encodes; the others need no encoders. Every rank must enter.
    """
    found: dict[str, Tensor] | None = None
    if ranks.rank == 0:
        with _encoders_on(pipeline, noise.device):
            prompts = family.prompts(pipeline, video, noise.device)
        found = {f"{branch}/{name}": x for branch, of in zip(BRANCHES, prompts, strict=False) for name, x in of.items()}
        condition = family.condition(pipeline, video, noise)
        found |= {} if condition is None else {"condition": condition}
    # Along the sequence first: then the first of every pair of branches has them, whichever shard it holds.
    found = from_first(found, (ranks.sequence, ranks.cfg), noise.device)
    condition = found.pop("condition", None)
    told: dict[str, Inputs] = {}
    for place, x in found.items():
        branch, name = place.split("/")
        told.setdefault(branch, {})[name] = x
    return told, condition


@contextlib.contextmanager
def _encoders_on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Brings what encodes prompts and images to `device`, and back to where it was: it is needed this once."""
    parts = [part for name, part in pipeline.components.items() if "encoder" in name and isinstance(part, nn.Module)]
    before = [next(part.parameters()).device for part in parts]
    try:
        for part in parts:
            part.to(device)
        yield
    finally:
        for part, place in zip(parts, before, strict=True):
            part.to(place)
        if device.type == "cuda":
            # What is free here is the denoising loop's, whose tensors have other sizes.
            torch.cuda.empty_cache()


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
    vae, latents = pipeline.vae, _ready(pipeline, state)
    return _frames(pipeline, vae.decode(latents, return_dict=False)[0])


@torch.no_grad()
def decode_shared(pipeline: Any, state: Denoising, beat: Callable[[], None] = lambda: None) -> Frames | None:
    """Returns the same frames on the first rank, None on the others. Every rank of the job must enter.

    Args:
        pipeline: with its VAE.
        state: finished, of a video that `decodes_in_tiles`.
        beat: called once a round of tiles.
    """
    pixels = vae_tiles.decode_shared(pipeline.vae, _ready(pipeline, state), state.ranks, beat)
    return None if pixels is None else _frames(pipeline, pixels)


def _ready(pipeline: Any, state: Denoising) -> Tensor:
    """Returns the latents as the VAE takes them, and has it decode in tiles where it must."""
    if decodes_in_tiles(pipeline, state):
        pipeline.vae.enable_tiling()
    else:
        # Of an earlier job on the same pipeline.
        pipeline.vae.disable_tiling()
    return state.family.unscaled(pipeline.vae, state.family.result(state.latents, state.condition))


def _frames(pipeline: Any, pixels: Tensor) -> Frames:
    video = pipeline.video_processor.postprocess_video(pixels, output_type="pt")[0]
    frames: Frames = np.ascontiguousarray(video.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    return frames


def decodes_in_tiles(pipeline: Any, state: Denoising) -> bool:
    """Returns whether the video is too large to be decoded whole; a rule of its size alone."""
    frames, height, width = state.latents.shape[2:]
    pixels = pipeline.vae_scale_factor_spatial
    video = ((frames - 1) * pipeline.vae_scale_factor_temporal + 1, height * pixels, width * pixels)
    return is_tiled(pipeline.vae.config, *video)


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
