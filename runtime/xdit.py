"""semvid's attention inside xDiT's own Wan runner: xDiT shards and exchanges, each rank clusters for its own heads.

Under xDiT's ulysses a rank sees all tokens of its share of the heads, so clusters and maps are local, and heads are
shared as xDiT shares them: contiguous and unbalanced. `sparsify` with `ranks_of_xfuser()` balances instead.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from semvid.kernels import dispatch
from semvid.parallel.ranks import Ranks
from semvid.parallel.xdit import KEY, WholeAttention, ranks_of_xfuser, register_attention, usp_dense
from semvid.runtime.attention.call import decision, sparse_attention
from semvid.runtime.attention.density import Density
from semvid.runtime.attention.processors import fold, fold_turned, project, unfold
from semvid.runtime.attention.schedule import Dense
from semvid.runtime.attention.session import Session
from semvid.runtime.config import AttentionConfig
from semvid.runtime.models.install import HOOK, PositionHook, check_device, registry_of
from semvid.runtime.settings import resolve


class Registered:
    """semvid's attention in a transformer of xDiT's: reports density, forgets, and takes itself out again."""

    def __init__(self, transformer: Any, session: Session, before: list[Any], unregister: Callable[[], None]) -> None:
        self.transformer = transformer
        self.session = session
        self._before = before
        self._unregister = unregister

    def density(self) -> Density:
        """Returns the densities of the current or last job over the heads and branches of this rank; no collective."""
        return self.session.meter.read()

    def reset(self) -> None:
        """Begins a new job by hand; a new call of the pipeline does it by itself."""
        self.session.reset()

    def remove(self) -> None:
        """Puts the attention back that was there. Doing it again does nothing."""
        if not self._before:
            return
        for block, kwargs in zip(self.transformer.blocks, self._before, strict=True):
            block.attn1.processor.attention_kwargs = kwargs
        registry_of(self.transformer).remove_hook(HOOK, recurse=False)
        self._unregister()
        self._before = []
        self.session.reset()


def register(
    transformer: Any,
    scheduler: Any,
    preset: str = "svg2",
    *,
    attention: AttentionConfig | None = None,
    seed: int = 0,
) -> Registered:
    """Registers semvid's attention with xfuser and puts it into the self-attention of xDiT's Wan transformer.

    After `xFuserModelRunner.initialize` (or after `initialize_runtime_state` in a script of one's own), before the
    first step, on every rank alike: `handle = register(pipe.transformer, pipe.scheduler, preset="svg2")`. The
    pipeline must announce its branches by `cache_context`, as WanPipeline does. Dense steps, layers and cross
    attention are computed by the backend that xfuser had.

    Args:
        transformer: an xFuserWanTransformer3DWrapper of Wan 2.1.
        scheduler: the pipeline's; says which step of how many it is.
        preset: a name (`semvid.runtime.settings.presets`) or a TOML file with [attention].
        attention: the whole setting, instead of a preset.
        seed: of the first centroids.

    Raises:
        ValueError: xfuser can't be used here or is not set up for it (`register_attention`), another transformer,
            one that has semvid's attention already, heads that the ulysses ranks can't share, a setting that is not
            accepted, or branches that share clusters but run on different ranks. Later, from a forward pass: tokens
            that the ranks can't share equally, where xDiT would pad with tokens that it does not mask.
    """
    registry = registry_of(transformer)
    processors = [block.attn1.processor for block in transformer.blocks]
    if not all(hasattr(processor, "attention_kwargs") for processor in processors):
        raise ValueError(f"transformer is a {type(transformer).__name__}; supported: xFuserWanTransformer3DWrapper")
    if registry.get_hook(HOOK) is not None:
        raise ValueError("this transformer has semvid's attention already; remove() that handle first")
    check_device(transformer.device)
    if attention is None:
        attention = resolve(None, {"video": {"prompt": "-"}}, preset=preset).attention
    ranks, heads = ranks_of_xfuser(), transformer.config.num_attention_heads
    if heads % ranks.mesh.ulysses:
        raise ValueError(f"{heads} heads don't divide among xfuser's {ranks.mesh.ulysses} ulysses ranks")
    if attention.share_branches == "yes" and ranks.mesh.cfg > 1:
        accepted = "no where xfuser runs the branches on different ranks, or a cfg degree of 1"
        raise ValueError(f"attention.share_branches is 'yes'; accepted: {accepted}")
    session = Session(attention, dispatch.select(attention.backend, transformer.device), seed)
    session.first_head = ranks.place.ulysses * (heads // ranks.mesh.ulysses)
    unregister = register_attention()
    before = [processor.attention_kwargs for processor in processors]
    for layer, processor in enumerate(processors):
        # In place of what other backends read there: none of it is for this one.
        processor.attention_kwargs = {KEY: _Layer(session, layer)}
    registry.register_hook(_PassHook(session, scheduler, ranks), HOOK)
    return Registered(transformer, session, before, unregister)


class _Layer:
    """Self-attention of one block: sparse, or dense where the schedule says so."""

    def __init__(self, session: Session, layer: int) -> None:
        self.session = session
        self.layer = layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dense: WholeAttention) -> Tensor:
        """Returns attention over all tokens, [B, heads, N, D]; q, k and v likewise."""
        todo = decision(self.session, self.layer)
        if isinstance(todo, Dense):
            self.session.meter.count_dense()
            return dense(q, k, v)
        queries, keys = q.flatten(0, 1).contiguous(), k.flatten(0, 1).contiguous()
        out = sparse_attention(queries, keys, v.flatten(0, 1), self.session, self.layer, todo)
        return out.view(*q.shape)


class _PassHook(PositionHook):
    """Refuses forward passes whose tokens xDiT would pad: it masks nothing, so padding would be attended."""

    def __init__(self, session: Session, scheduler: Any, ranks: Ranks) -> None:
        super().__init__(session, lambda: scheduler)
        self.ranks = ranks

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        tokens, ranks = 1, self.ranks.mesh.sequence
        for size, patch in zip(latents.shape[2:], module.config.patch_size, strict=True):
            tokens *= size // patch
        if tokens % ranks:
            raise ValueError(
                f"this video has {tokens} tokens, which xDiT can't share equally among {ranks} ranks: it pads them and "
                "masks nothing; accepted: another size or number of frames, another ulysses degree, or sparsify"
            )
        return super().pre_forward(module, *args, **kwargs)


class UspProcessor:
    """Self-attention of a Wan block by xfuser's USP, in a transformer that is sharded as ours are: a yardstick."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output, [B, n, H·D], of this rank's tokens; arguments as WanProcessor's.

        Raises:
            ValueError: as `semvid.parallel.xdit.usp_dense`.
        """
        rotary_emb = kwargs["rotary_emb"] if "rotary_emb" in kwargs else args[2]
        shard = self.session.shard
        assert shard is not None, "the transformer is sharded"
        q, k, v = project(attn, hidden_states)
        turn = self.session.ops.norm_rotary
        q, k = (fold_turned(norm, x, rotary_emb, turn) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
        out = unfold(usp_dense(q, k, fold(v.unflatten(2, (attn.heads, -1))), shard.total), hidden_states.shape[0])
        for module in attn.to_out:
            out = module(out)
        return out
