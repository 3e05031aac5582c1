"""diffusers' step caches with our attention: what stock diffusers makes with the same cache, and what is refused."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks, connect
from semvid.runtime import load_pipeline, sparsify
from semvid.runtime.config import Config, VideoConfig
from semvid.runtime.jobs import denoise
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.generate import generate
from semvid.runtime.models.folder import locate

Make = Callable[..., Config]
Stock = Callable[[Any, VideoConfig], Tensor]
STEPS = 6
EXACT = {"p": 1.0, "dense_steps": 0.0, "dense_layers": 0}
WAN, HUNYUAN = "wan2.1-t2v-1.3b", "hunyuanvideo"
TAYLOR = {"cache_interval": 2, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
# Each skips something in these few steps; `CALLS` counts what is left.
CACHES: dict[str, Callable[[Any], Any]] = {
    "first block": lambda _: diffusers.FirstBlockCacheConfig(threshold=1e9),
    "magnitudes": lambda _: diffusers.MagCacheConfig(
        threshold=1e9, max_skip_steps=1, retention_ratio=0.3, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
    "taylor": lambda _: diffusers.TaylorSeerCacheConfig(**TAYLOR, cache_identifiers=[r".*blocks\.\d+\.attn1?"]),
    "taylor lite": lambda _: diffusers.TaylorSeerCacheConfig(**TAYLOR, use_lite_mode=True),
    "sea": lambda _: diffusers.SeaCacheConfig(),
    "pyramid": lambda pipeline: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 999),
        current_timestep_callback=lambda: pipeline._current_timestep,
    ),
    "faster": lambda pipeline: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 950),
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipeline._current_timestep,
    ),
}
# Self-attention calls that are left: of 6 steps, 2 branches and 3 layers; of 6 steps and 4 layers.
CALLS = {
    (WAN, "first block"): 16,
    (WAN, "magnitudes"): 24,
    (WAN, "taylor"): 24,
    (WAN, "taylor lite"): 24,
    (WAN, "sea"): 30,
    (HUNYUAN, "first block"): 9,
    (HUNYUAN, "magnitudes"): 16,
    (HUNYUAN, "taylor"): 16,
    (HUNYUAN, "taylor lite"): 16,
    (HUNYUAN, "pyramid"): 12,
    (HUNYUAN, "faster"): 16,
}
LAYERS = {WAN: 2 * 3, HUNYUAN: 4}


def load(config: Config) -> Any:
    return load_pipeline(Path(config.model.path), config.model)


def cached(pipeline: Any, cache: str) -> Any:
    pipeline.transformer.enable_cache(CACHES[cache](pipeline))
    return pipeline


@pytest.mark.parametrize(("name", "cache"), CALLS)
def test_with_everything_selected_it_is_stock_diffusers_with_the_same_cache(
    name: str, cache: str, family_config: Make, stock: Stock
) -> None:
    config = family_config(name, EXACT, steps=STEPS)
    plain = stock(load(config), config.video)
    expected = stock(cached(load(config), cache), config.video)
    assert (expected - plain).abs().max() > 1e-3, "the cache acts"
    for first in ("cache", "semvid"):
        pipeline = load(config)
        if first == "cache":
            cached(pipeline, cache)
        handle = sparsify(pipeline, attention=config.attention)
        if first == "semvid":
            cached(pipeline, cache)
        found = stock(pipeline, config.video)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=first)
        assert handle.density().sparse_calls == CALLS[name, cache], first
        # A second video begins anew, in the cache and in ours.
        assert torch.equal(stock(pipeline, config.video), found), first
        handle.remove()
        assert torch.equal(stock(pipeline, config.video), expected), f"{first}: the cache stays as it was"
        pipeline.transformer.disable_cache()
        assert torch.equal(stock(pipeline, config.video), plain), first


@pytest.mark.parametrize(("name", "cache"), CALLS)
def test_what_runs_is_sparse_and_its_clusters_are_as_young_as_without_a_cache(
    name: str, cache: str, family_config: Make, stock: Stock
) -> None:
    config = family_config(name, {"p": 0.4, "floor": 0.0, "dense_steps": 0.0, "refresh_every": 2}, steps=STEPS)
    expected = stock(cached(load(config), cache), config.video)
    pipeline = cached(load(config), cache)
    handle = sparsify(pipeline, attention=config.attention)
    ages: list[int] = []

    def probe(layer: int, *tensors: Any) -> None:
        ages.append(handle.session.here().step - tensors[-1].step)

    handle.session.probe = probe
    found = stock(pipeline, config.video)
    assert (found - expected).abs().max() > 1e-4, "our attention is not passed over"
    assert handle.density().sparse < 1
    assert len(ages) == handle.density().sparse_calls < STEPS * LAYERS[name]
    assert max(ages) <= 1


@pytest.mark.parametrize("first", ["cache", "semvid"])
@pytest.mark.parametrize("cache", ["pyramid", "faster"])
def test_a_cache_that_mixes_branches_is_refused_before_the_first_pass(
    cache: str, first: str, family_config: Make, stock: Stock
) -> None:
    config = family_config(WAN, steps=STEPS)
    pipeline = load(config)
    block = pipeline.transformer.blocks[0]
    block.register_forward_pre_hook(lambda *_: pytest.fail("a block ran"))
    refusal = pytest.raises(ValueError, match=r"step cache is .* mixes the two branches of Wan 2.1.*; accepted: First")
    if first == "cache":
        cached(pipeline, cache)
        with refusal:
            sparsify(pipeline, attention=config.attention)
        assert "forward" not in vars(block), "the pipeline is as it was"
    else:
        sparsify(pipeline, attention=config.attention)
        cached(pipeline, cache)
        with refusal:
            stock(pipeline, config.video)


def test_stock_diffusers_mixes_them(family_config: Make) -> None:
    # Why they are refused. Where this fails diffusers keeps a state for each branch, and they can be accepted.
    config = family_config(WAN, steps=STEPS)
    pipeline = cached(load(config), "pyramid")
    attention = pipeline.transformer.blocks[0].attn1
    pipeline._current_timestep = 500
    cond, uncond = torch.randn(2, 1, 4, 32)
    angles = torch.randn(2, 1, 4, 1, 16)
    outs = []
    for branch, x in (("cond", cond), ("uncond", uncond)):
        with pipeline.transformer.cache_context(branch):
            outs.append(attention(x, None, None, (angles[0], angles[1])))
    assert torch.equal(outs[0], outs[1])


def test_taylor_series_of_no_layer_are_refused(family_config: Make) -> None:
    # diffusers' default patterns end before the number in Wan's "attn1".
    config = family_config(WAN)
    pipeline = load(config)
    pipeline.transformer.enable_cache(diffusers.TaylorSeerCacheConfig())
    with pytest.raises(ValueError, match=r"cache_identifiers match no layer of Wan 2.1.*accepted: such as \['blocks"):
        sparsify(pipeline, attention=config.attention)


def test_a_job_that_writes_checkpoints_refuses_a_cache(family_config: Make, tmp_path: Path) -> None:
    config = family_config(WAN)
    assert config.job.checkpoint_steps > 0
    pipeline = cached(load(config), "magnitudes")
    with pytest.raises(ValueError, match="MagCache, whose state no checkpoint holds; accepted: none, or job.check"):
        generate(jobs.create(tmp_path / "job", config), pipeline=pipeline)
    without = dataclasses.replace(config, job=dataclasses.replace(config.job, checkpoint_steps=0))
    assert generate(jobs.create(tmp_path / "other", without), pipeline=pipeline) is not None


def _equals_one_process(rank: int, world: int, configs: dict[str, Config]) -> None:
    ranks = connect(Mesh(ulysses=world))
    for (name, config), cache in itertools.product(configs.items(), ["magnitudes", "taylor", "taylor lite"]):
        expected = latents(cached(load_pipeline(locate(config.model.path), config.model), cache), config, Ranks())
        pipeline = cached(load_pipeline(locate(config.model.path), config.model), cache)
        torch.testing.assert_close(
            latents(pipeline, config, ranks), expected, rtol=1e-4, atol=1e-4, msg=f"{name} {cache}"
        )


def latents(pipeline: Any, config: Config, ranks: Ranks) -> Tensor:
    handle = sparsify(pipeline, attention=config.attention, ranks=ranks)
    state = denoise.start(pipeline, config.video, ranks)
    for _ in denoise.steps(pipeline, state):
        pass
    denoise.finish(pipeline)
    assert 0 < handle.density().sparse_calls + handle.density().dense_calls < STEPS * 6
    handle.remove()
    return state.latents


def test_two_processes_with_a_cache_give_the_latents_of_one(spawn: Callable[..., None], family_config: Make) -> None:
    spawn(2, _equals_one_process, {name: family_config(name, EXACT, steps=STEPS) for name in (WAN, HUNYUAN)})


def _refuses(rank: int, world: int, config: Config) -> None:
    ranks, apart = connect(Mesh(ulysses=world)), connect(Mesh(cfg=world))
    for cache in ("first block", "sea"):
        pipeline = cached(load_pipeline(locate(config.model.path), config.model), cache)
        with pytest.raises(
            ValueError, match="each GPU that shares the sequence, or its branches' clusters, decides for itself; acc"
        ):
            sparsify(pipeline, attention=config.attention, ranks=ranks)
        # A branch on each process waits for the other's clusters, if it is sent some.
        together = dataclasses.replace(config.attention, share_branches="yes")
        with pytest.raises(ValueError, match="accepted: MagCache"):
            sparsify(pipeline, attention=together, ranks=apart)
        sparsify(pipeline, attention=dataclasses.replace(together, share_branches="no"), ranks=apart).remove()
    pipeline = load_pipeline(locate(config.model.path), config.model)
    sparsify(pipeline, attention=config.attention, ranks=ranks)
    cached(pipeline, "magnitudes")
    state = denoise.start(pipeline, config.video, ranks)
    with pytest.raises(ValueError, match="MagCache, and was another when the sequence was shared; accepted: enable_ca"):
        next(denoise.steps(pipeline, state))


def test_a_shared_sequence_refuses_caches_that_would_part_its_processes(
    spawn: Callable[..., None], family_config: Make
) -> None:
    spawn(2, _refuses, family_config(WAN, steps=STEPS))
