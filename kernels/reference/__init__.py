"""Every op of `kernels` in plain fp32 PyTorch: what the fast versions are tested against, and the CPU's own path.

Names and signatures are those of the fast versions. Matrix products are taken in fp32 whatever the input's dtype.
"""

from semvid.kernels.reference.block import add_gated, add_norm, add_norm8, linear8, norm_rotary, quantize_rows
from semvid.kernels.reference.clusters import (
    assign,
    centroids_of,
    cluster_sums,
    density,
    group,
    sums_by_runs,
    top_p_map,
    unpack_map,
)
from semvid.kernels.reference.rows import (
    addresses,
    gather_among,
    gather_rows,
    scatter_among,
    scatter_rows,
    source_rows,
    target_rows,
)
from semvid.kernels.reference.softmax import attention, merge, plan

__all__ = [
    "add_gated",
    "add_norm",
    "add_norm8",
    "addresses",
    "assign",
    "attention",
    "centroids_of",
    "cluster_sums",
    "density",
    "gather_among",
    "gather_rows",
    "group",
    "linear8",
    "merge",
    "norm_rotary",
    "plan",
    "quantize_rows",
    "scatter_among",
    "scatter_rows",
    "source_rows",
    "sums_by_runs",
    "target_rows",
    "top_p_map",
    "unpack_map",
]
