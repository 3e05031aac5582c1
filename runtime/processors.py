"""diffusers attention processors, one per model family. They alone turn [B, N, H, D] into [B·H, N, D] and back."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from semvid.runtime.schedule import Dense
from semvid.runtime.session import Session
from semvid.runtime.sparse import decision, sparse_attention

Rotary = tuple[Tensor, Tensor]


class Processor(Protocol):
    """What diffusers calls for one attention layer."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...


class WanProcessor:
    """Self-attention of one Wan block: the processor that was there where the schedule says dense, else sparse."""

    def __init__(self, stock: Processor, session: Session, layer: int) -> None:
        self.stock = stock
        self.session = session
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """Returns the layer's output, [B, N, H·D].

        Args:
            attn: the diffusers WanAttention.
            hidden_states: [B, N, H·D].
            encoder_hidden_states: None: this is self-attention.
            attention_mask: None: Wan masks nothing.
            rotary_emb: cosines and sines, [1, N, 1, D] each.

        Raises:
            ValueError: a mask or another sequence was given.
        """
        todo = decision(self.session, self.layer)
        if isinstance(todo, Dense):
            self.session.meter.count_dense()
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("sparse attention serves self-attention without a mask")
        q, k, v = _project(attn, hidden_states)
        if rotary_emb is not None:
            q, k = _rotate(q, *rotary_emb), _rotate(k, *rotary_emb)
        out = _unfold(sparse_attention(_fold(q), _fold(k), _fold(v), self.session, self.layer, todo), q.shape[0])
        for module in attn.to_out:
            out = module(out)
        return out


def _project(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns normed queries and keys, and values, [B, N, H, D] each."""
    if attn.fused_projections:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (_norm(attn.norm_q, q), _norm(attn.norm_k, k), v))
    return q, k, v


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    normed: Tensor = norm(x)
    return normed


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Returns x with each pair (x1, x2) of channels turned by its token's angle (RoPE), in x's dtype.

    Args:
        x: [B, N, H, D].
        cosines: [1, N, 1, D], each value twice, as diffusers keeps them.
        sines: likewise.
    """
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosines[..., 0::2], sines[..., 1::2]
    return torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).flatten(-2).type_as(x)


def _fold(x: Tensor) -> Tensor:
    """Returns [B, N, H, D] as [B·H, N, D]."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _unfold(x: Tensor, batch: int) -> Tensor:
    """Returns [B·H, N, D] as [B, N, H·D]."""
    unfolded: Tensor = x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
    return unfolded
