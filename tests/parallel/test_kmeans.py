"""Global k-means: on one rank against a plain loop, on several gloo ranks against one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from semvid.kernels.dispatch import select
from semvid.parallel.collectives import all_reduce_sum
from semvid.parallel.kmeans import Refined, refine, refine_with
from semvid.parallel.lloyd import MANY, Recordings
from semvid.parallel.seeding import random_tokens

OPS = select("reference", torch.device("cpu"))


def blobs(N: int, H: int = 2, D: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(H, 7, D, generator=generator)
    return centers[:, torch.randint(7, (N,), generator=generator)] + torch.randn(H, N, D, generator=generator)


def lloyd(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook loop of one head in fp64: labels, centroids, sizes."""
    x, centroids = x.double(), centroids.double().clone()
    for _ in range(iterations):
        labels = torch.cdist(x, centroids).argmin(-1)
        for c in range(len(centroids)):
            if (labels == c).any():
                centroids[c] = x[labels == c].mean(0)
    return labels, centroids, torch.bincount(labels, minlength=len(centroids))


@pytest.mark.parametrize(("N", "C"), [(1, 1), (63, 5), (100, 100), (257, 12)])
def test_refine_is_lloyds_iteration(N: int, C: int) -> None:
    x = blobs(N)
    start = random_tokens(x, C, (0,), N)
    (found,) = refine([x], [start], 4, OPS)
    for h in range(2):
        labels, centroids, sizes = lloyd(x[h], start[h], 4)
        assert torch.equal(found.labels[h].long(), labels)
        torch.testing.assert_close(found.centroids[h].double(), centroids, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.sizes[h].long(), sizes)
    assert torch.equal(found.permutation.order, OPS.group(found.labels, C).order)
    assert torch.equal(found.permutation.offsets, OPS.group(found.labels, C).offsets)


def test_an_empty_cluster_keeps_its_centroid() -> None:
    x = blobs(50)
    far = torch.full((2, 1, 8), 1e3)
    (found,) = refine([x], [torch.cat([x[:, :3], far], 1)], 3, OPS)
    assert (found.sizes[:, 3] == 0).all()
    assert torch.equal(found.centroids[:, 3:], far)


def test_iterations_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="iterations is 0; accepted: 1 or more"):
        refine([blobs(5)], [blobs(2)], 0, OPS)


@pytest.mark.parametrize("C", [1, 7, 100])
def test_random_tokens_are_different_tokens_of_their_own_head(C: int) -> None:
    x = torch.arange(200, dtype=torch.float32).view(2, 100, 1)
    drawn = random_tokens(x, C, (1, 2), 100)[..., 0]
    for h in range(2):
        assert len(set(drawn[h].tolist())) == C
        assert set(drawn[h].tolist()) <= set(x[h, :, 0].tolist())


def test_random_tokens_follow_the_models_number_of_a_head() -> None:
    x = torch.randn(5, 100, 1)
    whole = random_tokens(x, 20, (1, 2), 100)
    assert torch.equal(random_tokens(x[2:], 20, (1, 2), 100, first_head=2), whole[2:])


def test_random_tokens_follow_the_key_and_are_spread_evenly() -> None:
    x = torch.arange(1000, dtype=torch.float32).view(1, 1000, 1)
    a, b = random_tokens(x, 50, (3, 1), 1000), random_tokens(x, 50, (3, 2), 1000)
    assert torch.equal(a, random_tokens(x, 50, (3, 1), 1000))
    assert not torch.equal(a, b)
    means = torch.stack([random_tokens(x, 50, (3, i), 1000).mean() for i in range(40)])
    # The mean of 50 of 0 .. 999 has standard deviation 39.7, that of 40 such means 6.3.
    assert abs(means.mean() - 499.5) < 4 * 6.3


def test_more_clusters_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="C is 6; accepted: 1 .. 5, the tokens"):
        random_tokens(blobs(5), 6, (0,), 5)


