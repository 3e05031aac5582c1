"""Anchors: what a sparse result lacks is measured on the mean of each query cluster and added to the cluster's rows.

The queries of a cluster are alike, and so is what they lose with the keys that are left out or stood in for. The mean
of the cluster, its anchor, is computed twice: as one more query of the cluster, and as one of a cluster of its own that
computes all keys. The second result less the first is what the anchor lacks; to first order in the distance from the
anchor the rows of the cluster lack as much, and get it. It costs C rows of all keys, and C more rows of some.

Anchors are rows behind the tokens of q, so they travel and are attended as these do. Each rank that shares the sequence
has a share of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import BlockMap, Clusters, Permutation
from semvid.parallel.collectives import Group, all_gather
from semvid.parallel.exchange import Counts
from semvid.parallel.kmeans import means_of


class Share(NamedTuple):
    """The query clusters whose anchors one rank brings: first .. first + number of `clusters`."""

    rank: int
    ranks: int
    clusters: int

    @property
    def most(self) -> int:
        """Anchors of the first rank; none has more."""
        return -(-self.clusters // self.ranks)

    @property
    def first(self) -> int:
        """The first cluster."""
        return min(self.clusters, self.rank * self.most)

    @property
    def number(self) -> int:
        """How many clusters, 0 .. most."""
        return min(self.most, self.clusters - self.first)


def with_anchors(q: Tensor, queries: Clusters, share: Share, ops: Ops, group: Group = None) -> Tensor:
    """Returns q and behind it this rank's anchors, twice: [H, n + 2a, D].

    Args:
        q: local queries of this step, [H, n, D], in token order.
        queries: their clusters, of this step or an earlier one.
        share: this rank's.
        ops: the backend.
        group: the ranks that share the sequence; every one must enter, for one all-reduce.
    """
    (means,) = means_of([q], queries, ops, group)
    own = means[:, share.first : share.first + share.number].to(q.dtype)
    return torch.cat([q, own, own], 1)


def order_of(queries: Clusters, share: Share, ops: Ops) -> Permutation:
    """Returns the order of what `with_anchors` returns: C clusters, each with its anchor, then that of all anchors."""
    H = queries.labels.shape[0]
    own = torch.arange(share.first, share.first + share.number, dtype=torch.int32, device=queries.labels.device)
    rows = torch.cat([own, torch.full_like(own, share.clusters)]).expand(H, -1)
    return ops.group(torch.cat([queries.labels, rows], 1), share.clusters + 1)


def select_all(block_map: BlockMap, k_sizes: Tensor) -> BlockMap:
    """Returns the map with one more query cluster, that of all anchors: it computes every key.

    Args:
        block_map: [H, C, Ck].
        k_sizes: int32 [H, Ck].
    """
    return BlockMap(torch.cat([block_map.selected, (k_sizes > 0)[:, None]], 1))


def counted(counts: Counts) -> Counts:
    """Returns counts with the anchors of every rank in them."""
    P, H, C = counts.queries.shape
    device = counts.queries.device
    shares = [Share(rank, P, C) for rank in range(P)]
    owner = torch.arange(C, device=device) // shares[0].most
    own = (owner == torch.arange(P, device=device)[:, None]).int()[:, None].expand(P, H, C)
    queries = torch.cat([counts.queries + own, own.sum(-1, keepdim=True, dtype=torch.int32)], -1)
    every = counts.keys.sum((0, 2), dtype=torch.int32)[:, None]
    return Counts(queries, counts.keys, torch.cat([counts.keys_computed, every], 1))


def cost(computed: Tensor, tokens: int) -> Tensor:
    """Returns what anchors add to the density, fp32 [H].

    Args:
        computed: int32 [H, C], the columns that each query cluster computes.
        tokens: of the whole sequence.
    """
    pairs = computed.double().sum(-1) + computed.shape[1] * tokens
    return (pairs / tokens**2).float()


def corrected(out: Tensor, queries: Clusters, share: Share, ops: Ops, group: Group = None) -> Tensor:
    """Returns the rows of the tokens, [H, n, D], each with what the anchor of its cluster lacks.

    Args:
        out: of what `with_anchors` returned, [H, n + 2a, D].
        queries: the clusters of the tokens.
        share: this rank's.
        ops: the backend.
        group: the ranks that share the sequence; every one must enter, for one all-gather.
    """
    n = queries.labels.shape[1]
    sparse, exact = out[:, n:].split([share.number] * 2, 1)
    # Shares are gathered at one length.
    lacking = torch.nn.functional.pad(exact - sparse, (0, 0, 0, share.most - share.number))
    whole = all_gather(lacking.contiguous(), group).transpose(0, 1).flatten(1, 2)
    return out[:, :n] + ops.gather_rows(whole, queries.labels)
