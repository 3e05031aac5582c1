"""Blocks that do what stands between their linear layers in one pass each, as `Ops.add_norm` and `add_gated` do.

A block's own forward is replaced, so that what others hang on blocks (sharding, weights gathered, diffusers' caches)
stays around it. diffusers' lines, one function for each kind of block, with the same arithmetic in fp32.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import Rows8
from semvid.runtime.layers.fp8_linears import takes_rows8

Forward = Callable[..., Any]
"""(block, ops, *args of the block's own forward) -> its result."""


def fuse(blocks: Iterable[Any], ops: Ops) -> None:
    """Replaces the forward of blocks that a function is known for; of the others, and where a hook came first, none.

    Args:
        blocks: of a transformer.
        ops: that do the work.
    """
    for block in blocks:
        # FSDP2 gives a module whose weights are shared a class of its own, under its old one.
        names = [kind.__name__ for kind in type(block).__mro__]
        forward = next((FORWARDS[name] for name in names if name in FORWARDS), None)
        # Where a hook came first it has kept the forward that it found.
        if forward is not None and "forward" not in vars(block):
            block.forward = partial(forward, block, ops)


def unfuse(blocks: Iterable[Any]) -> None:
    """Gives blocks their own forward back, also where hooks have come on top of ours since."""
    for block in blocks:
        if _is_ours(vars(block).get("forward")):
            del block.forward
            continue
        registry = vars(block).get("_diffusers_hook")
        # The first hook has kept the forward that it found, under one of two names.
        for first in () if registry is None else registry._fn_refs[:1]:
            for name in ("forward", "original_forward"):
                if _is_ours(getattr(first, name)):
                    setattr(first, name, MethodType(type(block).forward, block))


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func in FORWARDS.values()


def wan_block(
    block: Any, ops: Ops, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Tensor:
    """Returns hidden states after a Wan block, [B, N, C].

    Args:
        block: the diffusers WanTransformerBlock.
        ops: of the backend.
        hidden_states: [B, N, C].
        encoder_hidden_states: [B, T, C], text.
        temb: [B, 6, C], or with a modulation of every token [B, N, 6, C].
        rotary_emb: cosines and sines.
    """
    hidden, time, table = hidden_states, temb, block.scale_shift_table
    if time.dim() == 4:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (table[None] + time.float()).unbind(2)
    else:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (table + time.float()).split(1, dim=1)
    self_attention, cross_attention = block.attn1, block.attn2
    into = None if self_attention.fused_projections else self_attention.to_q
    _, normed = _add_norm(ops, into, hidden, None, None, 1 + scale, shift, block.norm1.eps)
    attended = self_attention(normed, None, None, rotary_emb)
    if isinstance(block.norm2, torch.nn.Identity):
        hidden = normed = ops.add_gated(hidden, attended, gate)
    else:
        norm = block.norm2
        into = cross_attention.to_q
        hidden, normed = _add_norm(ops, into, hidden, attended, gate, norm.weight, norm.bias, norm.eps)
    attended = cross_attention(normed, encoder_hidden_states, None, None)
    into = block.ffn.net[0]
    hidden, normed = _add_norm(ops, into, hidden, attended, None, 1 + ff_scale, ff_shift, block.norm3.eps)
    return ops.add_gated(hidden, block.ffn(normed), ff_gate)


def hunyuan_double(
    block: Any,
    ops: Ops,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Any = None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Returns both streams after a HunyuanVideo double block, [B, N, C] and [B, T, C].

    Args:
        block: the diffusers HunyuanVideoTransformerBlock.
        ops: of the backend.
        hidden_states: [B, N, C], video.
        encoder_hidden_states: [B, T, C], text.
        temb: [B, C].
        attention_mask: of the text.
        freqs_cis: cosines and sines.
        rest: what other blocks take.
    """
    video, text = _table(block.norm1, temb, 6), _table(block.norm1_context, temb, 6)
    _, normed = ops.add_norm(hidden_states, None, None, 1 + video[1], video[0], block.norm1.norm.eps)
    _, normed_text = ops.add_norm(encoder_hidden_states, None, None, 1 + text[1], text[0], block.norm1_context.norm.eps)
    attended, attended_text = block.attn(
        hidden_states=normed,
        encoder_hidden_states=normed_text,
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )

    def forward(x: Tensor, y: Tensor, table: Sequence[Tensor], norm: Any, ff: Any) -> Tensor:
        _, _, gate, shift, scale, ff_gate = table
        total, normed = _add_norm(ops, ff.net[0], x, y, gate, 1 + scale, shift, norm.eps)
        return ops.add_gated(total, ff(normed), ff_gate)

    return (
        forward(hidden_states, attended, video, block.norm2, block.ff),
        forward(encoder_hidden_states, attended_text, text, block.norm2_context, block.ff_context),
    )


def hunyuan_single(
    block: Any,
    ops: Ops,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Returns both streams after a HunyuanVideo single block, which treats them as one sequence.

    Args:
        block: the diffusers HunyuanVideoSingleTransformerBlock.
        ops: of the backend.
        hidden_states: [B, N, C], video.
        encoder_hidden_states: [B, T, C], text.
        temb: [B, C].
        attention_mask: of the text.
        image_rotary_emb: cosines and sines.
        rest: what other blocks take.
    """
    rows = encoder_hidden_states.shape[1]
    joint = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    shift, scale, gate = _table(block.norm, temb, 3)
    _, normed = ops.add_norm(joint, None, None, 1 + scale, shift, block.norm.norm.eps)
    inner = block.act_mlp(block.proj_mlp(normed))
    attended = block.attn(
        hidden_states=normed[:, :-rows],
        encoder_hidden_states=normed[:, -rows:],
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    out = block.proj_out(torch.cat([torch.cat(attended, dim=1), inner], dim=2))
    joint = ops.add_gated(joint, out, gate)
    return joint[:, :-rows], joint[:, -rows:]


def _add_norm(ops: Ops, into: object, *args: Any) -> tuple[Tensor, Tensor | Rows8]:
    """Returns what `Ops.add_norm` makes of args, its norm in FP8 where the layer that it goes into takes that."""
    return ops.add_norm8(*args) if takes_rows8(into) else ops.add_norm(*args)


def _table(norm: Any, time: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Returns what an AdaLayerNorm modulates with, [B, 1, C] each."""
    table: Tensor = norm.linear(norm.silu(time))[:, None].float()
    return table.chunk(parts, dim=-1)


FORWARDS: dict[str, Forward] = {
    "WanTransformerBlock": wan_block,
    "HunyuanVideoTransformerBlock": hunyuan_double,
    "HunyuanVideoSingleTransformerBlock": hunyuan_single,
}
