"""Windows without GPUs: files that the processes of one host map, with the group's barrier."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from semvid.kernels.layout import shared
from semvid.parallel.ranks import Ranks
from semvid.parallel.windows import Views


def windows_in(folder: str) -> "Callable[..., FileWindows | None]":
    """Returns what opens windows where `semvid.parallel.windows.open_windows` does on GPUs."""

    def opened(ranks: Ranks, device: torch.device) -> FileWindows | None:
        return FileWindows(ranks, folder) if ranks.mesh.ring == 1 < ranks.mesh.sequence else None

    return opened


class FileWindows:
    """What `Windows` is on GPUs; a row that nobody has written is NaN."""

    def __init__(self, ranks: Ranks, folder: str) -> None:
        self.ranks, self.folder = ranks, folder
        self._views: dict[tuple[int, ...], Views] = {}

    def views(self, q_rows: int, kv_rows: int, like: Tensor) -> Views:
        """Returns all ranks' windows, which all make at the same call."""
        key = q_rows, kv_rows, like.shape[-1]
        if key not in self._views:
            self._views[key] = self._made(*key, like.device)
        return self._views[key]

    def barrier(self) -> None:
        """Waits for every rank of the sequence."""
        dist.barrier(self.ranks.sequence)

    def _made(self, q_rows: int, kv_rows: int, D: int, device: torch.device) -> Views:
        world, rows = self.ranks.mesh.sequence, (q_rows, kv_rows, kv_rows, q_rows)
        # Branches apart have windows apart.
        place = self.ranks.mesh.world_size, self.ranks.place.cfg, world, q_rows, kv_rows, D
        name, size = f"{self.folder}/{'-'.join(map(str, place))}", world * sum(rows) * D
        if self.ranks.shard == 0:
            torch.from_file(name, shared=True, size=size).fill_(torch.nan)
        self.barrier()
        whole = torch.from_file(name, shared=True, size=size).view(world, -1)
        parts = [own.split([n * D for n in rows]) for own in whole]
        return Views(*(shared([part[i].view(1, n, D) for part in parts], device) for i, n in enumerate(rows)))
