"""Collectives of the ranks that share one sequence. A group of None is one rank: they return early."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def all_reduce_sum(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Returns each tensor summed over the ranks of `group`, by one all-reduce of one fp32 buffer.

    Every rank of the group must enter with the same shapes; if one does not, the others wait until the group's
    time-out. int32 tensors are summed exactly while sums stay below 2^24.

    Args:
        tensors: fp32 or int32, any shapes.
        group: the ranks, or None for this one alone.
    """
    if group is None:
        return list(tensors)
    buffer = torch.cat([x.flatten().float() for x in tensors])
    dist.all_reduce(buffer, group=group)
    parts = buffer.split([x.numel() for x in tensors])
    return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, tensors, strict=True)]
