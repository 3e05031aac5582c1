"""semvid's attention inside a real diffusers pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from semvid.runtime import load_pipeline, sparsify
from semvid.runtime.config import AttentionConfig, ModelConfig, VideoConfig
from semvid.runtime.jobs import denoise
from semvid.runtime.models.install import check_device
from semvid.runtime.settings import DEMO_MODEL

SIZE = {"height": 64, "width": 96, "num_frames": 17, "num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture
def pipeline(tiny_model: Path) -> Any:
    return load_pipeline(tiny_model, ModelConfig(device="cpu", dtype="fp32"))


def latents(pipeline: Any, seed: int = 0, **options: Any) -> Tensor:
    """The stock call of a pipeline."""
    generator = torch.Generator().manual_seed(seed)
    result: Tensor = pipeline("a red ball", generator=generator, output_type="latent", **(SIZE | options)).frames
    return result


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_our_loop_with_dense_equals_the_stock_pipeline_bit_for_bit(dtype: Any) -> None:
    demo = load_pipeline(DEMO_MODEL, ModelConfig(device="cpu", dtype=dtype))
    stock = latents(demo, seed=7)
    sparsify(demo, "dense")
    video = VideoConfig(prompt="a red ball", height=64, width=96, frames=17, steps=4, guidance=3.0, seed=7)
    state = denoise.start(demo, video)
    assert list(denoise.steps(demo, state)) == [0, 1, 2, 3]
    assert torch.equal(state.latents, stock)
    frames = denoise.decode(demo, state)
    assert torch.equal(torch.from_numpy(frames), stock_frames(demo, stock))


def stock_frames(pipeline: Any, latents: Tensor) -> Tensor:
    """The stock pipeline's own decoding: zero steps cannot be asked for, so its lines are followed by hand in fp64."""
    config = pipeline.vae.config
    std, mean = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_std, config.latents_mean))
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents * std + mean).sample[0]
    return (pixels.permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).mul(255).round().byte()


def test_no_guidance_runs_one_branch_and_equals_the_stock_pipeline(pipeline: Any) -> None:
    stock = latents(pipeline, guidance_scale=1.0)
    handle = sparsify(pipeline, "dense")
    video = VideoConfig(prompt="a red ball", height=64, width=96, frames=17, steps=4, guidance=1.0)
    state = denoise.start(pipeline, video)
    assert len(list(denoise.steps(pipeline, state))) == 4
    assert torch.equal(state.latents, stock)
    assert handle.density().dense_calls == 3 * 4


def test_everything_selected_equals_dense_through_the_whole_pipeline(pipeline: Any) -> None:
    stock = latents(pipeline)
    handle = sparsify(pipeline, attention=AttentionConfig(p=1.0, dense_steps=0.0, dense_layers=0))
    torch.testing.assert_close(latents(pipeline), stock, rtol=1e-4, atol=1e-4)
    assert (handle.density().sparse_calls, handle.density().sparse) == (3 * 4 * 2, 1.0)


def test_sparse_attention_changes_the_result_and_says_how_dense_it_was(pipeline: Any) -> None:
    stock = latents(pipeline)
    handle = sparsify(pipeline, "svg2")
    assert not torch.equal(latents(pipeline), stock)
    density = handle.density()
    # 4 steps, of which ⌊0.2 · 4⌋ = 0 are dense; the first of 3 layers is; two branches.
    assert (density.sparse_calls, density.dense_calls) == (16, 8)
    assert 0 < density.sparse < 1
    assert handle.kernels == "reference"


def test_two_jobs_in_one_process_give_what_each_gives_alone(pipeline: Any) -> None:
    handle = sparsify(pipeline, "svg2")
    first = latents(pipeline, seed=1)
    calls = handle.density()
    second = latents(pipeline, seed=2)
    assert handle.density().calls == calls.calls
    assert torch.equal(latents(pipeline, seed=1), first)
    assert torch.equal(latents(pipeline, seed=2), second)
    assert not torch.equal(first, second)


def test_a_job_of_another_size_in_between_changes_nothing(pipeline: Any) -> None:
    sparsify(pipeline, "svg2")
    first = latents(pipeline)
    latents(pipeline, height=32, num_frames=5)
    assert torch.equal(latents(pipeline), first)


