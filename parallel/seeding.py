"""Where k-means starts: tokens chosen by hashes, the same on any device and any number of ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from semvid.parallel.collectives import Group, all_reduce_sum

# `spread_tokens`: tokens looked at for each that is chosen, rounds, and the power of the distance that a token's
# chance grows with (2 is k-means++, infinity farthest-first). Measured in docs/method.md.
SAMPLE = 4
ROUNDS = 16
POWER = 8


def random_tokens(
    x: Tensor,
    C: int,
    key: Sequence[int],
    tokens: int,
    first: int = 0,
    group: Group = None,
    first_head: int = 0,
) -> Tensor:
    """Returns C different tokens of each head as starting centroids, fp32 [H, C, D], the same on every rank.

    Which tokens follows from `key`, the head and the token's place in the whole sequence alone: not from the
    number of ranks, the device or a generator's state. Every token gets a 63-bit hash; the C smallest win.

    Args:
        x: local tokens, [H, n, D].
        C: 1 .. tokens.
        key: whole numbers that name the draw (job seed, layer, branch, step, queries or keys).
        tokens: length of the whole sequence over all ranks.
        first: place of the first local token in the whole sequence.
        group: the ranks that share the sequence; every one must enter.
        first_head: the model's number of x's first head.
    """
    if not 1 <= C <= tokens:
        raise ValueError(f"C is {C}; accepted: 1 .. {tokens}, the tokens")
    H, n, D = x.shape
    hashes = _hashes(first_head, H, key, tokens, x.device)
    chosen = hashes.topk(C, dim=-1, largest=False, sorted=True).indices - first
    here = (chosen >= 0) & (chosen < n)
    mine = torch.zeros(H, C, D, device=x.device)
    if n > 0:
        rows = torch.gather(x, 1, chosen.clamp(0, n - 1)[..., None].expand(H, C, D))
        mine = torch.where(here[..., None], rows.float(), 0.0)
    return all_reduce_sum([mine], group)[0]


def spread_tokens(
    x: Tensor,
    C: int,
    key: Sequence[int],
    tokens: int,
    first: int = 0,
    group: Group = None,
    first_head: int = 0,
) -> Tensor:
    """Returns C different tokens of each head that lie far apart, fp32 [H, C, D], the same on every rank.

    In few rounds, as k-means‖ (arXiv 1203.6402): each takes tokens of a sample at random with chances that grow with
    their distance d to the nearest one taken before, as d^POWER, without replacement (the smallest -ln(u) / d^POWER
    win). u comes from a hash, as in `random_tokens`, whose arguments these are. The sample is `SAMPLE`·C random tokens,
    gathered by one all-reduce; every rank then chooses for itself, from the same bits.
    """
    if not 1 <= C <= tokens:
        raise ValueError(f"C is {C}; accepted: 1 .. {tokens}, the tokens")
    sample = random_tokens(x, min(tokens, SAMPLE * C), key, tokens, first, group, first_head)
    return choose_spread(sample, C, _hashes(first_head, x.shape[0], (*key, 1), sample.shape[1], x.device))


def choose_spread(sample: Tensor, C: int, hashes: Tensor) -> Tensor:
    """Returns C rows of each head's sample, fp32 [H, C, D], that lie far apart; see `spread_tokens`.

    Args:
        sample: fp32 [H, m, D].
        C: 1 .. m.
        hashes: int64 [H, m], 0 .. 2^63 - 1: what is random in it.
    """
    H, m, _ = sample.shape
    if not 1 <= C <= m:
        raise ValueError(f"C is {C}; accepted: 1 .. {m}, the sample")
    # Less the mean, or its square would drown the distances.
    centered = sample - sample.mean(1, keepdim=True)
    norms = centered.square().sum(-1)
    chosen = hashes.argmin(-1, keepdim=True)
    near = torch.full((H, m), torch.inf, device=sample.device)
    rows = _rows(centered, chosen)
    for number in range(ROUNDS):
        distances = norms[:, None] + rows.square().sum(-1)[..., None] - 2 * rows @ centered.mT
        near = torch.minimum(near, distances.amin(1).clamp_(min=torch.finfo(torch.float32).tiny))
        near.scatter_(1, chosen, 0.0)
        taken = C - chosen.shape[1]
        take = taken - taken * (ROUNDS - 1 - number) // (ROUNDS - number)
        if take == 0:
            continue
        # ln of the race's time; a token that is taken already has d = 0 and arrives last.
        race = _uniform(_mix(hashes + number)).log().neg().log() - POWER / 2 * near.double().log()
        new = race.topk(take, dim=-1, largest=False, sorted=True).indices
        chosen, rows = torch.cat([chosen, new], 1), _rows(centered, new)
    return _rows(sample, chosen)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    return torch.gather(x, 1, places[..., None].expand(-1, -1, x.shape[2]))


def _uniform(hashes: Tensor) -> Tensor:
    """Returns fp64 numbers between 0 and 1, neither of them, of int64 hashes."""
    return ((hashes & ((1 << 52) - 1)).double() + 0.5) / (1 << 52)


def _hashes(first_head: int, H: int, key: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Returns int64 [H, count] hashes, 0 .. 2^63 - 1, of a key, the head's number and 0 .. count - 1."""
    heads = torch.arange(first_head, first_head + H, dtype=torch.int64, device=device)[:, None]
    hashes = heads.new_zeros(1)
    for part in key:
        hashes = _mix(hashes + part)
    hashes = _mix(_mix(hashes + heads) + torch.arange(count, dtype=torch.int64, device=device))
    return hashes.bitwise_and_((1 << 63) - 1)


def _mix(z: Tensor) -> Tensor:
    """Returns splitmix64's finalizer of int64 `z` (Steele, Lea, Flood 2014), products modulo 2^64."""
    z = z + -7046029254386353131
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Returns z shifted right with zeros coming in; torch's own shift brings in the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
