"""Seeding by tokens that lie far apart: the same on any number of ranks, and less spread than random tokens leave."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from semvid.kernels.reference import assign
from semvid.parallel.seeding import SAMPLE, choose_spread, random_tokens, spread_tokens


def blobs(N: int, H: int = 2, D: int = 8) -> Tensor:
    """Tokens of few dense groups and many thin ones, which random tokens miss."""
    generator = torch.Generator().manual_seed(0)
    centers = 8 * torch.randn(H, 40, D, generator=generator)
    group = (torch.rand(N, generator=generator).pow(3) * 40).long()
    return centers[:, group] + 0.3 * torch.randn(H, N, D, generator=generator)


def spread(x: Tensor, centroids: Tensor) -> float:
    """The largest squared distance of a token to its centroid, mean over heads."""
    labels = assign(x, centroids).long()
    nearest = torch.gather(centroids, 1, labels[..., None].expand(*x.shape))
    return float((x - nearest).square().sum(-1).amax(1).mean())


@pytest.mark.parametrize(("N", "C"), [(5, 5), (100, 63), (1000, 1), (1000, 40)])
def test_different_tokens_of_x_are_chosen(N: int, C: int) -> None:
    x = blobs(N)
    found = spread_tokens(x, C, (1, 2), N)
    assert found.shape == (2, C, 8)
    for h in range(2):
        places = (x[h][:, None] == found[h][None]).all(-1).int().argmax(0)
        assert torch.equal(x[h][places], found[h])
        assert len(set(places.tolist())) == C


def farthest_first(sample: Tensor, C: int) -> Tensor:
    """The textbook's greedy choice: always the token farthest from those that were chosen."""
    heads, chosen = torch.arange(len(sample)), [torch.zeros(len(sample), dtype=torch.long)]
    near = torch.full(sample.shape[:2], torch.inf)
    for _ in range(C - 1):
        near = torch.minimum(near, (sample - sample[heads, chosen[-1]][:, None]).square().sum(-1))
        chosen.append(near.argmax(1))
    return torch.stack([sample[heads, place] for place in chosen], 1)


def test_they_cover_the_sample_almost_as_the_greedy_choice_does() -> None:
    x, over_greedy = blobs(2000), []
    for key in range(5):
        # What `spread_tokens` chooses from.
        sample = random_tokens(x, SAMPLE * 40, (key,), 2000)
        ours = spread(sample, spread_tokens(x, 40, (key,), 2000))
        assert ours < 0.2 * spread(sample, random_tokens(x, 40, (key,), 2000))
        over_greedy.append(ours / spread(sample, farthest_first(sample, 40)))
    assert sorted(over_greedy)[2] < 2


def test_the_choice_hangs_on_the_key_and_the_head_alone() -> None:
    x = blobs(500, H=4)
    whole = spread_tokens(x, 20, (1, 2), 500)
    assert torch.equal(spread_tokens(x[2:], 20, (1, 2), 500, first_head=2), whole[2:])
    assert not torch.equal(spread_tokens(x, 20, (1, 3), 500), whole)


def test_a_shift_of_all_tokens_changes_nothing() -> None:
    x = blobs(300).double().float()
    hashes = torch.arange(600).view(2, 300)
    moved = choose_spread(x + 64, 30, hashes) - 64
    assert (moved - choose_spread(x, 30, hashes)).abs().max() < 1e-4


def test_more_centroids_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="C is 6; accepted: 1 .. 5, the tokens"):
        spread_tokens(blobs(5), 6, (0,), 5)
    with pytest.raises(ValueError, match="C is 6; accepted: 1 .. 5, the sample"):
        choose_spread(blobs(5), 6, torch.zeros(2, 5, dtype=torch.int64))


def _shards(rank: int, world: int) -> None:
    x = blobs(101)
    first = [0, 51][rank]
    mine = x[:, first : [51, 101][rank]]
    found = spread_tokens(mine, 12, (5, 1), 101, first=first, group=dist.group.WORLD)
    assert torch.equal(found, spread_tokens(x, 12, (5, 1), 101))


def test_ranks_choose_what_one_process_chooses(spawn: Callable[..., None]) -> None:
    spawn(2, _shards)
