"""Other ways to choose what is computed, through the same kernels: blocks of tokens as they stand, and an oracle."""

from collections.abc import Callable

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import BlockMap, Clusters, Permutation
from semvid.parallel.maps import pack_bits
from semvid.parallel.phases import phase
from semvid.runtime.attention.refresh import refresh
from semvid.runtime.attention.schedule import Refresh
from semvid.runtime.attention.session import Session
from semvid.runtime.attention.state import Memory

# Rows of exact attention at once: [H, rows, N] in fp32.
PAIRS_AT_ONCE = 1 << 28


def by_blocks(block: int) -> Callable[..., tuple[Memory, None]]:
    """Returns what makes memories of blocks of `block` tokens in the model's order.

    A block's mean stands for its tokens, and blocks are taken by softmax mass until p, as SpargeAttn (arXiv 2502.18137)
    does without its self-similarity test; XAttention's antidiagonal sums are finer estimates of the same mass.
    """

    def make(q: Tensor, k: Tensor, v: Tensor, session: Session, layer: int, todo: Refresh) -> tuple[Memory, None]:
        ops, config = session.ops, session.config
        with phase("cluster"):
            sides = [_in_blocks(x, block, ops) for x in (q, k)]
        queries, keys = sides
        with phase("map"):
            block_map = ops.top_p_map(queries.centroids, keys.centroids, keys.sizes, config.p, config.floor)
        return _placed(queries, keys, block_map, session), None

    return make


def by_exact_mass(q: Tensor, k: Tensor, v: Tensor, session: Session, layer: int, todo: Refresh) -> tuple[Memory, None]:
    """Returns our clusters with an oracle's map: the fewest keys that hold p of each query cluster's exact mass."""
    memory, _ = refresh(q, k, v, session, layer, todo)
    queries, keys = memory.queries, memory.keys
    mass = exact_mass(q, k, queries, keys)
    block_map = fewest_keys(mass, keys.sizes, session.config.p)
    return _placed(queries, keys, block_map, session)._replace(step=memory.step, interval=memory.interval), None


def exact_mass(q: Tensor, k: Tensor, queries: Clusters, keys: Clusters) -> Tensor:
    """Returns the softmax mass that each query cluster's tokens give each key cluster, mean over them, [H, Cq, Ck].

    Args:
        q: [H, N, D], in token order; k likewise.
        k: keys.
        queries: of q.
        keys: of k.
    """
    H, N, D = q.shape
    Cq, Ck = queries.centroids.shape[1], keys.centroids.shape[1]
    by_query, by_key = queries.permutation, keys.permutation
    mass = torch.zeros(H, Cq, Ck, device=q.device)
    rows = max(1, PAIRS_AT_ONCE // (N * H))
    sorted_keys = _gathered(k, by_key.order).float()
    for start in range(0, N, rows):
        order = by_query.order[:, start : start + rows]
        scores = (_gathered(q, order).float() @ sorted_keys.mT / D**0.5).softmax(-1)
        of_clusters = _run_sums(scores, by_key.offsets)
        labels = torch.gather(queries.labels, 1, order.long()).long()
        mass.scatter_add_(1, labels[..., None].expand(-1, -1, Ck), of_clusters)
    return mass / queries.sizes.clamp(min=1)[..., None]


def fewest_keys(mass: Tensor, sizes: Tensor, p: float) -> BlockMap:
    """Returns the map that reaches p of `mass`, [H, Cq, Ck], with the fewest keys: most mass a key first."""
    occupied = (sizes > 0)[:, None]
    ranked = torch.where(occupied, mass / sizes.clamp(min=1)[:, None], -1.0).argsort(-1, descending=True)
    share = mass.gather(-1, ranked)
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-30)
    keep = share.cumsum(-1) - share < p
    return BlockMap(torch.zeros_like(keep).scatter_(-1, ranked, keep) & occupied)


def _run_sums(x: Tensor, offsets: Tensor) -> Tensor:
    """Returns sums over runs of columns, [H, rows, Ck], of x [H, rows, N]."""
    # Sums of shares of one: in fp32 off by some 1e-6 of all.
    totals = torch.nn.functional.pad(x.cumsum(-1), (1, 0))
    ends = offsets.long()[:, None].expand(-1, x.shape[1], -1)
    return totals.gather(-1, ends).diff(dim=-1).clamp_(min=0)


def _in_blocks(x: Tensor, block: int, ops: Ops) -> Clusters:
    """Returns blocks of `block` neighbouring tokens as clusters; the last may be shorter."""
    H, N, _ = x.shape
    C = -(-N // block)
    tokens = torch.arange(N, dtype=torch.int32, device=x.device).expand(H, N).contiguous()
    bounds = (torch.arange(C + 1, dtype=torch.int32, device=x.device) * block).clamp(max=N)
    order = Permutation(tokens, bounds.expand(H, C + 1).contiguous())
    sums, counts = ops.sums_by_runs(x, order)
    return Clusters(tokens // block, sums / counts[..., None], counts, order)


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    return torch.gather(x, 1, order.long()[..., None].expand(-1, -1, x.shape[2]))


def _placed(queries: Clusters, keys: Clusters, block_map: BlockMap, session: Session) -> Memory:
    """Returns the memory of one process that has the whole sequence."""
    share = session.ops.density(block_map, queries.sizes, keys.sizes)
    return Memory(queries, keys, share, pack_bits(block_map.selected), step=session.here().step)
