"""Checkpoints: what they hold, that a job goes on from them as if nothing had been, and that damage is known."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file

from semvid.parallel import balance
from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import connect
from semvid.runtime.attention import call
from semvid.runtime.config import Config, JobConfig, ModelConfig
from semvid.runtime.jobs import checkpoint, checkpoint_files
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.generate import Progress, generate
from semvid.runtime.jobs.job import Job, StoppedError
from semvid.runtime.models import install
from semvid.runtime.models import load as load_module
from semvid.runtime.models.folder import locate
from semvid.runtime.settings import DEMO_MODEL
from tests.parallel.file_windows import windows_in

CPU = torch.device("cpu")
# Refreshed at step 1 and 4 (from 0): a checkpoint after step 3 is followed by a reuse of its labels and map.
REUSED = {"refresh_every": 3, "p": 0.6, "query_clusters": 6, "key_clusters": 9, "first_iterations": 5}
# Refreshed once: nothing is clustered again after the checkpoint, so every mesh computes the same.
ONCE = {**REUSED, "refresh_every": 10}
# Refreshed at step 1, 2 and 4: the checkpoint after step 3 holds a drift that decides on step 4.
TAIL = {**REUSED, "tail": "second", "selection": "error", "floor": 0.0, "seeding": "spread", "share_branches": "yes"}
DRIFT = {**TAIL, "refresh": "drift", "refresh_every": 1, "drift": 0.5, "density": 0.6, "share_branches": "no"}
SETTINGS = {
    "dense": ("dense", {}),
    "refreshed": ("svg2", {}),
    "reused": ("svg2", REUSED),
    "tail": ("svg2", TAIL),
    "drift": ("svg2", DRIFT),
    "shared": ("svg2", {**TAIL, "refresh_every": 10}),
    "anchors": ("svg2", {**TAIL, "refresh_every": 10, "anchors": "yes"}),
    "anchored": ("svg2", {**TAIL, "anchors": "yes"}),
}
Make = Callable[..., Config]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tiny_config: Make) -> Make:
    """Makes configurations with a checkpoint every so many steps, of a job of six."""

    def made(kind: str = "reused", every: int = 1, seconds: float = 0.0, **video: Any) -> Config:
        preset, attention = SETTINGS.get(kind, ("svg2", ONCE))
        config = tiny_config(preset, attention, **{"steps": 6, "frames": 9} | video)
        return replace(config, job=JobConfig(checkpoint_steps=every, checkpoint_seconds=seconds))

    return made


@pytest.fixture
def pipeline(tiny_model: Path) -> Any:
    return load(tiny_model)


def load(model: Path) -> Any:
    return load_module.load_pipeline(model, ModelConfig(device="cpu", dtype="fp32"))


def stopping(after: int) -> Callable[[Progress], None]:
    """Returns a watcher that ends the run after a step, as a defect would."""

    def watch(progress: Progress) -> None:
        if progress.step == after and progress.seconds:
            raise RuntimeError("gone")

    return watch


@pytest.fixture
def stopped(make: Make, pipeline: Any, tmp_path: Path) -> Job:
    """A job that ended after step 4, with checkpoints of steps 2 and 4."""
    job = jobs.create(tmp_path / "job", make(every=2))
    with pytest.raises(RuntimeError, match="gone"):
        generate(job, stopping(5), pipeline)
    assert checkpoint_files.steps(job.checkpoints) == [4, 2]
    return job


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler])
@pytest.mark.parametrize("done", [0, 1, 2, 5])
def test_a_scheduler_goes_on_as_if_it_had_not_stopped(cls: Any, done: int) -> None:
    noise = torch.randn(7, 2, 3, 4, generator=torch.Generator().manual_seed(0))

    def fresh() -> Any:
        folder = DEMO_MODEL / "scheduler"
        scheduler = cls.from_pretrained(folder, solver_order=3) if cls is UniPCMultistepScheduler else cls(shift=3.0)
        scheduler.set_timesteps(7)
        scheduler.set_begin_index(0)
        return scheduler

    def run(scheduler: Any, x: torch.Tensor, steps: range) -> torch.Tensor:
        for step in steps:
            x = scheduler.step(noise[step] + x, scheduler.timesteps[step], x, return_dict=False)[0]
        return x

    start = torch.ones(2, 3, 4)
    whole, first, second = fresh(), fresh(), fresh()
    middle = run(first, start, range(done))
    plain, tensors = checkpoint.scheduler_state(first)
    checkpoint.put_scheduler_state(second, json.loads(json.dumps(plain)), tensors, CPU)
    assert torch.equal(run(second, middle, range(done, 7)), run(whole, start, range(7)))


def test_every_plain_value_comes_back_as_it_was() -> None:
    values = {"a": [1, 2.5, None, (True, "x")], "b": {"c": torch.ones(2), "tensor": ()}, "d": 0.1, "e": torch.tensor(3)}
    plain, tensors = checkpoint.scheduler_state(SimpleNamespace(**values))
    other = SimpleNamespace(a=0, b=0)
    checkpoint.put_scheduler_state(other, json.loads(json.dumps(plain)), tensors, CPU)
    assert (other.a, other.d, other.b["tensor"]) == (values["a"], 0.1, ())
    assert torch.equal(other.b["c"], torch.ones(2))
    assert other.e.shape == ()
    assert other.e == 3


def test_a_scheduler_with_other_things_in_it_is_refused(make: Make, pipeline: Any, tmp_path: Path) -> None:
    pipeline.scheduler.noise_source = object()
    message = "UniPCMultistepScheduler.noise_source is a object, which a checkpoint can't hold"
    with pytest.raises(ValueError, match=message):
        generate(jobs.create(tmp_path / "job", make()), pipeline=pipeline)
    assert not (tmp_path / "job" / "checkpoint").exists()


def test_a_state_of_another_release_is_refused() -> None:
    plain, tensors = checkpoint.scheduler_state(SimpleNamespace(sigmas=torch.ones(2)))
    with pytest.raises(ValueError, match="is of another diffusers: it lacks order"):
        checkpoint.put_scheduler_state(SimpleNamespace(sigmas=0, order=2), plain, tensors, CPU)


def test_parts_are_safetensors(tmp_path: Path) -> None:
    tensors = {
        "bool": torch.tensor([True, False, True]),
        "short": torch.arange(5, dtype=torch.int16).view(torch.uint16),
        "empty": torch.ones(2, 0),
        "scalar": torch.tensor(3),
        "half": torch.randn(3, 3).bfloat16(),
        "double": torch.randn(1, 2, dtype=torch.float64),
    }
    part = checkpoint_files.write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert part.bytes == (tmp_path / "x.safetensors").stat().st_size
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        assert found[name].numpy(force=True).tobytes() == x.numpy(force=True).tobytes() if name != "half" else True
    assert torch.equal(found["half"], tensors["half"])


@pytest.mark.parametrize("kind", list(SETTINGS))
@pytest.mark.parametrize("after", [2, 3])
def test_a_job_that_goes_on_makes_the_same_video(
    kind: str, after: int, make: Make, pipeline: Any, tmp_path: Path
) -> None:
    whole = generate(jobs.create(tmp_path / "whole", make(kind, every=0)), pipeline=pipeline)
    job = jobs.create(tmp_path / "job", make(kind))
    with pytest.raises(RuntimeError, match="gone"):
        generate(job, stopping(after + 1), pipeline)
    # What was under way when it ended is whole too.
    said: list[str] = []
    shutil.rmtree(job.checkpoints / checkpoint_files.name_of(after + 1), ignore_errors=True)
    result = generate(job, pipeline=pipeline, say=said.append)
    assert said == [f"goes on after step {after} of 6"]
    assert result.frames_sha256 == whole.frames_sha256
    assert torch.equal(result.latents, whole.latents)
    assert (result.density, result.resumed_after, len(result.step_seconds)) == (whole.density, after, 6)
    events = list(job.events())
    steps = [e["step"] for e in events if e["event"] in ("step", "resume")]
    assert steps == [*range(1, after + 2), after, *range(after + 1, 7)]
    assert [(e["step"], e["steps"]) for e in events if e["event"] == "step"][-1] == (6, 6)
    assert (job.done, checkpoint_files.steps(job.checkpoints)) == (True, [6, 5])
    assert not (tmp_path / "whole" / "checkpoint").exists()


def test_a_job_that_ended_after_its_last_step_only_decodes(make: Make, pipeline: Any, tmp_path: Path) -> None:
    def gone(progress: Progress) -> None:
        if progress.phase == "decode":
            raise RuntimeError("gone")

    job = jobs.create(tmp_path / "job", make(every=6))
    with pytest.raises(RuntimeError, match="gone"):
        generate(job, gone, pipeline)
    result = generate(job, pipeline=pipeline)
    assert (result.resumed_after, len(result.step_seconds)) == (6, 6)
    whole = generate(jobs.create(tmp_path / "whole", make(every=0)), pipeline=pipeline)
    assert result.frames_sha256 == whole.frames_sha256


def test_a_done_job_begins_anew(make: Make, pipeline: Any, tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "job", make("dense", every=2, steps=2))
    assert generate(job, pipeline=pipeline).frames_sha256 == generate(job, pipeline=pipeline).frames_sha256
    assert [e["event"] for e in job.events()].count("resume") == 0


def test_time_and_steps_both_lead_to_checkpoints(make: Make, pipeline: Any, tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "job", make("dense", every=100, seconds=1e-6, steps=3))
    generate(job, pipeline=pipeline)
    found = [e for e in job.events() if e["event"] == "checkpoint"]
    assert [e["step"] for e in found] == [1, 2, 3]
    assert all(e["bytes"] > 0 and e["seconds"] >= 0 and e["stall_seconds"] >= 0 for e in found)


def damages(folder: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yields ways to damage the files of a checkpoint: cut at several bytes, changed in one, gone."""
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        for keep in sorted({0, 1, 7, 8, 9, 200, size // 2, size - 1}):
            yield f"{path.name} cut at {keep}", lambda file, keep=keep: os.truncate(file, keep)
        for place in (0, 8, 100, size // 2, size - 1):
            yield f"{path.name} changed at {place}", lambda file, place=place: flip(file, place)
        yield f"{path.name} gone", Path.unlink


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_known_whichever_byte_it_is(stopped: Job) -> None:
    folder, spare = stopped.checkpoints / "step-000004", stopped.folder / "spare"
    shutil.copytree(folder, spare)
    found = checkpoint.newest(stopped.checkpoints, lambda *_: pytest.fail("nothing is damaged"))
    assert (found.step, found.name) == (4, "step-000004")
    ways = list(damages(spare))
    assert len(ways) > 20
    for label, damage in ways:
        shutil.rmtree(folder)
        shutil.copytree(spare, folder)
        damage(folder / label.split()[0])
        told: list[tuple[str, str]] = []
        found = checkpoint.newest(stopped.checkpoints, lambda *damage, told=told: told.append(damage))
        assert found.step == 2, label
        ((name, reason),) = told
        assert name == "step-000004", label
        assert reason.startswith(f"{label.split()[0]} "), label


def test_a_job_falls_back_to_the_checkpoint_before_and_says_so(
    stopped: Job, make: Make, pipeline: Any, tmp_path: Path
) -> None:
    part = stopped.checkpoints / "step-000004" / "rank-0000.safetensors"
    size = part.stat().st_size
    os.truncate(part, size - 10)
    said: list[str] = []
    result = generate(stopped, pipeline=pipeline, say=said.append)
    reason = f"rank-0000.safetensors has {size - 10} of {size} bytes"
    assert said == [f"checkpoint step-000004 is damaged and passed over: {reason}", "goes on after step 2 of 6"]
    (event,) = [e for e in stopped.events() if e["event"] == "damaged"]
    assert (event["checkpoint"], event["reason"]) == ("step-000004", reason)
    whole = generate(jobs.create(tmp_path / "whole", make(every=0)), pipeline=pipeline)
    assert result.frames_sha256 == whole.frames_sha256
    assert checkpoint_files.steps(stopped.checkpoints) == [6, 4]
    assert checkpoint_files.verified(stopped.checkpoints, 4)["step"] == 4


def test_without_a_whole_checkpoint_a_job_begins_at_the_first_step(stopped: Job, pipeline: Any) -> None:
    for step in (2, 4):
        (stopped.checkpoints / checkpoint_files.name_of(step) / checkpoint_files.MANIFEST).unlink()
    said: list[str] = []
    result = generate(stopped, pipeline=pipeline, say=said.append)
    assert [line.split()[-1] for line in said] == ["missing", "missing", "step"]
    assert said[-1] == "there is no checkpoint; it begins at the first step"
    assert (result.resumed_after, stopped.done) == (0, True)


def test_foreign_files_are_left_alone_and_beginnings_removed(stopped: Job, pipeline: Any) -> None:
    root = stopped.checkpoints
    (root / "notes.txt").write_text("mine")
    (root / "step-x").mkdir()
    (root / "step-000005").write_text("a file")
    (root / "step-000004" / "model.pt").write_bytes(b"\x80\x04")
    checkpoint_files.temporary(root, 6).joinpath("rank-0000.safetensors").write_text("half")
    found = checkpoint.newest(root, lambda *_: None)
    assert found.step == 4
    generate(stopped, pipeline=pipeline)
    names = ["notes.txt", "step-000004", "step-000005", "step-000006", "step-x"]
    assert sorted(path.name for path in root.iterdir()) == names


def test_what_holds_no_pickle_is_all_that_is_written(stopped: Job) -> None:
    names = {path.name for path in stopped.checkpoints.rglob("*") if path.is_file()}
    assert names == {"manifest.json", "rank-0000.safetensors"}
    for step in (2, 4):
        load_file(stopped.checkpoints / checkpoint_files.name_of(step) / "rank-0000.safetensors")


OTHERS = [
    ({"seed": 9}, "video.seed 0, not 9"),
    ({"prompt": "a blue ball"}, "video.prompt 'a red ball', not 'a blue ball'"),
    ({"steps": 7}, "video.steps 6, not 7"),
]


@pytest.mark.parametrize(("video", "message"), OTHERS)
def test_a_checkpoint_of_another_configuration_is_refused_by_name(
    video: dict[str, Any], message: str, stopped: Job, make: Make, pipeline: Any
) -> None:
    other = Job(stopped.folder, make(every=5, **video))
    with pytest.raises(ValueError, match=f"step-000004 was made with {message}; accepted: the job.toml"):
        generate(other, pipeline=pipeline)
    assert stopped.state == "failed"


def test_how_often_checkpoints_are_written_may_change(stopped: Job, make: Make, pipeline: Any) -> None:
    assert generate(Job(stopped.folder, make(every=0)), pipeline=pipeline).resumed_after == 4


def test_other_attention_and_precision_are_refused_by_name(stopped: Job, make: Make) -> None:
    found = checkpoint.newest(stopped.checkpoints, lambda *_: None)
    config = make()
    checkpoint.check_fits(found, checkpoint.describe(config))
    attention = replace(config, attention=replace(config.attention, p=0.5))
    with pytest.raises(ValueError, match="made with attention.p 0.6, not 0.5"):
        checkpoint.check_fits(found, checkpoint.describe(attention))
    half = replace(config, model=replace(config.model, dtype="bf16"))
    with pytest.raises(ValueError, match="was computed in float32, here it would be bfloat16"):
        checkpoint.check_fits(found, checkpoint.describe(half))
    found.body["format"] = 2
    with pytest.raises(ValueError, match="has format 2; accepted: 1"):
        checkpoint.check_fits(found, checkpoint.describe(config))


def test_a_checkpoint_of_another_model_is_refused_by_name(
    stopped: Job, make: Make, tiny_model: Path, tmp_path: Path
) -> None:
    found = checkpoint.newest(stopped.checkpoints, lambda *_: None)

    def of(folder: Path) -> dict[str, Any]:
        config = make()
        return checkpoint.describe(replace(config, model=replace(config.model, path=str(folder))))

    shutil.copytree(tiny_model, tmp_path / "tiny")
    checkpoint.check_fits(found, of(tmp_path / "tiny"))
    shutil.copytree(tiny_model, tmp_path / "larger")
    with pytest.raises(ValueError, match="is of the model 'tiny', not 'larger'"):
        checkpoint.check_fits(found, of(tmp_path / "larger"))
    config = tmp_path / "tiny" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"eps": 1e-06', '"eps": 1e-05'))
    with pytest.raises(ValueError, match="is of a transformer '[0-9a-f]{64}', not '[0-9a-f]{64}'"):
        checkpoint.check_fits(found, of(tmp_path / "tiny"))


def test_a_full_disk_ends_the_job_with_its_cause_and_nothing_half_written_counts(
    make: Make, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, write, written = jobs.create(tmp_path / "job", make(every=2)), os.write, 0

    def limited(handle: int, block: memoryview) -> int:
        nonlocal written
        if written + len(block) > limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        written += len(block)
        return write(handle, block)

    monkeypatch.setattr(checkpoint_files, "BLOCK_BYTES", 1000)
    limit = 1 << 30
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        with pytest.raises(RuntimeError):
            generate(jobs.create(tmp_path / "measured", make(every=2)), stopping(3), pipeline)
        # Room for the first checkpoint and half of the second.
        limit, written = written * 3 // 2, 0
        with pytest.raises(OSError, match="No space left on device") as caught:
            generate(job, pipeline=pipeline)
    assert caught.value.filename.endswith("rank-0000.safetensors")
    assert job.state == "failed"
    assert sorted(path.name for path in job.checkpoints.iterdir()) == ["step-000002"]
    whole = generate(jobs.create(tmp_path / "whole", make(every=0)), pipeline=pipeline)
    result = generate(job, pipeline=pipeline)
    assert (result.resumed_after, result.frames_sha256) == (2, whole.frames_sha256)


def test_a_place_for_checkpoints_that_is_no_folder_ends_the_job(make: Make, pipeline: Any, tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "job", make("dense", every=1))
    job.checkpoints.write_text("")
    with pytest.raises(OSError, match="checkpoint"):
        generate(job, pipeline=pipeline)
    assert job.state == "failed"


def test_a_job_that_is_told_to_stop_ends_after_its_step_with_a_checkpoint(
    make: Make, pipeline: Any, tmp_path: Path
) -> None:
    told: list[int] = []
    job, said = jobs.create(tmp_path / "job", make(every=100)), []

    def stop() -> bool:
        told.append(1)
        return len(told) == 3

    with pytest.raises(StoppedError, match="told to stop; it goes on after step 3 with: semvid resume"):
        generate(job, pipeline=pipeline, say=said.append, told_to_stop=stop)
    assert (job.state, job.step, len(said)) == ("interrupted", 3, 1)
    assert [e["state"] for e in job.events() if e["event"] == "stop"] == ["interrupted"]
    whole = generate(jobs.create(tmp_path / "whole", make(every=0)), pipeline=pipeline)
    assert generate(job, pipeline=pipeline).frames_sha256 == whole.frames_sha256


def test_a_job_without_checkpoints_that_is_told_to_stop_writes_none(make: Make, pipeline: Any, tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "job", make("dense", every=0))
    with pytest.raises(StoppedError, match="from the beginning, without checkpoints"):
        generate(job, pipeline=pipeline, told_to_stop=lambda: True)
    assert not job.checkpoints.exists()


def _on_two(rank: int, world: int, model: Path, folder: Path, config: Config, meshes: dict[str, Mesh]) -> None:
    """Begins and resumes jobs on each mesh; every result goes to a file."""
    pipeline = load(model)
    for name, mesh in meshes.items():
        ranks = connect(mesh)
        place = {kind: Job(folder / kind / name, config) for kind in ("widened", "whole", "begun", "narrowed")}
        for kind in ("widened", "whole"):
            save(generate(place[kind], pipeline=pipeline, ranks=ranks), place[kind])
        for kind in ("begun", "narrowed"):
            told: list[int] = []
            # One rank is told, all stop.
            with pytest.raises(StoppedError):
                generate(
                    place[kind],
                    pipeline=pipeline,
                    ranks=ranks,
                    told_to_stop=lambda told=told: told.append(1) is None and len(told) == 3 and rank == 1,
                )
        save(generate(place["begun"], pipeline=pipeline, ranks=ranks), place["begun"])


def save(result: Any, job: Job) -> None:
    if result is not None:
        np.save(job.folder / "latents.npy", result.latents.numpy())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["once", "shared", "anchors"])
def test_a_job_goes_on_with_another_number_of_processes_and_another_mesh(
    kind: str, make: Make, pipeline: Any, tiny_model: Path, tmp_path: Path, spawn: Callable[..., None]
) -> None:
    config = make(kind, every=100, height=80, width=112)
    meshes = {"cfg": Mesh(cfg=2), "ulysses": Mesh(ulysses=2), "ring": Mesh(ring=2)}
    alone = generate(jobs.create(tmp_path / "alone", config), pipeline=pipeline).latents
    assert checkpoint.describe(config)["model"]["folder"] == locate(config.model.path).name
    start = jobs.create(tmp_path / "start", config)
    with pytest.raises(StoppedError):
        generate(start, pipeline=pipeline, told_to_stop=lambda: start.step == 3)
    for name in meshes:
        shutil.copytree(start.folder, tmp_path / "widened" / name)
        for place in ("whole", "begun", "narrowed"):
            jobs.create(tmp_path / place / name, config)
    spawn(2, _on_two, tiny_model, tmp_path, config, meshes)
    for name in meshes:
        found = {
            place: torch.from_numpy(np.load(tmp_path / place / name / "latents.npy"))
            for place in ("widened", "whole", "begun")
        }
        narrowed = Job(tmp_path / "narrowed" / name, config)
        held = {path.name for path in (narrowed.checkpoints / "step-000003").iterdir()}
        assert held == {"manifest.json", "rank-0000.safetensors", "rank-0001.safetensors"}
        result = generate(narrowed, pipeline=pipeline)
        assert result.resumed_after == 3
        # The same mesh: the same bits.
        assert torch.equal(found["begun"], found["whole"]), name
        for place, latents in (("widened", found["widened"]), ("narrowed", result.latents)):
            assert float((latents - alone).abs().max()) <= 1e-4, (name, place)


def _through_windows(rank: int, world: int, model: Path, folder: Path, configs: dict[str, Config]) -> None:
    """Cuts are those of the job that nobody stopped, after whichever step another was."""
    balance.TILE_ROWS, balance.TILE_OVERHEAD_KEYS = 4, 2
    install.open_windows = windows_in(str(folder))
    pipeline, ranks, cuts = load(model), connect(Mesh(ulysses=world)), []
    attend = call.attend_through_windows

    def noted(*given: Any) -> Any:
        cuts.append(given[3].parts)
        return attend(*given)

    call.attend_through_windows = noted
    for kind, config in configs.items():
        del cuts[:]
        generate(Job(folder / kind / "whole", config), pipeline=pipeline, ranks=ranks)
        whole = cuts[:]
        assert len({str(parts) for parts in whole}) > 3, kind
        for step in range(2, 6):
            del cuts[:]
            job = Job(folder / kind / str(step), config)
            for stop in (step, 0):
                with pytest.raises(StoppedError) if stop else nullcontext():
                    calls = itertools.count(1)
                    told = partial(lambda calls, stop: next(calls) == stop, calls, stop)
                    generate(job, pipeline=pipeline, ranks=ranks, told_to_stop=told)
            assert cuts == whole, (kind, step)


@pytest.mark.timeout(400)
def test_a_job_that_goes_on_is_cut_as_without_the_break(
    make: Make, tiny_model: Path, tmp_path: Path, spawn: Callable[..., None]
) -> None:
    configs = {kind: make(kind, every=100) for kind in ("refreshed", "reused", "drift", "anchored")}
    for kind, config in configs.items():
        for name in ("whole", *"2345"):
            jobs.create(tmp_path / kind / name, config)
    spawn(2, _through_windows, tiny_model, tmp_path, configs)
