"""Blocks with their steps in one pass each: diffusers' own blocks, to rounding, of every kind and inside every hook."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from semvid.kernels.dispatch import select
from semvid.runtime import load_pipeline, sparsify
from semvid.runtime.config import Config
from semvid.runtime.layers.fp8_linears import quantize_linears
from semvid.runtime.layers.fused_blocks import fuse, unfuse
from semvid.runtime.models.families.facts import HUNYUAN, WAN

HEADS, D = 2, 16
C = HEADS * D


def wan(**sizes: Any) -> tuple[Any, tuple[Any, ...]]:
    block = WanTransformerBlock(C, 48, HEADS, **{"cross_attn_norm": True, **sizes})
    angles = torch.randn(2, 1, 7, 1, D)
    return block, (torch.randn(2, 7, C), torch.randn(2, 5, C), torch.randn(2, 6, C), (angles[0], angles[1]))


def wan_per_token() -> tuple[Any, tuple[Any, ...]]:
    block, (hidden, text, _, rotary) = wan()
    return block, (hidden, text, torch.randn(2, 7, 6, C), rotary)


def hunyuan(kind: Callable[..., Any]) -> tuple[Any, tuple[Any, ...]]:
    angles = torch.randn(2, 7, D)
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    hidden = torch.randn(2, 7, C), torch.randn(2, 5, C), torch.randn(2, C)
    return kind(HEADS, D, mlp_ratio=2.0), (*hidden, mask, (angles[0], angles[1]))


KINDS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "wan": wan,
    "wan without a norm before cross-attention": lambda: wan(cross_attn_norm=False),
    "wan 2.2 5B": wan_per_token,
    "hunyuan double": lambda: hunyuan(HunyuanVideoTransformerBlock),
    "hunyuan single": lambda: hunyuan(HunyuanVideoSingleTransformerBlock),
}


@pytest.fixture(params=KINDS)
def block(request: pytest.FixtureRequest) -> tuple[Any, tuple[Any, ...]]:
    torch.manual_seed(0)
    made, inputs = KINDS[request.param]()
    for parameter in made.parameters():
        # Norms' weights and biases too, which begin as 1 and 0.
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False), inputs


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_fused_block_is_diffusers_block(
    block: tuple[Any, tuple[Any, ...]], backend: str, device: torch.device
) -> None:
    made, inputs = block[0].to(device), moved(block[1], device)
    expected = made(*inputs)
    fuse([made], select(backend, device))
    assert "forward" in vars(made)
    torch.testing.assert_close(made(*inputs), expected, rtol=2e-5, atol=2e-5)
    unfuse([made])
    again = made(*inputs)
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (again, expected)), strict=True):
        assert torch.equal(one, other)


def moved(inputs: Any, device: torch.device) -> Any:
    """Tensors in tuples, on a device."""
    return inputs.to(device) if isinstance(inputs, torch.Tensor) else tuple(moved(x, device) for x in inputs)


def test_in_bf16_it_errs_no_more_than_diffusers_block(block: tuple[Any, tuple[Any, ...]]) -> None:
    made, inputs = block
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    exact = first(made(*inputs))
    made.bfloat16()
    low = tuple(x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
    stock = first(made(*low))
    fuse([made], select("reference", torch.device("cpu")))
    fused = first(made(*low))
    assert fused.dtype == torch.bfloat16
    assert (fused.float() - exact).norm() <= 1.1 * (stock.float() - exact).norm()


def test_blocks_that_nobody_knows_and_hooked_ones_are_left_alone() -> None:
    linear = torch.nn.Linear(2, 2)
    block, _ = wan()
    block.forward = own = lambda *args: None
    fuse([linear, block], select("reference", torch.device("cpu")))
    assert "forward" not in vars(linear)
    assert block.forward is own
    unfuse([linear, block])
    assert block.forward is own


def test_dense_attention_leaves_diffusers_blocks(family_config: Callable[..., Config]) -> None:
    config = family_config("wan2.1-t2v-1.3b", {"method": "dense"})
    pipeline = load_pipeline(Path(config.model.path), config.model)
    sparsify(pipeline, attention=config.attention)
    assert not any("forward" in vars(block) for block in pipeline.transformer.blocks)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_goes_into_layers_in_fp8_alone_is_normed_into_fp8(
    block: tuple[Any, tuple[Any, ...]], backend: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    made, inputs = block[0].to(device), moved(block[1], device)
    ops, normed = select(backend, device), []

    def apart(*args: Any) -> Any:
        normed.append(args[0].shape)
        total, rows = ops.add_norm(*args)
        return total, ops.quantize_rows(rows)

    kind = request.node.callspec.params["block"]
    quantize_linears([made], (WAN if kind.startswith("wan") else HUNYUAN).heavy, ops)
    fuse([made], ops._replace(add_norm8=apart))
    expected = made(*inputs)
    unfuse([made])
    fuse([made], ops)
    found = made(*inputs)
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
        assert torch.equal(one, other)
    # For queries, keys and values; for those queries of cross-attention; for the feed-forward, of two the video's.
    expected_count = {"wan without a norm before cross-attention": 2, "hunyuan double": 1, "hunyuan single": 0}
    assert len(normed) == expected_count.get(kind, 3)
