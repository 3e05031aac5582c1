"""Residual, gate, norm and modulation in one pass, and rows in FP8: against fp64, plain lines, and each other."""

import pytest
import torch
from torch import Tensor

from semvid.kernels import reference
from semvid.kernels.dispatch import Ops, select
from semvid.kernels.layout import FP8_LARGEST, Rows8

SIZES = [(1, 1, 1), (2, 3, 48), (1, 5, 130)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", "triton"])
def ops(request: pytest.FixtureRequest, device: torch.device) -> Ops:
    return select(request.param, device)


def drawn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values some way from 0, so that a mean left in shows."""
    generator = torch.Generator(device).manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, device=device) + 2).to(dtype)


def assert_rounded(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """found is exact in dtype to about one rounding; Triton's interpreter cuts bf16 off instead of rounding it."""
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    bound = {torch.float32: 20 * eps}.get(dtype, 1.1 * eps)
    torch.testing.assert_close(found.double(), exact, rtol=bound, atol=bound)


@pytest.mark.parametrize("gate_shape", [None, (0,), (1, 1, 0), (-1, 1, 0), (-1, -1, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "N", "C"), SIZES)
def test_a_gated_residual(
    ops: Ops, dtype: torch.dtype, B: int, N: int, C: int, gate_shape: tuple[int, ...] | None, device: torch.device
) -> None:
    x, y = (drawn(B, N, C, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    gate = None if gate_shape is None else spread(gate_shape, B, N, C, device)
    exact = x.double() + y.double() * (1.0 if gate is None else gate.double())
    assert_rounded(ops.add_gated(x, y, gate), exact, dtype)


def spread(shape: tuple[int, ...], B: int, N: int, C: int, device: torch.device) -> Tensor:
    sizes = (B, N, C)[3 - len(shape) :]
    return drawn(*(want if have in (0, -1) else have for have, want in zip(shape, sizes, strict=True)), device=device)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "N", "C"), SIZES)
def test_a_norm_is_of_the_rounded_sum(
    ops: Ops, dtype: torch.dtype, B: int, N: int, C: int, added: bool, device: torch.device
) -> None:
    x, y = (drawn(B, N, C, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    gate, gain, shift = (drawn(B, 1, C, device=device, seed=seed) for seed in (3, 4, 5))
    total, normed = ops.add_norm(x, y if added else None, gate if added else None, gain, shift, 1e-6)
    if added:
        assert_rounded(total, x.double() + y.double() * gate.double(), dtype)
    else:
        assert torch.equal(total, x)
    plain = torch.nn.functional.layer_norm(total.double(), (C,), eps=1e-6)
    assert_rounded(normed, plain * gain.double() + shift.double(), dtype)


def test_a_gain_may_be_of_each_token_and_any_stride(ops: Ops, device: torch.device) -> None:
    table = drawn(2, 3, 6, 48, device=device, seed=7)
    x = drawn(2, 3, 48, device=device)
    gain, shift = table[:, :, 1], table[:, :, 4]
    assert not gain.is_contiguous()
    _, normed = ops.add_norm(x, None, None, gain, shift, 1e-6)
    expected = torch.nn.functional.layer_norm(x.double(), (48,), eps=1e-6) * gain.double() + shift.double()
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_that_are_a_view_are_read_right(ops: Ops, device: torch.device) -> None:
    whole = drawn(2, 7, 48, device=device)
    x, y = whole[:, :3], whole[:, 3:6]
    torch.testing.assert_close(ops.add_gated(x, y), x + y)


def test_a_constant_row_is_its_shift(ops: Ops, device: torch.device) -> None:
    x = torch.full((1, 2, 40), 5.0, device=device)
    gain, shift = drawn(40, device=device), drawn(40, device=device, seed=2)
    _, normed = ops.add_norm(x, None, None, gain, shift, 1e-6)
    assert torch.equal(normed, shift.expand(1, 2, 40))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": (2, 3, 47)}, r"y must be torch.float32 \[2, 3, 48\], not torch.float32 \[2, 3, 47\]"),
        ({"gain": (47,)}, r"gain must be \[48\] or \[1 or 2, 1 or 3, 48\], not \[47\]"),
        ({"shift": (3, 1, 48)}, r"shift must be .*, not \[3, 1, 48\]"),
        ({"gate": (2, 48)}, r"gate must be .*, not \[2, 48\]"),
    ],
)
def test_wrong_shapes_are_refused(
    backend: str, change: dict[str, tuple[int, ...]], message: str, device: torch.device
) -> None:
    shapes = {"x": (2, 3, 48), "y": (2, 3, 48), "gate": (48,), "gain": (48,), "shift": (48,)} | change
    given = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        select(backend, device).add_norm(**given, eps=1e-6)


def test_no_rows_are_no_work(ops: Ops, device: torch.device) -> None:
    empty = torch.empty(1, 0, 48, device=device)
    gain = torch.ones(48, device=device)
    assert ops.add_norm(empty, empty, gain, gain, gain, 1e-6)[1].shape == (1, 0, 48)
    assert ops.add_norm8(empty, empty, gain, gain, gain, 1e-6)[1].scales.shape == (1, 0, 1)
    assert ops.quantize_rows(empty).scales.shape == (1, 0, 1)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (2, 3, 48), (5, 130)])
