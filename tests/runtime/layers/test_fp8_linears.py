"""Linear layers in FP8: close to the layers that were, in every family, and refused where they can't be."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from semvid.kernels.dispatch import select
from semvid.launch.cli import main
from semvid.runtime import load_pipeline, sparsify
from semvid.runtime.config import Config
from semvid.runtime.jobs import denoise
from semvid.runtime.layers.fp8_linears import Linear8, apply_all, check_fp8, quantize_linears
from semvid.runtime.models import folder
from semvid.runtime.models.families import facts
from semvid.runtime.models.install import adapter_of

OPS = select("reference", torch.device("cpu"))
Make = Callable[..., Config]
NAMES = ["wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b", "hunyuanvideo"]


def test_a_layer_is_close_to_the_one_that_was() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 64)
    x = torch.randn(3, 50, 256) * torch.logspace(-2, 2, 50)[:, None]
    error = (Linear8(linear, OPS)(x) - linear(x)).norm(dim=-1) / linear(x).norm(dim=-1)
    # Two roundings of 2⁻⁴ at most, of some 2.6 % each in the mean; the bias stays exact. Every token by its own scale.
    assert 0.01 < error.median() < 0.05
    assert error.max() < 0.08


def test_gelu_before_a_layer() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(5, 64)
    expected = linear(nn.functional.gelu(x, approximate="tanh"))
    assert (Linear8(linear, OPS, gelu=True)(x) - expected).norm() < 0.06 * expected.norm()


def test_layers_of_one_input_quantise_it_once() -> None:
    quantised = []

    def counted(x: torch.Tensor, *, gelu: bool = False) -> Any:
        quantised.append(x.shape)
        return OPS.quantize_rows(x, gelu=gelu)

    layers = [Linear8(nn.Linear(32, 16), OPS._replace(quantize_rows=counted)) for _ in range(3)]
    quantised.clear()
    x = torch.randn(4, 32)
    together = apply_all(layers, x)
    assert quantised == [(4, 32)]
    for one, layer in zip(together, layers, strict=True):
        assert torch.equal(one, layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_every_family_runs_with_them(name: str, family_config: Make) -> None:
    config = family_config(name, {"p": 0.5})
    found = []
    for linear in ("same", "fp8"):
        model = type(config.model)(path=config.model.path, dtype="fp32", device="cpu", linear=linear)
        pipeline = load_pipeline(Path(config.model.path), model)
        handle = sparsify(pipeline, attention=config.attention)
        state = denoise.start(pipeline, config.video)
        for _ in denoise.steps(pipeline, state):
            pass
        found.append(state.latents)
        handle.remove()
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_all_heavy_layers_are_replaced_and_no_others(name: str, family_config: Make) -> None:
    config = family_config(name)
    pipeline = load_pipeline(Path(config.model.path), config.model)
    family = adapter_of(pipeline)
    blocks = family.blocks(pipeline.transformer)
    before = {path for path, part in pipeline.transformer.named_modules() if isinstance(part, nn.Linear)}
    count = quantize_linears(blocks, family.facts.heavy, OPS)
    after = {path for path, part in pipeline.transformer.named_modules() if isinstance(part, nn.Linear)}
    # Of Hunyuan's: 6 in a double block, 5 in a single one.
    assert count == len(before - after | {path for path in before if path.endswith(".net.0.proj")} - after)
    assert count == (2 * 6 + 2 * 5 if name == "hunyuanvideo" else 3 * 8)
    assert not any("text" in path or "condition" in path for path in before - after)


def test_sizes_that_the_hardware_has_not_are_refused() -> None:
    block = nn.Module()
    block.proj_mlp = nn.Linear(24, 16)
    with pytest.raises(ValueError, match="model.linear is 'fp8', but proj_mlp is 16 x 24; accepted: multiples of 16"):
        quantize_linears([block], facts.HUNYUAN.heavy, OPS)


def test_a_cpu_takes_any_dtype() -> None:
    check_fp8(torch.device("cpu"), torch.float32)


def test_an_old_gpu_and_another_dtype_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="needs compute capability 8.9 or newer; this GPU has 8.0"):
        check_fp8(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match="'fp8' with float16; accepted: model.dtype bf16"):
        check_fp8(torch.device("cuda"), torch.float16)


def test_shared_weights_are_refused_with_it(tiny_config: Make) -> None:
    config = tiny_config()
    both = replace(config, model=replace(config.model, linear="fp8"), job=replace(config.job, share_weights=True))
    with pytest.raises(ValueError, match="share_weights is True with model.linear 'fp8'; accepted: one of them"):
        folder.check(both, folder.inspect(Path(config.model.path)))


def test_the_command_line_asks_for_it(tmp_path: Path) -> None:
    words = ["run", "a red ball", "--linear", "fp8", "--steps", "2", "--height", "64", "--width", "96", "--frames", "5"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "job")]) == 0
    text = (tmp_path / "job" / "job.toml").read_text()
    assert 'linear = "fp8"' in text


def test_compare_judges_it_by_the_layers_that_were(tmp_path: Path) -> None:
    words = [
        "compare",
        "a red ball",
        "--linear",
        "fp8",
        "--steps",
        "2",
        "--height",
        "64",
        "--width",
        "96",
        "--frames",
        "5",
    ]
    both = ["--preset", "dense", "--against", "dense"]
    assert main([*words, *both, "--device", "cpu", "--dtype", "fp32", "--out", str(tmp_path / "c")]) == 0
    report = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert not report["same_frames"]
    assert 25 < report["mean_psnr"] < 80
    assert 'linear = "same"' in (tmp_path / "c" / "against" / "job.toml").read_text()
