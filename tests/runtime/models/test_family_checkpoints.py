"""Jobs of every family go on from a checkpoint as if nothing had been, also on another number of ranks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import connect
from semvid.runtime.config import Config, JobConfig
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.generate import Progress, generate
from semvid.runtime.jobs.job import Job

# Refreshed at every third step: what follows a checkpoint reuses its labels and map.
REUSED = {"p": 0.6, "refresh_every": 3, "dense_steps": 0.0}
TAIL = {"tail": "second", "selection": "error", "floor": 0.0, "seeding": "spread", "share_branches": "yes"}
Make = Callable[..., Config]

pytestmark = pytest.mark.usefixtures("one_thread")


def stopped_after(step: int, folder: Path, config: Config) -> Job:
    """A job with a checkpoint after every step, that ended after one."""

    def watch(progress: Progress) -> None:
        if progress.step == step and progress.seconds:
            raise RuntimeError("gone")

    job = jobs.create(folder, replace(config, job=JobConfig(checkpoint_steps=1, checkpoint_seconds=0.0)))
    with pytest.raises(RuntimeError, match="gone"):
        generate(job, watch)
    return job


@pytest.mark.parametrize(
    ("name", "attention", "video", "step"),
    [
        ("wan2.1-i2v-14b", {}, {}, 3),
        ("wan2.2-ti2v-5b", {}, {}, 3),
        ("hunyuanvideo", {}, {}, 3),
        ("hunyuanvideo", TAIL, {}, 3),
        # The second transformer begins with the fourth step.
        ("wan2.2-t2v-a14b", {}, {"boundary": 0.5}, 3),
        ("wan2.2-t2v-a14b", {}, {"boundary": 0.5}, 4),
        ("wan2.2-t2v-a14b", {}, {"boundary": 0.5}, 5),
        ("wan2.2-t2v-a14b", TAIL, {"boundary": 0.5}, 5),
    ],
)
def test_a_job_goes_on_as_if_it_had_not_stopped(
    name: str, attention: dict[str, Any], video: dict[str, Any], step: int, family_config: Make, tmp_path: Path
) -> None:
    config = family_config(name, REUSED | attention, steps=6, **video)
    whole = generate(jobs.create(tmp_path / "whole", config))
    job = stopped_after(step, tmp_path / "stopped", config)
    result = generate(job)
    assert result.resumed_after == step - 1
    assert result.frames_sha256 == whole.frames_sha256
    assert result.density == whole.density


def _goes_on(rank: int, world: int, folder: Path) -> None:
    result = generate(jobs.load(folder), ranks=connect(Mesh(ulysses=world)))
    if rank == 0:
        torch.save(result.latents, folder / "latents.pt")


@pytest.mark.parametrize("attention", [{}, TAIL])
def test_a_job_with_a_prompt_in_its_sequence_goes_on_on_two_ranks(
    attention: dict[str, Any], family_config: Make, tmp_path: Path, spawn: Callable[..., None]
) -> None:
    config = family_config("hunyuanvideo", REUSED | attention | {"refresh_every": 10}, steps=5)
    whole = generate(jobs.create(tmp_path / "whole", config))
    job = stopped_after(3, tmp_path / "stopped", config)
    spawn(2, _goes_on, job.folder)
    latents = torch.load(job.folder / "latents.pt")
    torch.testing.assert_close(latents, whole.latents, rtol=1e-4, atol=1e-4)


def test_another_picture_of_the_same_name_is_refused(family_config: Make, image: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.open(image).save(picture)
    config = family_config("wan2.1-i2v-14b", REUSED, image=str(picture))
    job = stopped_after(3, tmp_path / "job", config)
    Image.open(image).rotate(90).save(picture)
    with pytest.raises(ValueError, match="was made with video.image"):
        generate(job)