def test_quantised_rows_err_by_half_a_step(
    ops: Ops, dtype: torch.dtype, shape: tuple[int, ...], gelu: bool, device: torch.device
) -> None:
    x = drawn(*shape, device=device, dtype=dtype) * torch.logspace(-3, 3, shape[-2], device=device).to(dtype)[:, None]
    values, scales = ops.quantize_rows(x, gelu=gelu)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh") if gelu else x.double()
    assert (values.shape, scales.shape) == (x.shape, (*x.shape[:-1], 1))
    torch.testing.assert_close(scales.double() * FP8_LARGEST, exact.abs().amax(-1, keepdim=True), rtol=1e-5, atol=0)
    # e4m3 has 3 bits after the point, and below 2⁻⁶ steps of 2⁻⁹; there Triton's interpreter makes any value of it.
    interpreted = ops.name == "triton" and device.type == "cpu"
    error = (values.double() * scales.double() - exact).abs()
    half_step = torch.maximum(exact.abs() / 16, scales.double() / (64 if interpreted else 1024))
    assert (error <= half_step * 1.001).all()


def test_a_row_of_zeros_stays_zero(ops: Ops, device: torch.device) -> None:
    x = drawn(3, 32, device=device)
    x[1] = 0
    values, scales = ops.quantize_rows(x)
    assert (values[1].float() == 0).all()
    assert scales[1] == 1
    assert torch.isfinite(values.float()).all()


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "N", "C"), SIZES)
def test_a_norm_in_fp8_is_the_norm_in_fp8(
    ops: Ops, dtype: torch.dtype, B: int, N: int, C: int, added: bool, device: torch.device
) -> None:
    x, y = (drawn(B, N, C, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    gate, gain, shift = (drawn(B, 1, C, device=device, seed=seed) for seed in (3, 4, 5))
    given = (x, y if added else None, gate if added else None, gain, shift, 1e-6)
    total, rows = ops.add_norm8(*given)
    expected, normed = ops.add_norm(*given)
    assert torch.equal(total, expected)
    assert rows.shape == x.shape
    for found, part in zip(rows, ops.quantize_rows(normed), strict=True):
        # Bit for bit: FP8 has no comparison everywhere.
        assert torch.equal(found.view(torch.uint8), part.view(torch.uint8))


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_fp8_rows_is_that_of_what_they_mean(ops: Ops, bias: bool, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = reference.quantize_rows(drawn(2, 5, 64, device=device))
    weight = reference.quantize_rows(drawn(32, 64, device=device, seed=2))
    added = drawn(32, device=device, seed=3).to(dtype) if bias else None
    found = ops.linear8(x, weight, added, dtype)
    a, b = (rows.values.double() * rows.scales.double() for rows in (x, weight))
    exact = a @ b.T + (0 if added is None else added.double())
    assert found.shape == (2, 5, 32)
    assert found.dtype == dtype
    assert (found.double() - exact).norm() <= (5e-3 if dtype == torch.bfloat16 else 1e-6) * exact.norm()


@pytest.mark.gpu
def test_fp8_products_at_real_sizes(device: torch.device) -> None:
    ops = select("auto", device)
    x, weight = torch.randn(3000, 5120, device=device).bfloat16(), torch.randn(13824, 5120, device=device).bfloat16()
    rows = ops.quantize_rows(x), ops.quantize_rows(weight)
    found = ops.linear8(*rows, None, torch.bfloat16)
    meant = [part.values.float() * part.scales for part in rows]
    expected = meant[0] @ meant[1].T
    assert (found.float() - expected).norm() <= 5e-3 * expected.norm()
    plain = x.float() @ weight.float().T
    # Two matrices with errors of some 2.6 % each.
    assert (found.float() - plain).norm() <= 0.05 * plain.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("C", [3072, 5120])
def test_a_norm_at_real_sizes(C: int, device: torch.device) -> None:
    x, y = (drawn(1, 7001, C, device=device, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    gate, gain, shift = (drawn(1, 1, C, device=device, seed=seed) for seed in (3, 4, 5))
    found = select("triton", device).add_norm(x, y, gate, gain, shift, 1e-6)
    # Of the sum that was found: where one is rounded otherwise, as products may be added unrounded, so is its norm.
    normed = reference.add_norm(found[0], None, None, gain, shift, 1e-6)[1]
    for one, other in zip(found, (reference.add_gated(x, y, gate), normed), strict=True):
        # One rounding apart at most.
        torch.testing.assert_close(one.float(), other.float(), rtol=2**-7, atol=2**-7)
        assert (one != other).float().mean() < 0.01


def _meant(rows: Rows8) -> Tensor:
    return rows.values.float() * rows.scales


def test_both_backends_agree_on_rows(device: torch.device) -> None:
    x = drawn(4, 48, device=device)
    found, expected = (_meant(select(name, device).quantize_rows(x)) for name in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=0.13, atol=float(found.abs().max()) / 448 / 64)
