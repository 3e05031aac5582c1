"""Memory that all GPUs of one host read and write: rows go straight to where they belong, over NVLink.

An exchange through a collective moves every row three times: packed, sent, joined. Through windows it moves once. The
sender knows the final place of each of its rows, because counts are global; results are fetched by whoever needs them.

Two barriers on the device keep readers and writers apart: after the writing of queries, keys and values, and after
attention. No third is needed. Who writes the next call's rows has passed the barrier after this call's attention. Who
overwrites this call's results has passed the barrier after the next call's writing, which follows everyone's fetching;
results therefore have memory of their own.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from semvid.kernels.layout import Shared, shared
from semvid.parallel.collectives import all_gather
from semvid.parallel.phases import enter
from semvid.parallel.ranks import Ranks, hosts

# Memory is taken with this much to spare, so that a layer with a split head more does not stop all ranks again.
SPARE = 1.15
# Views are of multiples of so many rows, so that layers that are cut otherwise share them: a new one keeps the host
# waiting for the device.
ROWS_STEP = 1 << 14
TIMEOUT_MS = 600_000


class Views(NamedTuple):
    """The windows of all ranks; blocks of [1, rows, D] each."""

    queries: Shared
    keys: Shared
    values: Shared
    results: Shared


class Windows:
    """One rank's window and its view of the others'. All ranks of the sequence make and use it alike."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._inputs, self._results = _Block(ranks), _Block(ranks)
        self._views: dict[tuple[Any, ...], Views] = {}

    def views(self, q_rows: int, kv_rows: int, like: Tensor) -> Views:
        """Returns all ranks' windows; a collective, and a wait for the device, when memory must grow.

        Args:
            q_rows: of queries and of results, the same on every rank; there may be more in the blocks.
            kv_rows: of keys and of values, likewise.
            like: says D and dtype.
        """
        q_rows, kv_rows = (-(-rows // ROWS_STEP) * ROWS_STEP for rows in (q_rows, kv_rows))
        D, size = like.shape[-1], like.element_size()
        grown = self._inputs.reserve((q_rows + 2 * kv_rows) * D * size, like.device)
        if self._results.reserve(q_rows * D * size, like.device) or grown:
            self._views.clear()
        key = (q_rows, kv_rows, D, like.dtype)
        if key not in self._views:
            self._views[key] = self._made(*key, like.device)
        return self._views[key]

    def barrier(self) -> None:
        """Lets the current stream wait until every rank's has come this far; the host goes on."""
        self._results.handle.barrier(0, TIMEOUT_MS)

    def _made(self, q_rows: int, kv_rows: int, D: int, dtype: torch.dtype, device: torch.device) -> Views:
        inputs, results = self._inputs.handle, self._results.handle
        of_inputs = (q_rows, 0), (kv_rows, q_rows), (kv_rows, q_rows + kv_rows)
        parts = [*((inputs, rows, before) for rows, before in of_inputs), (results, q_rows, 0)]
        ranks = range(self.ranks.mesh.sequence)
        return Views(
            *(
                shared([memory.get_buffer(rank, (1, rows, D), dtype, before * D) for rank in ranks], device)
                for memory, rows, before in parts
            )
        )


class _Block:
    """Symmetric memory: as much on every rank, each mapped into all."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.handle: Any = None
        self._memory: Tensor | None = None

    def reserve(self, size: int, device: torch.device) -> bool:
        """Takes more memory if there are fewer than `size` bytes, and returns whether it did."""
        if self._memory is not None and self._memory.numel() >= size:
            return False
        import torch.distributed._symmetric_memory as symmetric

        # Someone may still fetch from the old memory.
        torch.cuda.synchronize(device)
        enter()
        dist.barrier(self.ranks.sequence)
        self.handle = self._memory = None
        self._memory = symmetric.empty(int(size * SPARE), dtype=torch.uint8, device=device)
        group = self.ranks.sequence
        assert group is not None, "windows are for several ranks"
        self.handle = symmetric.rendezvous(self._memory, group)
        return True


def open_windows(ranks: Ranks, device: torch.device) -> Windows | None:
    """Returns the windows of `ranks`, or None where they can't be: every rank of the job must enter, and all get alike.

    They need GPUs of one host that reach each other's memory, and one ring row. Nor are they opened where PyTorch would
    bind the memory to NVLink multicast, which nothing here needs and which can leave a host's GPUs hanging:
    TORCH_SYMM_MEM_DISABLE_MULTICAST=1 keeps it from that.

    Args:
        ranks: the mesh and this rank's place on it.
        device: this rank's own.
    """
    mesh = ranks.mesh
    if device.type != "cuda" or mesh.ring > 1 or mesh.sequence == 1:
        return None
    mine = torch.cuda.current_device() if device.index is None else device.index
    first = ranks.rank - ranks.shard
    one_host = len(set(hosts()[first : first + mesh.sequence])) == 1
    devices = all_gather(torch.tensor([mine], device=device), ranks.sequence).flatten().tolist()
    reached = one_host and len(set(devices)) == len(devices) and not _multicast(mine)
    reached = reached and all(
        other < torch.cuda.device_count() and torch.cuda.can_device_access_peer(mine, other)
        for other in devices
        if other != mine
    )
    everyone = all_gather(torch.tensor([reached], dtype=torch.uint8, device=device), ranks.sequence)
    return Windows(ranks) if bool(everyone.all()) else None


def _multicast(device: int) -> bool:
    """Returns whether PyTorch would bind symmetric memory of this GPU to NVLink multicast."""
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory.has_multicast_support(DeviceType.CUDA, device)
