"""The transformer on sequence shards: on several gloo ranks it gives what one gives, where attention is left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor, nn

from semvid.kernels.dispatch import select
from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks, connect
from semvid.parallel.shard import Shard
from semvid.runtime import load_pipeline, sparsify
from semvid.runtime.attention.session import Session
from semvid.runtime.config import AttentionConfig, ModelConfig
from semvid.runtime.models.sharding import shard_transformer, unshard_transformer

CPU = torch.device("cpu")


def session_of(ranks: Ranks) -> Session:
    return Session(AttentionConfig(), select("reference", CPU), seed=0, ranks=ranks)


def second_of(degree: int) -> Session:
    """A session that takes itself for the second of so many ranks; it can split, but has nobody to gather from."""
    return session_of(Ranks(Mesh(ulysses=degree), rank=1))


class TokenWise:
    """Stands in for self-attention: each token's value, weighted by its rotary angles and mixed with no other's."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def __call__(self, attn: Any, x: Tensor, _1: None, _2: None, angles: tuple[Tensor, Tensor]) -> Tensor:
        self.inputs.append(x)
        heads = attn.to_v(x).unflatten(2, (attn.heads, -1)) * (angles[0] + 2 * angles[1] + 0.5)
        out: Tensor = attn.to_out[0](heads.flatten(2))
        return out


def tiny_transformer() -> tuple[Any, TokenWise]:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "text_dim": 8}
    model, processor = WanTransformer3DModel(**sizes).eval(), TokenWise()
    for block in model.blocks:
        block.attn1.set_processor(processor)
    return model, processor


def inputs(size: tuple[int, int, int], batch: int, timestep_per_token: bool) -> dict[str, Any]:
    """Latents of `size` tokens (time, height, width), a prompt and a timestep, of each token as Wan 2.2 TI2V has it."""
    T, H, W = size
    generator = torch.Generator().manual_seed(1)
    per_token = torch.randint(1000, (batch, T * H * W), generator=generator)
    return {
        "hidden_states": torch.randn(batch, 16, T, 2 * H, 2 * W, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, 8, generator=generator),
        "timestep": per_token if timestep_per_token else per_token[:, 0],
        "return_dict": False,
    }


@torch.no_grad()
def _equals_one_rank(rank: int, world: int, sizes: list[tuple[int, int, int]]) -> None:
    model, processor = tiny_transformer()
    session = session_of(connect(Mesh(ulysses=world)))
    cases = [inputs(size, batch, each) for size in sizes for batch in (1, 2) for each in (False, True)]
    whole = [model(**case)[0] for case in cases]
    shard_transformer(model, session, model._cp_plan)
    for case, expected in zip(cases, whole, strict=True):
        processor.inputs.clear()
        torch.testing.assert_close(model(**case)[0], expected)
        shard = session.shard
        assert shard == Shard(rank, world, expected[0, 0].numel() // 4)
        for x in processor.inputs:
            assert x.shape[1] == shard.rows
            assert x.isfinite().all()
    unshard_transformer(model, model._cp_plan)
    for case, expected in zip(cases, whole, strict=True):
        assert torch.equal(model(**case)[0], expected)


# Tokens of each rank: 8 7 and 2 1; 7 7 6, and 2 2 0, where the last has padding alone.
@pytest.mark.parametrize(("world", "sizes"), [(2, [(5, 1, 3), (3, 1, 1)]), (3, [(5, 2, 2), (4, 1, 1)])])
def test_shards_of_any_length_give_what_one_rank_gives(
    spawn: Callable[..., None], world: int, sizes: list[tuple[int, int, int]]
) -> None:
    spawn(world, _equals_one_rank, sizes)


class Inner(nn.Module):
    """Keeps what it was called with."""

    def forward(self, x: Any, mask: Tensor | None = None, extra: Tensor | None = None) -> Any:
        self.seen = (x, mask, extra)
        return x, x


class Planned(nn.Module):
    """Four tokens through modules that are called in every way a plan allows."""

    _cp_plan = {  # noqa: RUF012
        "": {"ids": ContextParallelInput(split_dim=0, expected_dims=2)},
        "first": {
            "x": [ContextParallelInput(split_dim=0), ContextParallelInput(split_dim=1)],
            "mask": ContextParallelInput(split_dim=0),
            "extra": ContextParallelInput(split_dim=0),
        },
        "blocks.*": {
            "mask": ContextParallelInput(split_dim=0),
            1: ContextParallelInput(split_dim=0, split_output=True),
        },
        "blocks.*.inner": {"x": ContextParallelInput(split_dim=0)},
        "last": [None, ContextParallelOutput(gather_dim=0)],
    }

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Inner(), Inner()
        self.blocks = nn.ModuleList([Inner(), Inner()])
        for block in self.blocks:
            block.inner = Inner()

    def forward(self, x: Tensor, ids: Tensor) -> list[Any]:
        self.ids = ids
        self.first([x, x[None]], mask=x, extra=None)
        outputs = [block(x, x) for block in self.blocks]
        for block in self.blocks:
            block.inner(x=x)
        return [*outputs, self.last(x)]


def test_a_plan_is_followed_by_name_position_list_and_wildcard() -> None:
    model, x = Planned(), torch.arange(5.0)
    mine = torch.tensor([3.0, 4.0, 0.0])
    shard_transformer(model, second_of(2), model._cp_plan)
    *outputs, (_, _) = model(x, x)
    assert torch.equal(model.ids, x), "one dimension where the plan speaks of two"
    lists, mask, extra = model.first.seen
    assert torch.equal(lists[0], mine)
    assert torch.equal(lists[1], mine[None])
    assert torch.equal(mask, mine)
    assert extra is None
    for block, (untouched, split) in zip(model.blocks, outputs, strict=True):
        assert torch.equal(block.seen[0], x)
        assert torch.equal(block.seen[1], mine)
        assert torch.equal(untouched, x)
        assert torch.equal(split, mine)
        assert torch.equal(block.inner.seen[0], mine)


def test_a_plan_that_splits_another_length_is_refused() -> None:
    model = Planned()
    shard_transformer(model, second_of(2), model._cp_plan)
    with pytest.raises(ValueError, match="dimension 0 has 5 rows, the sequence has 7"):
        model(torch.arange(5.0), torch.zeros(7, 2))


@pytest.fixture
def pipeline(tiny_model: Path) -> Any:
    return load_pipeline(tiny_model, ModelConfig(device="cpu", dtype="fp32"))


def hooks(pipeline: Any) -> int:
    return sum(
        len(module._diffusers_hook.hooks)
        for module in pipeline.transformer.modules()
        if "_diffusers_hook" in vars(module)
    )


def test_sparsify_shards_for_several_ranks_and_remove_unshards(pipeline: Any) -> None:
    ranks = second_of(2).ranks
    handle = sparsify(pipeline, ranks=ranks)
    assert hooks(pipeline) == 1 + 1 + len(pipeline.transformer._cp_plan)
    assert handle.session.ranks is ranks
    handle.remove()
    assert hooks(pipeline) == 0
    sparsify(pipeline)
    assert hooks(pipeline) == 1


def test_a_model_without_a_plan_is_refused_before_anything_is_changed(pipeline: Any) -> None:
    processors = dict(pipeline.transformer.attn_processors)
    pipeline.transformer._cp_plan = None
    with pytest.raises(ValueError, match="WanTransformer3DModel has no _cp_plan: .* accepted: ring=1,ulysses=1"):
        sparsify(pipeline, ranks=second_of(2).ranks)
    assert pipeline.transformer.attn_processors == processors
    sparsify(pipeline)
