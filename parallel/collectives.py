"""Collectives of the ranks that share one sequence, or one step. A group of None is one rank: they return early.

Every rank of a group must enter each of them, in the same order; one that does not keeps the others waiting until the
group's time-out.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from semvid.parallel.phases import enter

Group = dist.ProcessGroup | None
# The newer name, where PyTorch has it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# gloo would take them, so that only GPUs would show it.
UNKNOWN_TO_NCCL = (torch.int16, torch.uint16)

Arrival = Callable[[], Tensor]
"""Waits (on a GPU: lets the current stream wait) until a tensor under way has arrived, and returns it."""


def all_reduce_sum(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Returns each tensor summed over the ranks of `group`, by one all-reduce of one fp32 buffer.

    int32 tensors are summed exactly while sums stay below 2^24.

    Args:
        tensors: fp32 or int32, any shapes, the same on every rank.
        group: the ranks, or None for this one alone.
    """
    if group is None:
        return list(tensors)
    buffer = joined(tensors)
    all_reduce_in_place(buffer, group)
    return [part.to(x.dtype) for part, x in zip(split(buffer, tensors), tensors, strict=True)]


def all_reduce_in_place(buffer: Tensor, group: Group) -> None:
    """Sums a contiguous buffer over the ranks of `group`, None for this one alone."""
    if group is not None:
        enter()
        dist.all_reduce(buffer, group=group)


def joined(tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Returns fp32 and int32 tensors one after the other, fp32 [elements], in `out` if it is given."""
    return torch.cat([x.flatten().float() for x in tensors], out=out)


def split(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Returns the parts of what `joined` made, fp32 views in the shapes of `like`."""
    parts = buffer.split([x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def broadcast_all(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Returns the first rank's tensors, by one broadcast of one buffer.

    Args:
        tensors: of the same shapes and dtypes on every rank; their content matters on the first alone.
        group: the ranks, or None for this one alone.
    """
    if group is None:
        return list(tensors)
    buffer = torch.cat([x.contiguous().flatten().view(torch.uint8) for x in tensors])
    enter()
    dist.broadcast(buffer, group=group, src=dist.get_global_rank(group, 0))
    parts = buffer.split([x.numel() * x.element_size() for x in tensors])
    # A part may begin at any byte, a tensor of its dtype may not.
    return [part.clone().view(x.dtype).view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Returns every rank's x in the order of ranks, [ranks, *x.shape].

    Args:
        x: contiguous, the same shape and dtype on every rank.
        group: the ranks, or None for this one alone.

    Raises:
        TypeError: NCCL has no such dtype.
    """
    if x.dtype in UNKNOWN_TO_NCCL:
        raise TypeError(f"x is {x.dtype}, which NCCL can't gather; accepted: any dtype but those of 16 bit integers")
    if group is None:
        return x[None]
    ranks = dist.get_world_size(group)
    # Flat: gloo wants the ranks along the first dimension, which x may lack.
    whole = torch.empty(ranks * x.numel(), dtype=x.dtype, device=x.device)
    enter()
    _all_gather(whole, x.flatten(), group=group)
    return whole.view(ranks, *x.shape)


def from_first(
    tensors: Mapping[str, Tensor] | None, groups: Sequence[Group], device: torch.device
) -> dict[str, Tensor]:
    """Returns the named tensors of the first rank on every rank. Every rank of each group must enter.

    Args:
        tensors: on the first rank; not read on the others.
        groups: one after the other, so that the first of each has them when it is its turn.
        device: where they arrive.
    """
    found = dict(tensors or {})
    for group in groups:
        if group is None:
            continue
        first = dist.get_global_rank(group, 0)
        here = dist.get_rank() == first
        said = [[(name, tuple(x.shape), x.dtype) for name, x in found.items()] if here else None]
        enter()
        dist.broadcast_object_list(said, src=first, group=group, device=device)
        assert said[0] is not None, "the first rank says what comes"
        for name, shape, dtype in said[0]:
            x = found[name].to(device).contiguous() if here else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(x, src=first, group=group)
            found[name] = x
    return found


def all_to_all_rows(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Arrival:
    """Starts an exchange of rows and returns what waits for it: rows from rank 0, then from rank 1, …

    Args:
        x: contiguous [rows, D]: those for rank 0, then those for rank 1, …; kept alive and unchanged until the arrival.
        sent: rows for each rank.
        received: rows from each rank: what that rank has in `sent` for this one.
        group: the ranks, or None for this one alone.
    """
    if group is None:
        return lambda: x
    arrived = torch.empty(sum(received), *x.shape[1:], dtype=x.dtype, device=x.device)
    keep = [x]
    enter()
    work = dist.all_to_all_single(arrived, x, list(received), list(sent), group=group, async_op=True)

    def wait() -> Tensor:
        assert work is not None, "an asynchronous collective gives a handle"
        work.wait()
        # Not before: what is sent must live until then.
        del keep[:]
        return arrived

    return wait


def to_first(tensors: Sequence[Tensor], counts: Sequence[int], like: Tensor, group: Group) -> list[list[Tensor]]:
    """Returns every rank's tensors in the order of ranks, on the first rank; on the others nothing.

    Args:
        tensors: this rank's, of `like`'s dtype, device and number of dimensions; of any shapes.
        counts: how many each rank has, the same on every rank.
        like: the same on every rank.
        group: the ranks, or None for this one alone.
    """
    if group is None:
        return [list(tensors)]
    here, ranks = dist.get_rank(group), dist.get_world_size(group)
    shapes = torch.zeros(max(counts), like.dim(), dtype=torch.int64)
    for row, x in zip(shapes, tensors, strict=False):
        row.copy_(torch.tensor(x.shape))
    every = all_gather(shapes.to(like.device), group).cpu()
    sizes = [int(shape.prod(1).sum()) for shape in every]
    flat = [x.flatten() for x in tensors] if here else []
    sent = torch.cat([*flat, like.new_empty(0)])[:, None]
    away = [sizes[here] if here else 0, *[0] * (ranks - 1)]
    arrived = all_to_all_rows(sent, away, [0, *sizes[1:]] if here == 0 else [0] * ranks, group)()
    if here:
        return []
    found = [list(tensors)]
    for shape, count, part in zip(every[1:], counts[1:], arrived[:, 0].split(sizes[1:]), strict=True):
        pieces = part.split(shape[:count].prod(1).tolist())
        found.append([x.view(size) for x, size in zip(pieces, shape[:count].tolist(), strict=True)])
    return found
