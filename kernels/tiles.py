"""Tile choices as a table: (op, architecture, head dim) -> Tile. Each group says where its numbers are from."""

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How one program cuts its work."""

    rows: int
    """Rows of the output a program makes: tokens, query clusters."""
    columns: int
    """What it takes at a time on the way: centroids, key clusters. 1 where there is no second side."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline over `columns`."""


ANY = "any"

# The head dim is the padded one, a power of two; an architecture that is not listed takes the row of `ANY`.
_TABLE: dict[tuple[str, str, int], Tile] = {
    # A centroid read from L2 serves `rows` tokens: 128 rows would ask L2 for 5.5 TB/s at 700 TFLOP/s, 256 for half of
    # it. 64 columns keep a thread under 128 registers, so that two programs share an SM and one's argmax runs under
    # the other's matrix products.
    ("assign", "sm_90", 256): Tile(128, 64, 8, 2),
    ("assign", "sm_90", 128): Tile(256, 64, 8, 3),
    ("assign", "sm_90", 64): Tile(256, 64, 8, 4),
    ("assign", "sm_90", 32): Tile(256, 64, 8, 4),
    ("assign", "sm_90", 16): Tile(256, 64, 8, 4),
    # 80 KB of shared memory: fits the 99 KB of the smaller parts.
    ("assign", ANY, 256): Tile(64, 32, 4, 2),
    ("assign", ANY, 128): Tile(128, 64, 4, 3),
    ("assign", ANY, 64): Tile(128, 64, 4, 3),
    ("assign", ANY, 32): Tile(128, 64, 4, 3),
    ("assign", ANY, 16): Tile(128, 64, 4, 3),
    # fp32 products run on the ordinary cores, operands in registers: larger tiles spill.
    ("assign_fp32", ANY, 256): Tile(64, 32, 8, 1),
    ("assign_fp32", ANY, 128): Tile(64, 32, 8, 1),
    ("assign_fp32", ANY, 64): Tile(64, 32, 8, 1),
    ("assign_fp32", ANY, 32): Tile(64, 32, 8, 1),
    ("assign_fp32", ANY, 16): Tile(64, 32, 8, 1),
}


def tile_of(op: str, device: torch.device, block_d: int) -> Tile:
    """Returns the tile of `op` for the padded head dim `block_d` on `device` (the interpreter's CPU counts as any)."""
    arch = _architecture(device.index) if device.type == "cuda" else ANY
    return _TABLE.get((op, arch, block_d)) or _TABLE[op, ANY, block_d]


@functools.cache
def _architecture(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