def test_two_pipelines_do_not_share_settings(tiny_model: Path) -> None:
    model = ModelConfig(device="cpu", dtype="fp32")
    a, b, plain = (load_pipeline(tiny_model, model) for _ in range(3))
    alone = latents(plain)
    ours = sparsify(a, attention=AttentionConfig(p=0.3, dense_steps=0.0))
    theirs = sparsify(b, attention=AttentionConfig(p=0.9, dense_steps=0.0))
    one, two = latents(a), latents(b)
    assert ours.density().sparse < theirs.density().sparse
    assert not torch.equal(one, two)
    assert torch.equal(latents(plain), alone)


def test_removing_puts_the_stock_attention_back(pipeline: Any) -> None:
    stock, processors = latents(pipeline), dict(pipeline.transformer.attn_processors)
    handle = sparsify(pipeline, "svg2")
    with pytest.raises(ValueError, match="sparsified already"):
        sparsify(pipeline, "dense")
    handle.remove()
    handle.remove()
    assert pipeline.transformer.attn_processors == processors
    assert torch.equal(latents(pipeline), stock)
    sparsify(pipeline, "dense").remove()


def test_fused_projections_are_followed(pipeline: Any) -> None:
    sparsify(pipeline, attention=AttentionConfig(p=1.0, dense_steps=0.0, dense_layers=0))
    apart = latents(pipeline)
    for block in pipeline.transformer.blocks:
        block.attn1.fuse_projections()
    torch.testing.assert_close(latents(pipeline), apart, rtol=1e-4, atol=1e-4)


def test_a_batch_of_prompts_is_folded_into_the_heads(pipeline: Any) -> None:
    sparsify(pipeline, attention=AttentionConfig(p=1.0, dense_steps=0.0, dense_layers=0))
    noise = torch.randn(2, 16, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    prompts = ["a red ball", "a blue sky"]
    both = pipeline(prompts, latents=noise, output_type="latent", **SIZE).frames
    for i, prompt in enumerate(prompts):
        alone = pipeline(prompt, latents=noise[i : i + 1], output_type="latent", **SIZE).frames
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_pipeline_on_another_gpu_than_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("cpu", "cuda:0", "cuda"):
        check_device(torch.device(name))
    with pytest.raises(ValueError, match=r"is on cuda:1, and .* is cuda:0; accepted: torch.cuda.set_device\(1\)"):
        check_device(torch.device("cuda:1"))


def test_a_pipeline_that_has_moved_since_is_refused_before_its_first_pass(pipeline: Any) -> None:
    handle = sparsify(pipeline)
    pipeline.transformer.to("meta")
    with pytest.raises(ValueError, match=r"is on meta, and was on cpu when .*; accepted: sparsify after it is"):
        latents(pipeline)
    handle.remove()


def test_a_video_is_decoded_whole_after_one_in_tiles(pipeline: Any) -> None:
    handle = sparsify(pipeline, "dense")
    video = VideoConfig(prompt="a red ball", height=64, width=96, frames=5, steps=1, guidance=1.0)
    state = denoise.start(pipeline, video)
    list(denoise.steps(pipeline, state))
    expected = denoise.decode(pipeline, state)
    pipeline.vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32)
    assert (denoise.decode(pipeline, state) == expected).all()
    handle.remove()


def test_an_unsupported_pipeline_is_refused() -> None:
    with pytest.raises(ValueError, match="pipeline is a object; supported: Wan 2.1"):
        sparsify(object())


@pytest.mark.gpu
def test_the_demo_model_on_a_gpu_runs_dense_and_sparse_and_repeats_itself() -> None:
    exact = latents(load_pipeline(DEMO_MODEL, ModelConfig(device="cuda", dtype="fp32")))
    demo = load_pipeline(DEMO_MODEL, ModelConfig(device="cuda", dtype="bf16"))
    stock = latents(demo)
    handle = sparsify(demo, "dense")
    assert torch.equal(latents(demo), stock)
    handle.remove()
    handle = sparsify(demo, attention=AttentionConfig(p=1.0, dense_steps=0.0, dense_layers=0))
    # Everything selected differs from dense by rounding alone: no more than twice what bf16 itself costs the stock run.
    assert (latents(demo) - exact).norm() < 2 * (stock - exact).norm()
    handle.remove()
    sparsify(demo, "svg2")
    assert torch.equal(latents(demo), latents(demo))
