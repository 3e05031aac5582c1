"""What a rank counts, and faults that it suffers."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from semvid.parallel.mesh import Mesh
from semvid.parallel.phases import counting, phase
from semvid.parallel.ranks import connect
from semvid.runtime.jobs import denoise
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.generate import Progress, generate
from semvid.runtime.jobs.heartbeat import BOARD_BYTES, Fault, Pulse, Seen, read_board
from semvid.runtime.jobs.heartbeat_hooks import beating
from semvid.runtime.models import folder, load

FAMILIES = ["wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b", "hunyuanvideo"]


def test_a_fault_comes_as_often_as_it_says_over_all_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(Exception):
        pass

    def kill(pid: int, number: int) -> None:
        raise KilledError

    monkeypatch.setattr(os, "kill", kill)
    fault = Fault(action="kill", point="write", rank=1, step=2, times=2)

    def life(rank: int, step: int, point: str) -> None:
        Pulse(None, rank, [fault], tmp_path, step).beat(point)

    life(0, 2, "write")
    life(1, 1, "write")
    life(1, 2, "decode")
    for _ in range(2):
        with pytest.raises(KilledError):
            life(1, 2, "write")
    life(1, 2, "write")


def test_a_board_shows_counts_and_the_last_point() -> None:
    board = bytearray(2 * BOARD_BYTES)
    pulse = Pulse(memoryview(board)[BOARD_BYTES:])
    assert read_board(board, 1) == Seen((0, 0, 0, 0), "")
    pulse.beat("load")
    pulse.beat("block")
    pulse.beat_of_meeting()
    pulse.beat_of_device(3)
    pulse.beat_of_writer()
    for _ in range(2):
        pulse.beat_of_part()
    assert read_board(board, 1) == pulse.seen() == Seen((3, 3, 1, 2), "block")
    assert read_board(board, 1).progress == (3, 2)
    pulse.beat_alone("a name that is longer than its place on the board")
    assert read_board(board, 1) == Seen((3, 3, 2, 2), "a name that is longer than its p")
    assert read_board(board, 0) == Seen((0, 0, 0, 0), "")


class Pipeline:
    """Three models with blocks in lists, one of them nested; a part that is no model, and one that is not loaded."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        inner = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        outer = torch.nn.Module()
        outer.inner = inner  # type: ignore[assignment]
        outer.forward = lambda x: inner[1](inner[0](x))  # type: ignore[method-assign]
        self.text_encoder, self.transformer, self.vae = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
        self.text_encoder.block = torch.nn.ModuleList([torch.nn.Linear(2, 2)])  # type: ignore[assignment]
        self.transformer.blocks = torch.nn.ModuleList([outer])  # type: ignore[assignment]
        self.vae.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])  # type: ignore[assignment]
        models = {"text_encoder": self.text_encoder, "transformer": self.transformer, "vae": self.vae}
        self.components = {"tokenizer": object(), "image_encoder": None, **models}


def test_every_block_and_phase_counts_inside_and_none_after() -> None:
    pipeline: Any = Pipeline()
    passed: list[str] = []

    class Noting(Pulse):
        def reach(self, point: str) -> None:
            passed.append(point)

    def run() -> None:
        x = torch.zeros(1, 2)
        pipeline.text_encoder.block[0](x)
        pipeline.transformer.blocks[0](x)
        with phase("exchange"):
            pass
        pipeline.vae.layers[0](x)

    with beating(pipeline, Noting()):
        run()
    assert passed == ["encode", "block", "block", "block", "exchange", "decode"]
    run()
    assert len(passed) == 6


def test_what_a_whole_job_counts_goes_on_from_its_start_to_its_last_frame(tiny_config: Any, tmp_path: Path) -> None:
    passed: list[str] = []

    class Noting(Pulse):
        def reach(self, point: str) -> None:
            passed.append(point)

    generate(jobs.create(tmp_path / "job", tiny_config(steps=3, frames=5)), pulse=Noting())
    kinds = list(dict.fromkeys(passed))
    assert [kind for kind in kinds if kind in ("load", "encode", "denoise", "step", "decode", "write")] == [
        *("load", "encode", "denoise", "step", "decode", "write")
    ]
    # As many a step, a branch and a block, for the lists inside a block; and one a frame.
    assert passed.count("block") % (3 * 2 * 3) == 0 < passed.count("block")
    assert passed.count("write") == 5 + 1
    assert {"cluster", "attend", "pack", "map"} <= set(kinds)


