"""What the kernels take at most. No torch: bad input is refused by these before anything is loaded."""

MAX_KEY_CLUSTERS = 8192
"""Of one head: what `top_p_map` holds of one query cluster."""


def cluster_bits(Ck: int) -> int:
    """Returns how many bits of a run's word tell its key cluster; the others tell its start."""
    return (Ck - 1).bit_length()


def most_rows(Ck: int) -> int:
    """Returns how many key rows a head can have at most, so that starts fit: 2^21 in 1000 clusters, 2^20 in 2000."""
    return 1 << (31 - cluster_bits(Ck))
