"""Loading a checkpoint's pipeline onto its device, in its precision."""

from pathlib import Path
from typing import Any, Literal

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers.models.attention_dispatch import AttentionBackendName

from semvid.kernels import dispatch
from semvid.parallel.weights import share_weights
from semvid.runtime.config import ModelConfig
from semvid.runtime.device import resolve_device, resolve_dtype
from semvid.runtime.layers.fp8_linears import check_fp8, quantize_linears
from semvid.runtime.models.families.adapters import adapter
from semvid.runtime.models.families.family import Family
from semvid.runtime.models.folder import family_of

CUDNN = "_native_cudnn"
"""diffusers' name for PyTorch's cuDNN attention, the fastest dense one that it brings on a Hopper GPU."""


def transformers_of(pipeline: Any, family: Family) -> list[Any]:
    """Returns the transformers of a pipeline in the order of use."""
    return [getattr(pipeline, name) for name in family.facts.transformers]


def load_pipeline(
    folder: Path,
    model: ModelConfig,
    *,
    encoders: Literal["device", "host", "none"] = "device",
    share: bool = False,
) -> Any:
    """Returns a checkpoint's pipeline on its device, by diffusers' own loader; only local files are read.

    The VAE is kept in fp32, as Wan's authors run it. On a GPU dense attention is cuDNN's where that is the fastest.

    Args:
        folder: the checkpoint.
        model: device and precision.
        encoders: where what encodes prompts and images is put. "host": `semvid.runtime.jobs.denoise` brings it to the
            device for the one time that it is needed; "none": it is not loaded, as of several ranks the first alone
            encodes.
        share: whether the ranks of the default process group share the transformer's weights; every one must enter.

    Raises:
        ValueError: the device is not there or has no FP8 though it is asked for, or the checkpoint is of no supported
            family.
    """
    device = resolve_device(model.device)
    dtype = resolve_dtype(model.dtype, device)
    if model.linear == "fp8":
        check_fp8(device, dtype)
    dtypes = {"default": dtype, "vae": torch.float32}
    family = adapter(family_of(folder))
    left_out = {name: None for name in family.facts.parts if "encoder" in name} if encoders == "none" else {}
    pipeline = family.loader().from_pretrained(folder, dtype=dtypes, local_files_only=True, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    if share:
        for transformer in transformers_of(pipeline, family):
            share_weights(transformer.requires_grad_(False), family.blocks(transformer))
    if model.linear == "fp8":
        ops = dispatch.select("auto", device)
        for transformer in transformers_of(pipeline, family):
            for block in family.blocks(transformer):
                # One after the other, so that the device never holds them all as they were.
                quantize_linears([block.to(device)], family.facts.heavy, ops)
    if device.type != "cpu":
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and (encoders == "device" or "encoder" not in name):
                part.to(device)
        prefer_cudnn(pipeline, family)
    return pipeline


def prefer_cudnn(pipeline: Any, family: Family) -> None:
    """Has dense self-attention computed by cuDNN on GPUs where it is PyTorch's fastest: Hopper and newer."""
    for transformer in transformers_of(pipeline, family):
        half = transformer.dtype in (torch.bfloat16, torch.float16)
        if half and torch.cuda.get_device_capability(transformer.device) >= (9, 0):
            for attention in family.attentions(transformer):
                attention.processor._attention_backend = AttentionBackendName(CUDNN)


def quiet() -> None:
    """Turns off diffusers' and transformers' own bars and notices, for programs that report for themselves."""
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
