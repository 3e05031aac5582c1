"""What a rank counts, and faults that it suffers."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from semvid.parallel.phases import phase
from semvid.runtime.pulse import BOARD_BYTES, Fault, Pulse, Seen, read_board
from semvid.runtime.vital import beating


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
    assert read_board(board, 1) == Seen((0, 0, 0), "")
    pulse.beat("load")
    pulse.beat("block")
    pulse.beat_of_device(3)
    pulse.beat_of_writer()
    assert read_board(board, 1) == Seen((2, 3, 1), "block")
    assert read_board(board, 0) == Seen((0, 0, 0), "")


class Pipeline:
    """Three models with blocks in lists, one of them nested."""

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


def test_every_block_and_phase_counts_inside_and_none_after() -> None:
    pipeline: Any = Pipeline()
    passed: list[str] = []

    class Noting(Pulse):
        def beat(self, point: str) -> None:
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
    from semvid.runtime import job as jobs
    from semvid.runtime.generate import generate

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
        assert pulse.counts[:2] == [5, 5]