def _global_kmeans(rank: int, world: int, folder: Path, N: int) -> None:
    # The last shard is shorter: token counts need not divide.
    x, n = blobs(N), -(-N // world)
    mine = x[:, rank * n : (rank + 1) * n]
    start = random_tokens(mine, 6, (5, 1), N, first=rank * n, group=dist.group.WORLD)
    q, k = refine([mine, 2 * mine], [start, 2 * start], 5, OPS, dist.group.WORLD)
    torch.save({"start": start, "q": tuple(q[:3]), "k": tuple(k[:3])}, folder / f"{rank}.pt")


@pytest.mark.parametrize(("world", "N"), [(2, 100), (3, 257)])
def test_shards_cluster_as_one_and_agree_bit_for_bit(
    spawn: Callable[..., None], world: int, N: int, tmp_path: Path
) -> None:
    spawn(world, _global_kmeans, tmp_path, N)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    x = blobs(N)
    start = random_tokens(x, 6, (5, 1), N)
    (whole,) = refine([x], [start], 5, OPS)
    for found in ranks:
        assert torch.equal(found["start"], start)
        for side in ("q", "k"):
            assert torch.equal(found[side][1], ranks[0][side][1])
            assert torch.equal(found[side][2], ranks[0][side][2])
    labels, centroids, sizes = ranks[0]["q"]
    torch.testing.assert_close(centroids, whole.centroids, rtol=1e-5, atol=1e-5)
    assert torch.equal(sizes, whole.sizes)
    assert torch.equal(torch.cat([found["q"][0] for found in ranks], 1), whole.labels)
    assert labels.shape[1] == -(-N // world)


def run_again(body: Callable[[], None]) -> Callable[[], None]:
    """Stands in for a CUDA graph: the same work at the same places in memory."""
    return body


def flat(found: Refined) -> list[Tensor]:
    clusters = [part for side in found.clusters for part in (*side[:3], *side.permutation)]
    return [*clusters, *found.sums, *([] if found.changed is None else [found.changed])]


def same(a: Refined, b: Refined) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def calls_of(x: Tensor, seed: int) -> dict[str, Any]:
    """Queries and keys of different numbers of clusters, with everything that rides along."""
    starts = [random_tokens(x, C, (seed,), x.shape[1]) for C in (5, 9)]
    before = [torch.full(x.shape[:2], seed, dtype=torch.int32, device=x.device)] * 2
    return {"xs": [x, 2 * x], "starts": starts, "riders": [3 * x], "before": before}


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_recorded_iterations_find_the_same_and_leave_what_they_found(iterations: int) -> None:
    recordings = Recordings(run_again)
    kept = []
    for seed in range(3):
        # Strided, as a transformer's tokens are.
        call = calls_of(blobs(100, seed=seed).transpose(0, 1).contiguous().transpose(0, 1), seed)
        found = refine_with(**call, iterations=iterations, ops=OPS, recordings=recordings)
        kept.append((found, refine_with(**call, iterations=iterations, ops=OPS)))
    assert all(same(found, expected) for found, expected in kept)
    assert not same(kept[0][0], kept[1][0])


def test_each_shape_is_recorded_once_and_much_or_nothing_is_not() -> None:
    made: list[Callable[[], None]] = []

    def record(body: Callable[[], None]) -> Callable[[], None]:
        made.append(body)
        return body

    recordings = Recordings(record, limit_bytes=2 * 100 * 8 * 4)
    for N in (100, 60, 100, 60, 101):
        x, start = blobs(N), blobs(5)
        assert (recordings.begun([x], [start], OPS, 2) is None) == (N == 101)
    assert len(made) == 4
    assert recordings.begun([x[:, :0]], [start], OPS, MANY) is None
    recordings.clear()
    recordings.begun([x[:, :60]], [start], OPS, 2)
    assert len(made) == 6


def test_more_is_recorded_for_many_iterations_and_only_until_there_are_few() -> None:
    made: list[Callable[[], None]] = []

    def record(body: Callable[[], None]) -> Callable[[], None]:
        made.append(body)
        return body

    size = 2 * 100 * 8 * 4
    recordings = Recordings(record, limit_bytes=size, limit_bytes_of_many=2 * size)
    small, large, huge, start = blobs(100), blobs(200), blobs(201), blobs(5)
    for iterations in (MANY, MANY, 1, MANY - 1):
        for x, within in ((small, True), (large, iterations == MANY), (huge, False)):
            assert (recordings.begun([x], [start], OPS, iterations) is not None) == within
    assert len(made) == 4
    # It was forgotten, the small one was not.
    recordings.begun([large], [start], OPS, MANY)
    recordings.begun([small], [start], OPS, MANY)
    assert len(made) == 6


def test_without_a_gpu_nothing_is_recorded() -> None:
    assert Recordings().begun([blobs(5)], [blobs(2)], OPS, MANY) is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_graphs_find_what_launches_find(backend: str) -> None:
    device = torch.device("cuda")
    ops, recordings = select(backend, device), Recordings()
    kept = []
    for seed in range(3):
        x = blobs(3_001, 3, 128, seed=seed).to(device, torch.bfloat16)
        for iterations in (1, 2, 20):
            call = calls_of(x, seed)
            assert recordings.begun(call["xs"], call["starts"], ops, iterations) is not None
            found = refine_with(**call, iterations=iterations, ops=ops, recordings=recordings)
            kept.append((found, refine_with(**call, iterations=iterations, ops=ops)))
    assert all(same(found, expected) for found, expected in kept)
    assert not same(kept[0][0], kept[1][0])


@pytest.mark.gpu
def test_a_recording_that_is_forgotten_leaves_what_it_found() -> None:
    device = torch.device("cuda")
    ops, recordings = select("auto", device), Recordings(limit_bytes=0)
    kept = []
    for seed, iterations in enumerate((MANY, 2, MANY, 1)):
        call = calls_of(blobs(50_001, 3, 128, seed=seed).to(device, torch.bfloat16), seed)
        found = refine_with(**call, iterations=iterations, ops=ops, recordings=recordings)
        kept.append((found, refine_with(**call, iterations=iterations, ops=ops)))
        # Somebody else's memory, which must not be theirs.
        torch.full((100 << 20,), torch.nan, device=device)
    assert all(same(found, expected) for found, expected in kept)


def _recorded_on_some(rank: int, world: int) -> None:
    # 100 tokens on three ranks: 34, 34 and 32. The last rank alone is within the limit.
    x = blobs(100)[:, rank * 34 : (rank + 1) * 34]
    start = random_tokens(x, 6, (5, 1), 100, first=rank * 34, group=dist.group.WORLD)
    recordings = Recordings(run_again, limit_bytes=2 * 33 * 8 * 4)
    call = {"xs": [x], "starts": [start], "iterations": 5, "ops": OPS, "group": dist.group.WORLD}
    assert (recordings.begun([x], [start], OPS, 5) is not None) == (rank == 2)
    for _ in range(2):
        assert same(refine_with(**call, recordings=recordings), refine_with(**call))


def test_a_rank_that_records_and_one_that_does_not_agree(spawn: Callable[..., None]) -> None:
    spawn(3, _recorded_on_some)


def _reduce(rank: int, world: int) -> None:
    a, b = torch.full((2, 3), rank + 0.5), torch.tensor([rank, 118_800], dtype=torch.int32)
    total, counts = all_reduce_sum([a, b], dist.group.WORLD)
    assert torch.equal(total, torch.full((2, 3), sum(range(world)) + 0.5 * world))
    assert torch.equal(counts, torch.tensor([sum(range(world)), 118_800 * world], dtype=torch.int32))


def test_all_reduce_sums_floats_and_counts_in_one_buffer(spawn: Callable[..., None]) -> None:
    spawn(2, _reduce)


def test_one_rank_returns_early_without_a_group() -> None:
    x = torch.randn(3)
    assert all_reduce_sum([x], None)[0] is x
    assert "MASTER_ADDR" not in os.environ or not dist.is_initialized()
