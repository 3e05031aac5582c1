"""Attention over video and text tokens together, as HunyuanVideo has it; `prompt` says where the text stands."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from semvid.kernels.dense import dense
from semvid.parallel.shard import Shard, pad
from semvid.runtime.attention.call import decision, dense_attention, sparse_attention
from semvid.runtime.attention.processors import Processor, fold, unfold
from semvid.runtime.attention.prompt import Prompt
from semvid.runtime.attention.schedule import Dense
from semvid.runtime.attention.session import Session
from semvid.runtime.layers.fp8_linears import apply_all

Rotary = tuple[Tensor, Tensor]
# Masks of as many branches are known without asking the device again.
MASKS_KEPT = 2


class JointProcessor:
    """Joint attention of one block, of both streams (double) or of their concatenation (single).

    Dense calls are ours too: stock attention masks the padding of the text, and with a mask PyTorch's fast kernels are
    out; here the padding is left out and there is no mask.
    """

    def __init__(self, stock: Processor, session: Session, layer: int) -> None:
        self.stock = stock
        self.session = session
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the layer's output for the video tokens, [B, n, H·D], and for the text, [B, T, H·D].

        Args:
            attn: the diffusers Attention.
            hidden_states: [B, n, H·D], video tokens.
            encoder_hidden_states: [B, T, H·D], the prompt's tokens and then padding.
            attention_mask: not read: `Session.prompt` says the same without the device.
            image_rotary_emb: cosines and sines, [n, D] each.

        Raises:
            ValueError: there is no rotary embedding.
        """
        if image_rotary_emb is None:
            raise ValueError("image_rotary_emb is None; accepted: cosines and sines: HunyuanVideo's attention has them")
        session, prompt = self.session, self.session.prompt
        assert prompt is not None, "a hook on the transformer finds the prompt"
        rows, text_rows = hidden_states.shape[1], encoder_hidden_states.shape[1]
        n = rows if session.shard is None else session.shard.tokens
        video = project_video(attn, hidden_states, image_rotary_emb, session.ops.norm_rotary)
        text = project_text(attn, encoder_hidden_states)
        # Padding of both is never clustered, never attended, never counted.
        q, k, v = (torch.cat([x[:, :n], y[:, : prompt.own]], dim=1) for x, y in zip(video, text, strict=True))
        heads = self._attend(q, k, v)
        out = unfold(heads, hidden_states.shape[0])
        return project_out(attn, pad(out[:, :n], 1, rows), pad(out[:, n:], 1, text_rows))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        session, todo = self.session, decision(self.session, self.layer)
        if not isinstance(todo, Dense):
            return sparse_attention(q, k, v, session, self.layer, todo)
        session.meter.count_dense()
        return dense(q, k, v) if session.shard is None else dense_attention(q, k, v, session)


class PromptHook(ModelHook):
    """Leaves in the session, before each forward pass, where the prompt's tokens are; waits for the device once."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.known: list[tuple[Tensor, int]] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        # In the order of HunyuanVideoTransformer3DModel.forward.
        mask = kwargs["encoder_attention_mask"] if "encoder_attention_mask" in kwargs else args[3]
        ranks = self.session.ranks
        self.session.prompt = Prompt(self._tokens(mask), Shard(ranks.shard, ranks.mesh.sequence, mask.shape[1]))
        return args, kwargs

    def _tokens(self, mask: Tensor) -> int:
        """Returns how many of the text rows are the prompt's, by the mask [B, T]: they are the first."""
        for seen, tokens in self.known:
            if seen is mask:
                return tokens
        lengths = mask.sum(dim=1, dtype=torch.int32).tolist()
        if len(set(lengths)) > 1:
            raise ValueError(f"the prompts of a batch have {lengths} tokens; accepted: prompts of one length")
        self.known = [(mask, lengths[0]), *self.known][:MASKS_KEPT]
        return int(lengths[0])


def project_video(attn: Any, x: Tensor, rotary: Rotary, norm_rotary: Callable[..., Tensor]) -> list[Tensor]:
    """Returns queries, keys and values of video tokens x [B, n, H·D], normed and turned, [B·H, n, D] each."""
    projected = apply_all((attn.to_q, attn.to_k, attn.to_v), x)
    q, k = (
        norm_rotary(y, norm.weight, norm.eps, *rotary, attn.heads)
        for y, norm in zip(projected, (attn.norm_q, attn.norm_k), strict=False)
    )
    return [q, k, fold(projected[2].unflatten(2, (attn.heads, -1)))]


def project_text(attn: Any, x: Tensor) -> list[Tensor]:
    """Returns queries, keys and values of text tokens x [B, T, H·D], normed; a double block has weights for them."""
    if attn.add_q_proj is None:
        projections, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
    else:
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = (attn.norm_added_q, attn.norm_added_k)
    split = [y.unflatten(2, (attn.heads, -1)) for y in apply_all(projections, x)]
    q, k = (norm(y) for norm, y in zip(norms, split, strict=False))
    return [fold(y) for y in (q, k, split[2])]


def project_out(attn: Any, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both streams through the layer's last projections; a single block has them outside."""
    if getattr(attn, "to_out", None) is not None:
        for module in attn.to_out:
            video = module(video)
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return video, text
