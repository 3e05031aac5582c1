"""Published models: their configurations are what the parts are made of."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from semvid.parallel.mesh import Mesh
from semvid.runtime.config import AttentionConfig, VideoConfig
from semvid.runtime.models import predicted_memory, published
from semvid.runtime.models.families import facts
from semvid.runtime.models.families.adapters import adapter

# By diffusers 0.42.1 on the meta device.
PARAMETERS = {
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.1-i2v-14b": 16_394_878_784,
    "wan2.2-t2v-a14b": 14_288_491_584,
    "wan2.2-ti2v-5b": 4_999_787_712,
    "hunyuanvideo": 12_821_012_544,
}
META = torch.device("meta")


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_transformer_has_as_many_parameters_as_the_published_one(name: str) -> None:
    model = published.read(name)
    made = published.build_transformer(model, META, torch.bfloat16)
    assert sum(x.numel() for x in made.parameters()) == PARAMETERS[name]
    assert predicted_memory.parameters(model) == pytest.approx(PARAMETERS[name], rel=3e-3)
    assert len(adapter(model.family).attentions(made)) == model.geometry.layers


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.2-ti2v-5b", "hunyuanvideo"])
def test_vae_and_encoders_have_as_many_as_is_said(name: str) -> None:
    model = published.read(name)
    assert sum(x.numel() for x in published.build_vae(model, META).parameters()) == model.vae_parameters
    for encoder in model.encoders:
        made = published.build_encoder(encoder, META, torch.bfloat16)
        assert sum(x.numel() for x in made.parameters()) == encoder.parameters, encoder.name


def test_tokens_are_those_of_the_papers() -> None:
    video = VideoConfig(height=720, width=1280, frames=81)
    assert published.read("wan2.1-t2v-14b").geometry.tokens(video) == 75_600
    assert published.read("hunyuanvideo").geometry.tokens(VideoConfig(height=720, width=1280, frames=129)) == 118_800
    # 31 x 22 x 40: 32 pixels a token.
    assert published.read("wan2.2-ti2v-5b").geometry.tokens(VideoConfig(height=704, width=1280, frames=121)) == 27_280


def test_weights_are_in_the_precision_that_a_loader_leaves_them_in_and_repeat() -> None:
    model = published.read("toy")
    a, b, c = (published.build_transformer(model, torch.device("cpu"), torch.bfloat16, seed=s) for s in (1, 1, 2))
    assert a.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert a.scale_shift_table.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(a.proj_out.weight, b.proj_out.weight)
    assert not torch.equal(a.proj_out.weight, c.proj_out.weight)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="--model is 'sora'; accepted: hunyuanvideo, toy, toy-joint, wan2.1-i2v-14b"):
        published.read("sora")


def test_a_checkpoint_folder_is_read_without_loading(family_model: Callable[[str], Path]) -> None:
    model = published.of_folder(family_model("wan2.1-i2v-14b"))
    assert model.family == facts.WAN_IMAGE
    assert [encoder.name for encoder in model.encoders] == ["text_encoder", "image_encoder"]
    assert all(encoder.parameters > 1000 for encoder in model.encoders)
    assert model.vae_parameters > 1000


def test_more_ranks_need_less_each_and_branches_apart_keep_half_the_state() -> None:
    model, attention = published.read("wan2.1-t2v-14b"), AttentionConfig()
    video = VideoConfig(height=720, width=1280, frames=81)

    def need(**axes: int) -> predicted_memory.Need:
        return predicted_memory.predict(model, video, attention, Mesh(**axes), guided=True)

    one, apart, two, four = need(), need(cfg=2), need(ulysses=2), need(ulysses=4)
    assert one.state == 2 * apart.state
    denoise = [found.phases["denoise"] for found in (one, two, four)]
    assert denoise == sorted(denoise, reverse=True)
    # On two ranks each has half of the tokens' labels, 2 bytes each for queries and keys, and of every row of a head 18
    # bytes of where it goes; on a ring of two those of the queries and of two hops.
    rows = 2 * 39 * 40 * 37_800
    assert two.state == one.state - 4 * rows + 18 * rows
    assert need(ring=2).state == one.state - 4 * rows + (12 + 2 * 12) * rows
    assert one.weights == four.weights
    assert one.windows == 0 < two.windows
    dense = predicted_memory.predict(model, video, AttentionConfig(method="dense"), Mesh(), guided=True)
    assert dense.state == 0


def test_whether_a_vae_decodes_in_tiles_follows_from_the_size_alone() -> None:
    wan, hunyuan = published.read("wan2.1-t2v-14b"), published.read("hunyuanvideo")
    assert not predicted_memory.is_tiled(wan.vae, 81, 720, 1280)
    assert predicted_memory.is_tiled(hunyuan.vae, 129, 720, 1280)
    assert not predicted_memory.is_tiled(hunyuan.vae, 9, 80, 80)
