"""What the Hopper kernels share: which tensors TMA takes and how, and the rings of tiles in shared memory."""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
HEAD_DIMS = (64, 128)
# By bulk copies, and by lanes. Renamed between Triton 3.6 and 3.9.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
load_lanes = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@builtin
def view(memory, dtype, shape, layout, _semantic=None) -> gl.shared_memory_descriptor:
    """Returns the same shared memory, from its first byte on, as another type, shape or layout. Of a kernel."""
    # Renamed between Triton 3.6 and 3.9.
    method = memory._reinterpret if hasattr(memory, "_reinterpret") else memory.reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


def takes(x: Tensor) -> bool:
    """Returns whether the Hopper kernels take x [H, N, D].

    They take bf16 and fp16 with D 64 or 128 and at least one token, if rows are packed and what TMA asks for holds:
    an address and strides that are multiples of 16 bytes, the strides more than 0 and less than 2^40 bytes.
    """
    if x.dtype not in TYPES or x.shape[2] not in HEAD_DIMS or x.numel() == 0 or x.stride(2) != 1:
        return False
    strides = [stride * x.element_size() for stride in x.stride()[:2]]
    return x.data_ptr() % 16 == 0 and all(stride % 16 == 0 and 0 < stride < 2**40 for stride in strides)


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Returns how TMA loads blocks of x, swizzled by 128 bytes: what lies beyond its shape is zeros."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor.from_tensor(x, block, layout)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Returns how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr) -> tuple[gl.tensor, gl.tensor]:
    """Returns the stage of a ring after `stage`, and the phase of its barriers, which flips with every round."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase
