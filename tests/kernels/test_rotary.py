"""Norm, rotary embedding and the split into heads, against diffusers' own lines and against fp64."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.dispatch import select


def angles(D: int, frames: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines as Wan's transformer makes them, [N, D] each."""
    rope = WanRotaryPosEmbed(D, (1, 1, 1), 1024)
    cosines, sines = rope(torch.zeros(1, 1, frames, rows, columns))
    return cosines[0, :, 0], sines[0, :, 0]


def stock(x: Tensor, weight: Tensor, eps: float, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
    """The lines of diffusers' WanAttnProcessor (0.42.1), then the move to [B·H, N, D]."""
    norm = torch.nn.RMSNorm(len(weight), eps=eps).to(x)
    norm.weight.data = weight
    hidden = norm(x.unflatten(2, (-1, len(weight)))).flatten(2).unflatten(2, (heads, -1))
    x1, x2 = hidden.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosines[None, :, None, 0::2], sines[None, :, None, 1::2]
    out = torch.zeros_like(hidden)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(hidden).transpose(1, 2).flatten(0, 1).detach()


SIZES = [(1, (1, 1, 1), 1, 16), (2, (3, 3, 7), 3, 64), (1, (1, 5, 5), 12, 128)]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "grid", "heads", "D"), [(1, (1, 1, 1), 1, 16), (2, (3, 3, 7), 3, 64), (1, (1, 5, 5), 12, 128)]
)
def test_equals_diffusers_to_rounding(
    backend: str,
    dtype: torch.dtype,
    B: int,
    grid: tuple[int, int, int],
    heads: int,
    D: int,
    per_head: bool,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    cosines, sines = (part.to(device) for part in angles(D, *grid))
    x = (3 * torch.randn(B, len(cosines), heads * D, device=device)).to(dtype)
    weight = (1 + torch.randn(D if per_head else heads * D, device=device)).to(dtype)
    found = select(backend, device).norm_rotary(x, weight, 1e-5, cosines, sines, heads)
    expected = stock(x, weight, 1e-5, cosines, sines, heads)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
        return
    # Triton's interpreter cuts bf16 off where a GPU rounds it: each of the two roundings errs by up to twice as much,
    # and both in the same direction.
    bound = 3 if backend == "triton" and device.type == "cpu" else 1.1
    exact = stock(x.double(), weight.double(), 1e-5, cosines.double(), sines.double(), heads)
    assert (found.double() - exact).norm() <= bound * (expected.double() - exact).norm()
    assert (found.double() - exact).abs().max() <= 1.5 * bound * (expected.double() - exact).abs().max()


def test_a_token_of_zeros_stays_zero(device: torch.device) -> None:
    cosines, sines = (part.to(device) for part in angles(16, 1, 2, 2))
    for backend in ("reference", "triton"):
        ops = select(backend, device)
        found = ops.norm_rotary(
            torch.zeros(1, 4, 32, device=device), torch.ones(32, device=device), 0.01, cosines, sines, 2
        )
        assert torch.equal(found, torch.zeros_like(found))


def test_wrong_shapes_are_refused() -> None:
    cosines, sines = angles(16, 1, 2, 2)
    x, weight = torch.zeros(1, 4, 32), torch.ones(32)
    for args, message in [
        ((x, weight[:8], 1e-5, cosines, sines, 2), r"weight must be \[32\], or \[16\] for a norm of each head"),
        ((x, weight, 1e-5, cosines[:3], sines, 2), r"cosines must be float32 \[4, 16\]"),
        ((x, weight, 1e-5, cosines, sines.half(), 2), "sines must be float32"),
        ((x, weight, 1e-5, cosines, sines, 3), "x is 32 wide; accepted: heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            reference.norm_rotary(*args)


@pytest.mark.gpu
def test_real_size_errs_no_more_than_the_reference_on_sampled_tokens() -> None:
    torch.manual_seed(0)
    cosines, sines = (part.cuda() for part in angles(128, 21, 45, 80))
    x = torch.randn(1, 75_600, 5120, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(5120, device="cuda", dtype=torch.bfloat16)
    found = select("triton", x.device).norm_rotary(x, weight, 1e-6, cosines, sines, 40)
    assert not found.isnan().any()
    pick = torch.randperm(75_600, device="cuda")[:500]
    x, cosines, sines, found = x[:, pick], cosines[pick], sines[pick], found[:, pick].double()
    expected = reference.norm_rotary(x, weight, 1e-6, cosines, sines, 40).double()
    exact = stock(x.double(), weight.double(), 1e-6, cosines.double(), sines.double(), 40)
    assert (found - exact).norm() <= 1.01 * (expected - exact).norm()
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max()
