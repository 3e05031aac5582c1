"""This process among the ranks of its job: where it is on the mesh, and the groups it talks to."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh

from semvid.parallel.collectives import Group, all_gather
from semvid.parallel.mesh import Mesh, Place, check
from semvid.parallel.phases import enter

LOOPBACK = "127.0.0.1"
MEETING_KEY = "semvid/port"
CONNECT_S = 3.0


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank's view of the mesh. The default is a single process that talks to nobody."""

    mesh: Mesh = field(default_factory=Mesh)
    rank: int = 0
    sequence: Group = None
    """The ranks that share this one's sequence; None if it has the whole of it."""
    cfg: Group = None
    """The rank of each branch that holds the same shard; None if this one runs every branch."""

    @property
    def place(self) -> Place:
        """Where this rank is."""
        return self.mesh.place(self.rank)

    @property
    def shard(self) -> int:
        """The number of this rank's shard."""
        return self.place.sequence(self.mesh)

    @property
    def world(self) -> Group:
        """All ranks of the job; None if this one is alone."""
        return None if self.mesh.world_size == 1 else dist.group.WORLD

    def largest(self, values: Sequence[int], device: torch.device) -> list[int]:
        """Returns the largest of each value over all ranks. Every rank must enter; waits for the device.

        Args:
            values: as many on every rank.
            device: one that the groups exchange tensors on.
        """
        if self.mesh.world_size == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.int64, device=device)
        for group in (self.cfg, self.sequence):
            mine = all_gather(mine, group).amax(0)
        found: list[int] = mine.tolist()
        return found


def connect(mesh: Mesh) -> Ranks:
    """Returns this rank's view of `mesh`, its groups made. Every rank of the default process group must enter.

    Raises:
        ValueError: the mesh is not one of as many ranks as there are.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    check(mesh, world_size)
    if world_size == 1:
        return Ranks(mesh)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    enter()
    axes = init_device_mesh(device, (mesh.cfg, mesh.sequence), mesh_dim_names=("cfg", "sequence"))
    return Ranks(
        mesh,
        dist.get_rank(),
        axes.get_group("sequence") if mesh.sequence > 1 else None,
        axes.get_group("cfg") if mesh.cfg > 1 else None,
    )


class Meeting(NamedTuple):
    """Where ranks meet whose launcher is known."""

    rank: int
    world_size: int
    host: str
    """Rank 0's; 127.0.0.1 where all are on one machine."""
    port: int
    """Free, for rank 0 to listen on; of torchrun's own store where `elastic`."""
    elastic: bool = False
    """torchrun started these ranks, and may have started others before that died."""


def join(
    device: torch.device,
    seat: tuple[int, int, str] | None = None,
    *,
    meeting: Meeting | None = None,
    seconds: float = 600.0,
) -> None:
    """Joins the default process group: the one that the environment describes (torchrun's variables), unless told.

    Args:
        device: this rank's own; decides between NCCL and gloo.
        seat: rank, number of ranks, and a file that does not exist yet, where they meet.
        meeting: where they meet otherwise.
        seconds: how long a collective may wait for the others.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    own = device if device.type == "cuda" else None
    where: dict[str, Any] = {}
    enter()
    if seat is not None:
        where = {"rank": seat[0], "world_size": seat[1], "init_method": f"file://{seat[2]}"}
    elif meeting is not None and (meeting.elastic or meeting.host == LOOPBACK):
        store = _new_store(meeting, seconds) if meeting.elastic else _own_store(meeting, seconds)
        where = {"rank": meeting.rank, "world_size": meeting.world_size, "store": store}
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds), device_id=own, **where)


def _own_store(meeting: Meeting, seconds: float) -> Any:
    """Returns where the ranks of one machine meet; PyTorch's own way listens on every interface."""
    listener = None
    if meeting.rank == 0:
        with socket.socket() as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((meeting.host, meeting.port))
            made.listen()
            listener = made.detach()
    return TCPStore(
        meeting.host,
        meeting.port,
        is_master=meeting.rank == 0,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def _new_store(meeting: Meeting, seconds: float) -> Any:
    """Returns a store that no ranks before these have used.

    torchrun's own still has the addresses of those that died, and who reads before they are replaced waits for the
    dead. So rank 0 opens one and says in torchrun's where; an address at which nobody answers is one of a dead rank 0.
    """
    until = time.monotonic() + seconds
    known = TCPStore(meeting.host, meeting.port, is_master=False, timeout=timedelta(seconds=seconds))
    if meeting.rank == 0:
        made = TCPStore(meeting.host, 0, is_master=True, timeout=timedelta(seconds=seconds), wait_for_workers=False)
        known.set(MEETING_KEY, str(made.port))
        return made
    while True:
        port = int(known.get(MEETING_KEY))
        try:
            found = TCPStore(meeting.host, port, is_master=False, timeout=timedelta(seconds=CONNECT_S))
        except (RuntimeError, OSError):
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
            continue
        found.set_timeout(timedelta(seconds=seconds))
        return found


def slowest(value: float, device: torch.device) -> float:
    """Returns the largest `value` of all ranks; each must enter, and leaves when the last has come."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor([value], dtype=torch.float64, device=device)
    enter()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def hosts() -> list[str]:
    """Returns the name of each rank's host, in the order of ranks; every one must enter."""
    names: list[str] = [""] * dist.get_world_size()
    enter()
    dist.all_gather_object(names, socket.gethostname())
    return names


def leave() -> None:
    """Leaves the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
