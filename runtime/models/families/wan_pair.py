"""Wan 2.2 A14B text-to-video: one transformer while there is much noise, another from the boundary on.

Each has its own attention state, under names of its own (`context_name`), and its own first dense layers. The first
one's state is dropped when the second begins: it never runs again.
"""

from semvid.runtime.models.families import facts
from semvid.runtime.models.families.wan import Wan


class WanPair(Wan):
    """Wan 2.1 in everything but the number of its transformers."""

    facts = facts.WAN_PAIR
