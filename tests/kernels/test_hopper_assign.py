"""`assign` for Hopper against the Triton one. On a CPU: what is refused, and what is handed to the launch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from semvid.kernels import hopper, hopper_assign, kmeans, reference
from semvid.kernels.dispatch import missing
from tests.no_sync import no_sync

DTYPES = [torch.bfloat16, torch.float16]
LAYOUTS = ["packed", "heads inside", "part of a larger one"]


@pytest.fixture
def gpu() -> torch.device:
    """A Hopper GPU, or the test is skipped with the reason."""
    device = torch.device("cuda")
    reason = missing("hopper", device)
    if reason is not None:
        pytest.skip(reason)
    return device


def clustered(H: int, N: int, C: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens around C points, and centroids near these points."""
    points = torch.randn(H, C, D, device=device)
    member = torch.randint(C, (H, N), device=device)
    x = torch.empty(H, N, D, device=device, dtype=dtype)
    for h in range(H):
        x[h] = torch.randn(N, D, device=device).mul_(0.7).add_(points[h][member[h]])
    return x, points.add_(torch.randn(H, C, D, device=device), alpha=0.1)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values [H, N, D] with other strides; what lies around them is NaN."""
    H, N, D = x.shape
    if layout == "heads inside":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "part of a larger one":
        larger = x.new_full((H + 1, N + 3, D + 8), torch.nan)
        larger[:H, 1 : N + 1, 8:] = x
        return larger[:H, 1 : N + 1, 8:]
    return x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 128])
def test_takes_heads_and_tokens_at_any_aligned_stride(D: int, dtype: torch.dtype, layout: str) -> None:
    assert hopper.takes(laid_out(torch.zeros(3, 5, D, dtype=dtype), layout))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 5, 64),
        torch.zeros(2, 5, 32).bfloat16(),
        torch.zeros(2, 5, 80).bfloat16(),
        torch.zeros(2, 5, 256).bfloat16(),
        torch.zeros(2, 0, 64).bfloat16(),
        torch.zeros(0, 5, 64).bfloat16(),
        torch.zeros(2, 64, 5).bfloat16().transpose(1, 2),
        torch.zeros(2, 5, 68).bfloat16()[:, :, :64],
        torch.zeros(2, 5, 72).bfloat16()[:, :, 4:68],
        torch.zeros(2, 324).bfloat16().as_strided((2, 5, 64), (324, 64, 1)),
        torch.zeros(1, 5, 64).bfloat16().expand(2, 5, 64),
    ],
    ids=[
        "fp32",
        "D 32",
        "D 80",
        "D 256",
        "no token",
        "no head",
        "rows not packed",
        "stride of tokens",
        "address",
        "stride of heads",
        "one head for all",
    ],
)
def test_what_tma_cannot_take_goes_to_triton(x: Tensor, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hopper.takes(x)
    asked = []
    monkeypatch.setattr(kmeans, "assign", lambda *inputs: asked.append(inputs))
    centroids = torch.zeros(x.shape[0], 3, x.shape[2])
    hopper_assign.assign(x, centroids)
    assert asked == [(x, centroids)]


def test_wrong_inputs_are_refused_as_by_triton(device: torch.device) -> None:
    x = torch.zeros(2, 5, 64, device=device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"centroids must be float32 \[2, C, 64\], not torch.float32 \[2, 3, 32\]"):
        hopper_assign.assign(x, torch.zeros(2, 3, 32, device=device))
    with pytest.raises(ValueError, match="holds no centroid"):
        hopper_assign.assign(x, torch.zeros(2, 0, 64, device=device))
    with pytest.raises(ValueError, match="x must be a floating"):
        hopper_assign.assign(x[0], torch.zeros(2, 3, 64, device=device))
    with pytest.raises(ValueError, match=r"x is torch.float64; accepted"):
        hopper_assign.assign(x.double(), torch.zeros(2, 3, 64, device=device))


class Recorder:
    """Stands for the kernel and keeps what a launch gave it."""

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        self.grid = grid
        return self

    def __call__(self, *inputs: Any, **constants: Any) -> None:
        self.inputs, self.constants = inputs, constants


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("N", "C", "sms", "items", "tiles"), [(1, 1, 9, 1, 1), (256, 128, 9, 1, 1), (257, 129, 4, 2, 2)]
)
def test_a_launch_covers_every_token_and_centroid(
    N: int, C: int, sms: int, items: int, tiles: int, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton's interpreter rounds to bf16 otherwise than torch.
    x, centroids = clustered(3, N, C, 64, torch.float16, device)
    x = laid_out(x, layout)
    kernel = Recorder()
    monkeypatch.setattr(hopper_assign, "_assign", kernel)
    monkeypatch.setattr(hopper_assign, "num_sms", lambda device: sms)
    labels = hopper_assign.assign(x, centroids)
    x_desc, c_desc, half_norms, out, *counts = kernel.inputs
    assert out is labels
    assert labels.dtype == torch.int32
    assert kernel.grid == (min(sms, 3 * items),)
    assert counts == [N, items, 3 * items, tiles]
    # Heads apart: what a block holds beyond N is zeros, not the next head.
    assert x_desc.base is x
    assert list(x_desc.shape) == [3, N, 64]
    assert tuple(x_desc.strides) == x.stride()
    assert list(c_desc.shape) == [3 * tiles * 128, 64]
    assert torch.equal(c_desc.base.view(3, -1, 64)[:, :C], centroids.half())
    assert bool(half_norms[:, :C].isfinite().all())
    assert bool((half_norms[:, C:] == torch.inf).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("H", "N", "C"),
    [
        (1, 1, 1),
        (3, 63, 1),
        (1, 1, 300),
        (2, 127, 127),
        (5, 128, 128),
        (2, 129, 129),
        (3, 255, 37),
        (1, 256, 256),
        (4, 257, 500),
        (7, 1000, 3),
        # More items than SMs, so that both rings go round: an odd and an even number of tiles.
        (40, 5001, 300),
        (24, 9999, 400),
    ],
)
def test_labels_are_tritons_bit_for_bit(H: int, N: int, C: int, D: int, dtype: torch.dtype, gpu: torch.device) -> None:
    x, centroids = clustered(H, N, C, D, dtype, gpu)
    expected = kmeans.assign(x, centroids)
    for layout in LAYOUTS:
        other = laid_out(x, layout)
        assert hopper.takes(other)
        assert torch.equal(hopper_assign.assign(other, centroids), expected), layout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 9, 200, 1000])
def test_ties_go_to_the_smaller_index(C: int, dtype: torch.dtype, gpu: torch.device) -> None:
    # Small integers: every product and sum is exact; few dimensions differ, so many distances are equal.
    x, centroids = torch.zeros(2, 777, 64, device=gpu, dtype=dtype), torch.zeros(2, C, 64, device=gpu)
    x[..., ::8] = torch.randint(-1, 2, (2, 777, 8), device=gpu).to(dtype)
    centroids[..., ::8] = torch.randint(-1, 2, (2, C, 8), device=gpu).float()
    centroids[:, C // 2 :] = centroids[:, : C - C // 2].clone()
    assert torch.equal(hopper_assign.assign(x, centroids), reference.assign(x, centroids))


@pytest.mark.gpu
def test_padding_never_wins_over_far_centroids(gpu: torch.device) -> None:
    # The zero rows that pad the centroids would be nearest.
    x = torch.randn(1, 63, 64, device=gpu).bfloat16()
    centroids = torch.randn(1, 3, 64, device=gpu).add(50).bfloat16().float()
    assert torch.equal(hopper_assign.assign(x, centroids), reference.assign(x, centroids))


@pytest.mark.gpu
def test_labels_of_broken_tokens_stay_in_range(gpu: torch.device) -> None:
    x, centroids = clustered(1, 100, 5, 64, torch.bfloat16, gpu)
    expected = hopper_assign.assign(x, centroids)
    broken = torch.tensor([3, 7, 9], device=gpu)
    x[0, 3], x[0, 7], x[0, 9] = torch.nan, torch.inf, -torch.inf
    labels = hopper_assign.assign(x, centroids)
    assert 0 <= int(labels.min()) <= int(labels.max()) < 5
    labels[:, broken] = expected[:, broken]
    assert torch.equal(labels, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "N"), [(40, 75600), (24, 118800)])
@pytest.mark.parametrize("C", [300, 1000])
def test_labels_at_real_size_are_tritons_and_repeat(H: int, N: int, C: int, gpu: torch.device) -> None:
    x, centroids = clustered(H, N, C, 128, torch.bfloat16, gpu)
    labels = hopper_assign.assign(x, centroids)
    assert torch.equal(labels, kmeans.assign(x, centroids))
    for _ in range(5):
        assert torch.equal(labels, hopper_assign.assign(x, centroids))
    assert torch.equal(labels, hopper_assign.assign(laid_out(x, "heads inside"), centroids))


@pytest.mark.gpu
def test_addresses_past_two_to_the_31_are_right(gpu: torch.device) -> None:
    x = torch.randn(220, 80_000, 128, device=gpu, dtype=torch.bfloat16)
    centroids = torch.randn(220, 10, 128, device=gpu)
    assert torch.equal(hopper_assign.assign(x, centroids)[-1:], kmeans.assign(x[-1:], centroids[-1:]))


@pytest.mark.gpu
def test_labels_never_wait_for_the_host(gpu: torch.device) -> None:
    x, centroids = clustered(4, 5000, 100, 128, torch.bfloat16, gpu)
    with no_sync():
        labels = hopper_assign.assign(x, centroids)
    assert torch.equal(labels, kmeans.assign(x, centroids))


@pytest.mark.gpu
def test_a_cuda_graph_labels_what_is_in_its_inputs(gpu: torch.device) -> None:
    x, centroids = clustered(4, 5000, 333, 128, torch.bfloat16, gpu)
    hopper_assign.assign(x, centroids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = hopper_assign.assign(x, centroids)
    for _ in range(3):
        other_x, other_centroids = clustered(4, 5000, 333, 128, torch.bfloat16, gpu)
        x.copy_(other_x)
        centroids.copy_(other_centroids)
        graph.replay()
        assert torch.equal(labels, kmeans.assign(x, centroids))
