"""What the loop and `sparsify` ask of a model family. One adapter each answers it; here is what they share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from semvid.runtime.attention.processors import Processor
from semvid.runtime.attention.session import Session
from semvid.runtime.config import VideoConfig
from semvid.runtime.models.families.facts import Facts

Inputs = dict[str, Any]
"""Keyword arguments of a transformer's forward pass."""


class Family(Protocol):
    """One model family: where its attention is, and what WanPipeline's loop does differently for it."""

    facts: Facts

    def loader(self) -> Any:
        """Returns the diffusers pipeline class that loads a checkpoint."""

    def blocks(self, transformer: Any) -> list[Any]:
        """Returns the blocks of a transformer, in the order of use."""

    def attentions(self, transformer: Any) -> list[Any]:
        """Returns the self-attention modules of a transformer, first layer first."""

    def processor(self, stock: Processor, session: Session, layer: int) -> Processor:
        """Returns semvid's attention for one of them."""

    def plan(self, transformer: Any) -> Mapping[str, Any] | None:
        """Returns how its sequence is shared: a context-parallel plan of diffusers' form, None if it can't be."""

    def hooks(self, session: Session) -> list[Any]:
        """Returns hooks on the transformer that this family needs beside those of all."""

    def prompts(self, pipeline: Any, video: VideoConfig, device: torch.device) -> list[Inputs]:
        """Returns what each branch is told, the conditional one first.

        Raises:
            ValueError: a prompt is longer than the model reads.
        """

    def drawn_prompt(self, config: Mapping[str, Any], like: Tensor) -> Inputs:
        """Returns random values in the place of one branch's `prompts`, for a transformer of random weights.

        Args:
            config: of the transformer.
            like: says device and dtype.
        """

    def schedule(self, pipeline: Any, steps: int, device: torch.device) -> None:
        """Sets the scheduler's timesteps."""

    def channels(self, pipeline: Any) -> int:
        """Returns the channels of the latents."""

    def condition(self, pipeline: Any, video: VideoConfig, latents: Tensor) -> Tensor | None:
        """Returns what of the image goes into each forward pass beside the latents, None without one."""

    def inputs(self, latents: Tensor, timestep: Tensor, condition: Tensor | None, dtype: torch.dtype) -> Inputs:
        """Returns the latents and the timestep as the transformer takes them."""

    def result(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        """Returns what is decoded, from the latents of the last step."""

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        """Returns latents as the VAE decodes them, in its dtype."""


def context_name(branch: str, number: int) -> str:
    """Returns the name under which a transformer keeps what a branch remembers: "cond", of the second "cond-2".

    Args:
        branch: "cond" or "uncond".
        number: of the transformer, from 0.
    """
    return branch if number == 0 else f"{branch}-{number + 1}"


def check_length(option: str, text: str, tokenize: Callable[[str], Any], most: int) -> None:
    """Raises ValueError if a text has more than `most` tokens, which diffusers would cut off without a word."""
    length = len(tokenize(text).input_ids)
    if length > most:
        raise ValueError(f"{option} has {length} tokens; accepted: {most} or fewer")


def stages(facts: Facts, pipeline: Any, video: VideoConfig, timesteps: Sequence[float]) -> list[int]:
    """Returns the number of the transformer that runs at each step, by the timestep's place at the boundary.

    Args:
        facts: of the family.
        pipeline: says the boundary, a share of the training timesteps, unless `video` does.
        video: what is to be seen.
        timesteps: of every step.
    """
    if len(facts.transformers) == 1:
        return [0] * len(timesteps)
    share = pipeline.config.boundary_ratio if video.boundary is None else video.boundary
    boundary = share * pipeline.scheduler.config.num_train_timesteps
    return [0 if timestep >= boundary else 1 for timestep in timesteps]
