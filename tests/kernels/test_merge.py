"""merge against the reference, with sides that hold no key."""

import math

import pytest
import torch
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.merge import merge
from tests.no_sync import no_sync


def sides(H: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Returns out_a, lse_a, out_b, lse_b; rows go through: both, only a, only b, neither."""
    g = torch.Generator().manual_seed(N)
    made = [torch.randn(H, N, *d, generator=g) * scale for d, scale in (((D,), 1.0), ((), 9.0)) * 2]
    row = torch.arange(N)
    for out, lse, gone in ((made[0], made[1], row % 4 >= 2), (made[2], made[3], row % 2 == 1)):
        lse[:, gone], out[:, gone] = -math.inf, 0.0
    return [x.to(dtype if x.ndim == 3 else torch.float32).to(device) for x in made]


@pytest.mark.parametrize("N", [1, 63, 100, 257])
@pytest.mark.parametrize("D", [16, 48, 128])
def test_equals_reference(N: int, D: int, device: torch.device) -> None:
    a = sides(2, N, D, torch.float32, device)
    out, lse = merge(*a)
    wanted, wanted_lse = reference.merge(*a)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    a = sides(1, 100, 64, dtype, device)
    out, _ = merge(*a)
    assert out.dtype == dtype
    wanted = reference.merge(a[0].float(), a[1], a[2].float(), a[3])[0]
    # One rounding: a unit in the last place (the interpreter cuts bf16 off), and fp32's own error.
    assert ((out.float() - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-5).all()


def test_a_side_without_keys_has_no_weight(device: torch.device) -> None:
    out_a, lse_a, out_b, lse_b = sides(1, 8, 16, torch.float32, device)
    out_a[:, 2:4] = math.nan
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out[0, 1], out_a[0, 1])
    assert torch.equal(lse[0, 1], lse_a[0, 1])
    assert torch.equal(out[0, 2], out_b[0, 2])
    assert torch.equal(lse[0, 2], lse_b[0, 2])
    assert torch.equal(out[0, 3], torch.zeros_like(out[0, 3]))
    assert lse[0, 3] == -math.inf


def test_halves_of_the_keys_make_the_whole(device: torch.device) -> None:
    q, k, v = torch.randn(3, 2, 40, 32, generator=torch.Generator().manual_seed(0)).to(device)
    s = q @ k.mT
    parts = [
        (torch.softmax(p, -1) @ w, torch.logsumexp(p, -1)) for p, w in ((s[..., :9], v[:, :9]), (s[..., 9:], v[:, 9:]))
    ]
    out, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, torch.softmax(s, -1) @ v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, torch.logsumexp(s, -1), rtol=1e-5, atol=1e-5)


def test_no_rows(device: torch.device) -> None:
    empty, none = torch.zeros(2, 0, 16, device=device), torch.zeros(2, 0, device=device)
    assert merge(empty, none, empty, none)[0].shape == (2, 0, 16)


def test_rejects_sides_that_differ(device: torch.device) -> None:
    out_a, lse_a, out_b, lse_b = sides(1, 8, 16, torch.float32, device)
    with pytest.raises(ValueError, match="out_b must be torch.float32"):
        merge(out_a, lse_a, out_b.half(), lse_b)
    with pytest.raises(ValueError, match=r"lse_b must be fp32 \[1, 8\]"):
        merge(out_a, lse_a, out_b, lse_b[:, :7])
    with pytest.raises(ValueError, match=r"lse_a must be fp32 \[1, 8\]"):
        merge(out_a, lse_a.half(), out_b, lse_b)


@pytest.mark.gpu
def test_real_size_never_waits_for_the_host(device: torch.device) -> None:
    a = [torch.randn(40, 75600, 128, device=device, dtype=torch.bfloat16), torch.randn(40, 75600, device=device)]
    b = [torch.randn_like(a[0]), torch.randn_like(a[1])]
    merge(*a, *b)
    with no_sync():
        out, lse = merge(*a, *b)
    wanted, wanted_lse = reference.merge(a[0][7:8].float(), a[1][7:8], b[0][7:8].float(), b[1][7:8])
    torch.testing.assert_close(out[7:8].float(), wanted, rtol=8e-3, atol=1e-5)
    torch.testing.assert_close(lse[7:8], wanted_lse)
