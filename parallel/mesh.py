"""The mesh: how the ranks of one job share the branches (cfg) and the sequence (ring × ulysses), and who is where.

Ranks are numbered with ulysses innermost, then ring, then cfg: neighbours by number, and so by host, share most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

AXES = ("cfg", "ring", "ulysses")


class Place(NamedTuple):
    """Where one rank is on the mesh."""

    cfg: int
    ring: int
    ulysses: int

    def sequence(self, mesh: "Mesh") -> int:
        """Returns the rank among those that share a sequence: its shard's number."""
        return self.ring * mesh.ulysses + self.ulysses


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """Degrees of the three axes, 1 or more each."""

    cfg: int = 1
    """Groups that share the branches of classifier-free guidance: 1 or 2."""
    ring: int = 1
    """Rows of ranks; keys and values of one row at a time are attended by all."""
    ulysses: int = 1
    """Ranks of a row; they share its queries by heads and parts of heads. Inside one host."""

    @property
    def sequence(self) -> int:
        """How many ranks share one sequence."""
        return self.ring * self.ulysses

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.cfg * self.sequence

    def place(self, rank: int) -> Place:
        """Returns where rank 0 .. world_size - 1 is."""
        rest, ulysses = divmod(rank, self.ulysses)
        return Place(*divmod(rest, self.ring), ulysses)

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES)


def parse(text: str, world_size: int) -> Mesh:
    """Returns the mesh of "cfg=2,ring=1,ulysses=2"; what is left out is 1.

    Raises:
        ValueError: another form, an unknown axis, a degree below 1, or degrees whose product is not `world_size`.
    """
    form = "degrees such as cfg=2,ring=1,ulysses=2"
    degrees: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, degree = part.strip().partition("=")
        if axis not in AXES or not equals or not degree.isdecimal() or int(degree) < 1 or axis in degrees:
            raise ValueError(f"--mesh is {text!r}; accepted: {form}, each axis once, each degree 1 or more")
        degrees[axis] = int(degree)
    mesh = Mesh(**degrees)
    check(mesh, world_size)
    return mesh


def choose(world_size: int, *, guided: bool, hosts: Sequence[str] = ()) -> Mesh:
    """Returns the mesh that serves `world_size` ranks best: the branches apart first, then ulysses, ring across hosts.

    The two branches talk once a step, ulysses ranks twice a layer, so branches are parted first. Any number of ranks
    has a mesh.

    Args:
        world_size: ranks in all.
        guided: whether there are two branches (classifier-free guidance).
        hosts: the name of each rank's host, in the order of ranks; empty: all on one.
    """
    cfg = 2 if guided and world_size % 2 == 0 else 1
    sequence = world_size // cfg
    for ulysses in range(sequence, 0, -1):
        if sequence % ulysses == 0:
            mesh = Mesh(cfg=cfg, ring=sequence // ulysses, ulysses=ulysses)
            if crossing(mesh, hosts) is None:
                return mesh
    raise AssertionError("ulysses=1 crosses no host")


def check(mesh: Mesh, world_size: int, *, guided: bool = True, hosts: Sequence[str] = ()) -> None:
    """Raises ValueError if `mesh` can't be realised; the message has the numbers and what would work.

    Args:
        mesh: what was asked for.
        world_size: ranks in all.
        guided: whether there are two branches (classifier-free guidance).
        hosts: the name of each rank's host, in the order of ranks; empty: all on one.
    """
    works = f"accepted here, for example: {choose(world_size, guided=guided, hosts=hosts)}"
    if mesh.world_size != world_size:
        product = " x ".join(str(getattr(mesh, axis)) for axis in AXES)
        raise ValueError(
            f"--mesh is {mesh}, which is {product} = {mesh.world_size} ranks, but there are {world_size}; {works}"
        )
    if mesh.cfg > 2:
        raise ValueError(f"--mesh is {mesh}, but there are two branches for cfg to share, not {mesh.cfg}; {works}")
    if mesh.cfg > 1 and not guided:
        raise ValueError(f"--mesh is {mesh}, but without guidance there is one branch and cfg must be 1; {works}")
    ranks = crossing(mesh, hosts)
    if ranks is not None:
        names = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
        raise ValueError(
            f"--mesh is {mesh}, whose ulysses group of ranks {ranks.start} .. {ranks.stop - 1} lies on several hosts"
            f" ({names}); {works}"
        )


def crossing(mesh: Mesh, hosts: Sequence[str]) -> range | None:
    """Returns the ranks of the first ulysses group that lies on more than one host, None if none does."""
    for first in range(0, len(hosts), mesh.ulysses):
        group = range(first, first + mesh.ulysses)
        if len({hosts[rank] for rank in group if rank < len(hosts)}) > 1:
            return group
    return None
