"""The mesh of a job: as asked for, or the one that serves its ranks best."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from semvid.parallel import mesh as meshes
from semvid.parallel.mesh import Mesh

if TYPE_CHECKING:
    pass


def resolve_mesh(text: str | None, world_size: int, *, guided: bool, hosts: Sequence[str] = ()) -> Mesh:
    """Returns the mesh of `text`, or the one that serves `world_size` ranks best if there is none.

    Raises:
        ValueError: it can't be realised; the message has the numbers.
    """
    if text is None:
        return meshes.choose(world_size, guided=guided, hosts=hosts)
    mesh = meshes.parse(text, world_size)
    meshes.check(mesh, world_size, guided=guided, hosts=hosts)
    return mesh