class Placing(Pulse):
    """Notes each point with the phase and the steps done where it was passed."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.passed: list[tuple[str, int, str]] = []

    def watch(self, progress: Progress) -> None:
        self.phase = progress.phase

    def reach(self, point: str) -> None:
        self.passed.append((self.phase, self.step, point))

    def points(self, phase: str) -> set[str]:
        return {point for at, _, point in self.passed if at == phase}

    def count(self, phase: str, point: str) -> int:
        return sum((at, found) == (phase, point) for at, _, found in self.passed)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_of_a_family_counts_in_its_own_phase(name: str, family_config: Any, tmp_path: Path) -> None:
    video = {"boundary": 0.5} if name == "wan2.2-t2v-a14b" else {}
    pulse = Placing()
    generate(jobs.create(tmp_path / "job", family_config(name, **video)), pulse.watch, pulse=pulse)
    # A video that begins with an image has the VAE's encoder beat, which is no decoding.
    assert pulse.points("encode") == {"encode"}
    assert pulse.count("encode", "encode") > 1
    assert pulse.points("denoise") >= {"denoise", "block", "step", "cluster"}
    assert not pulse.points("denoise") & {"encode", "decode"}
    # Every step runs as many blocks, also those of a second transformer.
    blocks = [sum(found == ("denoise", step, "block") for found in pulse.passed) for step in range(4)]
    assert len(set(blocks)) == 1 <= blocks[0]
    assert pulse.points("decode") == {"decode"}
    assert pulse.count("decode", "decode") > 1


def _counts_alike(rank: int, world: int, folders: list[Path], mesh: Mesh) -> None:
    ranks = connect(mesh)
    for place in folders:
        pulse = Pulse()

        def watch(progress: Progress, pulse: Pulse = pulse) -> None:
            if progress.phase == "denoise":
                count = pulse.counts[0]
                most, least = ranks.largest([count, -count], torch.device("cpu"))
                assert most == -least, "one that hangs is known by the least count"

        with counting(pulse.beat_of_meeting):
            generate(jobs.load(place), watch, ranks=ranks, pulse=pulse)
        assert (pulse.counts[2] > 0) == (rank == 0)


def test_ranks_count_alike_though_the_first_alone_encodes(family_config: Any, tmp_path: Path, spawn: Any) -> None:
    made = [family_config(name, steps=2) for name in ("wan2.1-i2v-14b", "hunyuanvideo")]
    folders = [jobs.create(tmp_path / str(n), config).folder for n, config in enumerate(made)]
    spawn(2, _counts_alike, folders, Mesh(ulysses=2))


@pytest.mark.parametrize("mesh", [Mesh(cfg=2, ring=2), Mesh(ring=2, ulysses=2)], ids=str)
def test_ranks_count_alike_on_every_axis(mesh: Mesh, tiny_config: Any, tmp_path: Path, spawn: Any) -> None:
    spawn(mesh.world_size, _counts_alike, [jobs.create(tmp_path / "job", tiny_config(steps=3, frames=9)).folder], mesh)


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "hunyuanvideo"])
def test_every_tile_of_a_video_counts(
    name: str, family_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = family_config(name, steps=2)
    counts = []
    for tiled in (False, True):
        pipeline = load.load_pipeline(folder.locate(config.model.path), config.model)
        for side in ("height", "width"):
            setattr(pipeline.vae, f"tile_sample_min_{side}", 48)
            setattr(pipeline.vae, f"tile_sample_stride_{side}", 32)
        monkeypatch.setattr(denoise, "is_tiled", lambda *_, tiled=tiled: tiled)
        pulse = Placing()
        result = generate(jobs.create(tmp_path / f"job-{tiled}", config), pulse.watch, pipeline, pulse=pulse)
        assert result is not None
        assert result.decoded_in_tiles == tiled
        counts.append(pulse.count("decode", "decode"))
    # 80 × 80 pixels are at least four tiles.
    assert counts[1] - 1 >= 4 * (counts[0] - 1) > 0


@pytest.mark.gpu
def test_a_gpu_counts_the_blocks_that_it_has_finished() -> None:
    import time

    pipeline: Any = Pipeline()
    pipeline.device = torch.device("cuda")
    pipeline.vae.layers.cuda()
    pulse = Pulse()
    with beating(pipeline, pulse):
        for _ in range(5):
            pipeline.vae.layers[0](torch.zeros(1, 2, device="cuda"))
        torch.cuda.synchronize()
        until = time.monotonic() + 10
        while pulse.counts[1] < 5 and time.monotonic() < until:
            time.sleep(0.05)
        # The VAE's are what one rank does for all.
        assert pulse.counts == [0, 5, 5, 0]
