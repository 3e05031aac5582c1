"""A model's weights shared by all ranks of a job, for models that a GPU can't hold: gathered block by block (FSDP2)."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from semvid.parallel.phases import enter


def share_weights(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Leaves each rank of the default process group with an equal part of each block's weights, on its own device.

    From then on every rank must run `model` alike, as often: before a block its weights are gathered, and after it they
    are let go. What is computed has the same bits. Weights may lie on the host before: they move block by block, so
    that no GPU ever holds them all. Those outside the blocks are few; after the first pass every rank has them whole.

    Args:
        model: a transformer whose weights are frozen.
        blocks: its blocks, in the order of use.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    enter()
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("weights",))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
