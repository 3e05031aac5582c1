"""One transformer block with random weights: what a layer costs beside its attention."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from semvid.kernels.dispatch import Ops
from semvid.parallel.shard import pad
from semvid.runtime.attention.processors import fold_turned, project, unfold
from semvid.runtime.layers.fused_blocks import fuse

TEXT_ROWS = 512
# Of Wan's feed-forward layers: 13,824 of 5,120 in the 14B model, 8,960 of 1,536 in the 1.3B one.
FEED_FORWARD = {5120: 13_824, 1536: 8_960}


class _GivenAttention:
    """Projects, norms and turns as the model does, then takes the attention's result from elsewhere."""

    def __init__(self, attention: Callable[[], Tensor], norm_rotary: Callable[..., Tensor]) -> None:
        self.attention = attention
        self.norm_rotary = norm_rotary

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any) -> Tensor:
        rotary_emb = args[2]
        q, k, _ = project(attn, hidden_states)
        for norm, x in ((attn.norm_q, q), (attn.norm_k, k)):
            fold_turned(norm, x, rotary_emb, self.norm_rotary)
        out = pad(unfold(self.attention(), hidden_states.shape[0]), 1, hidden_states.shape[1])
        for module in attn.to_out:
            out = module(out)
        return out


def wan_block(
    heads: int,
    head_dim: int,
    tokens: int,
    like: Tensor,
    attention: Callable[[], Tensor],
    ops: Ops,
    *,
    fused: bool,
) -> Callable[[], Tensor]:
    """Returns a call of one Wan transformer block on random hidden states, [1, tokens, heads · head_dim].

    Everything is computed as in the model; only the result of self-attention is that of `attention`, so that its work
    can be that of realistic queries and keys.

    Args:
        heads: of the model.
        head_dim: D.
        tokens: of this rank.
        like: says device and dtype.
        attention: [heads, tokens, D].
        ops: of the backend.
        fused: whether what stands between its linear layers is done in one pass each, as in a sparse pipeline.
    """
    width = heads * head_dim
    with torch.device(like.device):
        block = WanTransformerBlock(width, FEED_FORWARD.get(width, 4 * width), heads, cross_attn_norm=True).to(
            like.dtype
        )
        hidden = torch.randn(1, tokens, width, dtype=like.dtype)
        text = torch.randn(1, TEXT_ROWS, width, dtype=like.dtype)
        time = torch.randn(1, 6, width)
        angles = torch.randn(2, 1, tokens, 1, head_dim)
    block.requires_grad_(False)
    block.attn1.set_processor(_GivenAttention(attention, ops.norm_rotary))
    if fused:
        fuse([block], ops)
    return lambda: block(hidden, text, time, (angles[0], angles[1]))
