"""Prompt tokens in a joint sequence: one cluster more on both sides, always computed.

HunyuanVideo attends video and text tokens together. Video tokens alone are clustered; the prompt is the last query
cluster and the last key cluster, its row and column of the map always on. The padding of the text is in no cluster and
so in no run: no kernel reads it, and its rows come out zero.

Several ranks share the text rows as they share the video tokens: ⌈T / P⌉ each, and a rank's prompt tokens stand after
its video tokens. Every token is then in exactly one shard, so counts, exchange and the way home need no case of their
own, and no linear layer on text is computed P times. What a job remembers (labels, centroids, the map's bits) is of the
video tokens alone; what follows from it (order, plan, exchange) has the prompt.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.layout import BlockMap, Permutation, Tail
from semvid.parallel.exchange import Counts
from semvid.parallel.shard import Shard


class Prompt(NamedTuple):
    """The prompt's tokens in the current forward pass."""

    tokens: int
    """Of the whole prompt, without padding."""
    rows: Shard
    """This rank's text rows, of all: the prompt's are the first."""

    @property
    def own(self) -> int:
        """Prompt tokens on this rank."""
        return self.of_shards()[self.rows.rank]

    def of_shards(self) -> list[int]:
        """Returns the prompt tokens of every rank's shard."""
        step = self.rows.rows
        return [min(step, max(0, self.tokens - rank * step)) for rank in range(self.rows.ranks)]

    def ordered(self, permutation: Permutation) -> Permutation:
        """Returns an order of video tokens with this rank's prompt tokens as one more cluster, the last."""
        order, offsets = permutation
        extra = torch.arange(order.shape[1], order.shape[1] + self.own, dtype=order.dtype, device=order.device)
        return Permutation(
            torch.cat([order, extra.expand(order.shape[0], -1)], dim=1),
            torch.cat([offsets, offsets[:, -1:] + self.own], dim=1),
        )

    def sized(self, sizes: Tensor) -> Tensor:
        """Returns the sizes of clusters, int32 [H, C], with that of the prompt, [H, C + 1]."""
        return torch.nn.functional.pad(sizes, (0, 1), value=self.tokens)

    def selected(self, block_map: BlockMap) -> BlockMap:
        """Returns a map of video clusters with the prompt's row and column, bool [H, Cq + 1, Ck + 1]."""
        return BlockMap(torch.nn.functional.pad(block_map.selected, (0, 1, 0, 1), value=True))

    def stood_in(self, tail: Tail) -> Tail:
        """Returns stand-ins with a column for the prompt that weighs nothing, as the prompt is always computed."""
        k_mean, v_mean, log_n = tail
        pad = torch.nn.functional.pad
        return Tail(pad(k_mean, (0, 0, 0, 1)), pad(v_mean, (0, 0, 0, 1)), pad(log_n, (0, 1), value=-math.inf))

    def counted(self, counts: Counts) -> Counts:
        """Returns what an exchange is planned from, with the prompt's tokens."""
        queries, keys, computed = counts
        # `of_shards` from the host would keep it waiting for the device.
        begins = torch.arange(self.rows.ranks, dtype=queries.dtype, device=queries.device) * self.rows.rows
        shards = (self.tokens - begins).clamp(0, self.rows.rows)[:, None, None].expand(-1, queries.shape[1], 1)
        everything = keys.sum((0, 2), dtype=computed.dtype)[:, None]
        return Counts(
            torch.cat([queries, shards], dim=2),
            torch.cat([keys, shards], dim=2),
            torch.cat([computed, everything], dim=1) + self.tokens,
        )
