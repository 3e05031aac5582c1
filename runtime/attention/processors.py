"""diffusers attention processors: Wan's, and what the others share. They alone turn [B, N, H, D] into [B·H, N, D]."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from semvid.parallel.shard import pad
from semvid.runtime.attention.call import decision, dense_attention, sparse_attention
from semvid.runtime.attention.schedule import Dense
from semvid.runtime.attention.session import Session
from semvid.runtime.layers.fp8_linears import apply_all

Rotary = tuple[Tensor, Tensor]


class Processor(Protocol):
    """What diffusers calls for one attention layer."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any: ...


class WanProcessor:
    """Self-attention of one Wan block: sparse, or dense where the schedule says so.

    Dense is the processor that was there, on a shard ours over all shards.
    """

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
        todo, shard = decision(self.session, self.layer), self.session.shard
        if isinstance(todo, Dense):
            self.session.meter.count_dense()
            if shard is None:
                whole: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
                return whole
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("semvid's attention serves self-attention without a mask")
        if rotary_emb is None:
            raise ValueError("rotary_emb is None; accepted: cosines and sines: Wan's self-attention has them")
        q, k, v = project(attn, hidden_states)
        turn = self.session.ops.norm_rotary
        q, k = (fold_turned(norm, x, rotary_emb, turn) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
        v = fold(v.unflatten(2, (attn.heads, -1)))
        if shard is not None:
            # Padding is never clustered, never attended, never counted.
            q, k, v = (x[:, : shard.tokens] for x in (q, k, v))
        if isinstance(todo, Dense):
            heads = dense_attention(q, k, v, self.session)
        else:
            heads = sparse_attention(q, k, v, self.session, self.layer, todo)
        out = pad(unfold(heads, hidden_states.shape[0]), 1, hidden_states.shape[1])
        for module in attn.to_out:
            out = module(out)
        return out


def project(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, keys and values, [B, N, H·D] each."""
    if attn.fused_projections:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        return q, k, v
    q, k, v = apply_all((attn.to_q, attn.to_k, attn.to_v), x)
    return q, k, v


def fold_turned(norm: Any, x: Tensor, rotary_emb: Rotary, norm_rotary: Callable[..., Tensor]) -> Tensor:
    """Returns normed and turned heads, [B·H, N, D], of projected x [B, N, H·D]."""
    cosines, sines = (angles[0, :, 0] for angles in rotary_emb)
    heads = x.shape[-1] // cosines.shape[-1]
    return norm_rotary(x, norm.weight, norm.eps, cosines, sines, heads)


def fold(x: Tensor) -> Tensor:
    """Returns [B, N, H, D] as [B·H, N, D]; a view where B is 1."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, batch: int) -> Tensor:
    """Returns [B·H, N, D] as [B, N, H·D]."""
    unfolded: Tensor = x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
    return unfolded
