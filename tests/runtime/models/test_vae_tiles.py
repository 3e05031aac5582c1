"""Tiles of a VAE shared among processes: diffusers' tiled decode, bit for bit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks, connect
from semvid.runtime.config import Config
from semvid.runtime.jobs import denoise
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.generate import Progress, generate
from semvid.runtime.jobs.heartbeat import Pulse
from semvid.runtime.models import load, vae_tiles
from semvid.runtime.models.folder import locate

NAMES = ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b", "hunyuanvideo"]


def tiled(config: Config) -> Any:
    """A pipeline whose VAE has tiles of 4 × 4 latents, a new one after every 3."""
    pipeline = load.load_pipeline(locate(config.model.path), config.model)
    vae, pixels = pipeline.vae, pipeline.vae_scale_factor_spatial
    vae.enable_tiling()
    for side in ("height", "width"):
        setattr(vae, f"tile_sample_min_{side}", 4 * pixels)
        setattr(vae, f"tile_sample_stride_{side}", 3 * pixels)
    if hasattr(vae, "tile_sample_min_num_frames"):
        # Of time too: 3 latent frames, a new one after every 2.
        vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 12, 8
    return pipeline


def sizes(vae: Any) -> dict[tuple[int, int, int], int]:
    """Latents (frames, rows, columns) and how many tiles they are: some for all ranks, for two, for one."""
    many = (4, 3, 7) if hasattr(vae, "tile_sample_min_num_frames") else (2, 5, 7)
    return {many: 6, (1, 5, 3): 2, (2, 4, 4): 1}


class Counter:
    """Counts how often the decoder itself runs."""

    def __init__(self, vae: Any) -> None:
        self.calls = 0
        vae.decoder.mid_block.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1

    def take(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


@torch.no_grad()
def _decodes(rank: int, world: int, meshes: list[Mesh], configs: list[Config]) -> None:
    connected = [connect(mesh) for mesh in meshes]
    for config in configs:
        vae = tiled(config).vae
        counter = Counter(vae)
        for size, number in sizes(vae).items():
            channels = vae.config.get("z_dim") or vae.config["latent_channels"]
            latents = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1))
            expected, a_tile = vae.decode(latents).sample, counter.take() // number
            for ranks in connected:
                beats: list[int] = []
                found = vae_tiles.decode_shared(vae, latents, ranks, partial(beats.append, 1))
                if rank == 0:
                    assert found is not None
                    assert torch.equal(found, expected), (config.model.path, size)
                else:
                    assert found is None
                assert counter.take() == a_tile * len(range(rank, number, world)), "each decodes its own tiles only"
                assert len(beats) == -(-number // world), "on every rank, whether it had a tile in each round or not"


@pytest.mark.parametrize("world", [2, 3])
def test_processes_decode_each_its_tiles_and_the_first_has_all_bits(
    world: int, family_config: Callable[..., Config], spawn: Callable[..., None]
) -> None:
    meshes = [Mesh(ulysses=2), Mesh(cfg=2)] if world == 2 else [Mesh(ring=3)]
    spawn(world, _decodes, meshes, [family_config(name) for name in NAMES])


@pytest.mark.parametrize("before", [False, True])
def test_the_decoder_is_as_it_was_even_after_a_failure(before: bool, family_config: Callable[..., Config]) -> None:
    vae = tiled(family_config("hunyuanvideo")).vae
    if before:
        vae.decoder.forward = own = vae.decoder.forward
    with pytest.raises(ZeroDivisionError):
        vae_tiles.decode_shared(vae, torch.zeros(1, 16, 1, 5, 3), Ranks(), lambda: 1 // 0)
    assert vars(vae.decoder).get("forward") is (own if before else None)


def _makes_a_video(rank: int, world: int, folder: Path) -> None:
    denoise.is_tiled = lambda *_: True
    job, pulse, phases = jobs.load(folder), Pulse(), []

    def watch(progress: Progress) -> None:
        if not progress.seconds:
            phases.append(progress.phase)

    ranks = connect(Mesh(ulysses=world))
    result = generate(job, watch, tiled(job.config), ranks, pulse=pulse)
    assert phases == ["encode", "denoise", "decode", *(["write"] if rank == 0 else [])]
    if result is None:
        assert rank > 0
        return
    assert result.decoded_in_tiles
    alone = tiled(job.config)
    state = denoise.start(alone, job.config.video)
    state.latents = result.latents
    assert (denoise.decode(alone, state) == result.frames).all()


@pytest.mark.parametrize("name", ["wan2.2-ti2v-5b", "hunyuanvideo"])
def test_a_job_of_two_processes_decodes_the_frames_of_one(
    name: str, family_config: Callable[..., Config], spawn: Callable[..., None], tmp_path: Path
) -> None:
    config = family_config(name, steps=2, frames=5, height=64, width=96)
    spawn(2, _makes_a_video, jobs.create(tmp_path / "job", config).folder)
