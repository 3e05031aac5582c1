"""Where a job computes and in what precision."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """Returns the device of "auto", "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without one.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda', but there is no usable NVIDIA GPU; accepted here: cpu, auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of "bf16", "fp16", "fp32", or of "auto": bf16 where the device computes in it, else fp32."""
    if name != "auto":
        return DTYPES[name]
    native = (
        torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.bfloat16 if native else torch.float32
