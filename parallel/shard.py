"""Splitting a sequence over ranks: equal shards of ⌈N / P⌉ tokens, the last ones padded. Pure but for `gather`."""

from typing import NamedTuple

import torch
from torch import Tensor

from semvid.parallel.collectives import Group, all_gather


class Shard(NamedTuple):
    """One rank's share of a sequence: rows first .. first + tokens, then padding up to `rows`."""

    rank: int
    ranks: int
    total: int
    """Tokens of the whole sequence, N."""

    @property
    def rows(self) -> int:
        """Rows of every rank's shard, padding included: ⌈N / P⌉."""
        return -(-self.total // self.ranks)

    @property
    def first(self) -> int:
        """Place of the first token in the whole sequence."""
        return min(self.total, self.rank * self.rows)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding; 0 .. rows."""
        return min(self.rows, self.total - self.first)

    def all_tokens(self) -> list[int]:
        """Returns the tokens of every rank's shard."""
        return [self._replace(rank=rank).tokens for rank in range(self.ranks)]

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Returns this rank's rows of x along `dim`, padded with zeros to `rows`.

        Raises:
            ValueError: x has not `total` rows along `dim`.
        """
        if x.shape[dim] != self.total:
            raise ValueError(f"dimension {dim} has {x.shape[dim]} rows, the sequence has {self.total}")
        mine = x.narrow(dim, self.first, self.tokens)
        return pad(mine, dim, self.rows)

    def gather(self, x: Tensor, dim: int, group: Group) -> Tensor:
        """Returns the whole sequence along `dim` on every rank from every rank's `split`; padding falls away.

        Every rank of `group` must enter.
        """
        whole = all_gather(x.movedim(dim, 0).contiguous(), group).flatten(0, 1)
        return whole[: self.total].movedim(0, dim)


def pad(x: Tensor, dim: int, rows: int) -> Tensor:
    """Returns x with zeros after its rows along `dim`, `rows` in all; x itself if it has them."""
    missing = rows - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)
