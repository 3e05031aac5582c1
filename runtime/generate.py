"""Runs one job from its configuration to its files: load, encode, denoise, decode, write."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from semvid.runtime import denoise, folder, models, video
from semvid.runtime.job import Job
from semvid.runtime.metrics import Density, Frames
from semvid.runtime.models import Sparsified


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One denoising step that is done, or the beginning of another phase."""

    phase: str
    """load, encode, denoise, decode, write"""
    step: int
    """Steps done."""
    steps: int
    seconds: float
    """Of this step; 0 at the beginning of a phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a job made and what it took. Times in seconds."""

    frames: Frames
    latents: Tensor
    frames_sha256: str
    encoder: str
    density: Density
    kernels: dict[str, str]
    step_seconds: list[float]
    phase_seconds: dict[str, float]
    device: str
    """cpu or cuda"""
    peak_memory_bytes: int | None
    """Of the GPU's allocator; None on a CPU."""

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps."""
        return float(torch.tensor(self.step_seconds, dtype=torch.float64).median())


Watcher = Callable[[Progress], None]


def generate(job: Job, watch: Watcher = lambda _: None, pipeline: Any = None) -> Result:
    """Runs `job`, writes its events, video and contact sheet, and returns what it made.

    Args:
        job: a folder with its configuration.
        watch: called after each step and at the beginning of each phase.
        pipeline: the loaded checkpoint, to save loading it again; loaded from the configuration if absent.

    Raises:
        ValueError: the configuration does not fit the checkpoint.
        KeyboardInterrupt: passed on; the job's state is then "cancelled".
    """
    # Here and not only on the command line: whoever starts a job, a size that does not fit is never changed silently.
    folder.check(job.config, folder.inspect(folder.locate(job.config.model.path)))
    run = _Run(job, watch)
    job.log("start", state="running")
    try:
        result = run.all(pipeline)
    except KeyboardInterrupt:
        job.log("stop", state="cancelled", step=run.step)
        raise
    except BaseException as error:
        job.log("stop", state="failed", step=run.step, reason=f"{type(error).__name__}: {error}")
        raise
    job.log("stop", state="done", frames_sha256=result.frames_sha256, phase_seconds=result.phase_seconds)
    return result


class _Run:
    """One pass through the phases; keeps the clock and the step."""

    def __init__(self, job: Job, watch: Watcher) -> None:
        self.job = job
        self.watch = watch
        self.on_gpu = False
        self.step = 0
        self.phase_seconds: dict[str, float] = {}
        self.step_seconds: list[float] = []

    def all(self, pipeline: Any) -> Result:
        config = self.job.config
        if pipeline is None:
            pipeline = self._phase("load", lambda: models.load_pipeline(folder.locate(config.model.path), config.model))
        handle = models.sparsify(pipeline, attention=config.attention, seed=config.video.seed)
        self.on_gpu = pipeline.device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            state = self._phase("encode", lambda: denoise.start(pipeline, config.video))
            self._phase("denoise", lambda: self._denoise(pipeline, handle, state))
            denoise.finish(pipeline)
            density = handle.density()
        finally:
            handle.remove()
        frames = self._phase("decode", lambda: denoise.decode(pipeline, state.latents))
        encoder = self._phase("write", lambda: self._write(frames))
        return Result(
            frames=frames,
            latents=state.latents.cpu(),
            frames_sha256=video.frames_sha256(frames),
            encoder=encoder,
            density=density,
            kernels=_kernels(handle, density),
            step_seconds=self.step_seconds,
            phase_seconds=self.phase_seconds,
            device=pipeline.device.type,
            peak_memory_bytes=self._peak_memory(),
        )

    def _phase(self, name: str, work: Callable[[], Any]) -> Any:
        self.watch(Progress(phase=name, step=self.step, steps=self.job.config.video.steps, seconds=0.0))
        self.job.log("phase", phase=name)
        begin = time.perf_counter()
        result = work()
        self._wait()
        self.phase_seconds[name] = round(time.perf_counter() - begin, 4)
        return result

    def _denoise(self, pipeline: Any, handle: Sparsified, state: denoise.Denoising) -> None:
        steps = self.job.config.video.steps
        before, begin = handle.density(), time.perf_counter()
        for step in denoise.steps(pipeline, state):
            self._wait()
            seconds = time.perf_counter() - begin
            now = handle.density()
            self.step = step + 1
            self.step_seconds.append(seconds)
            self._log_step(seconds, now.minus(before))
            self.watch(Progress(phase="denoise", step=self.step, steps=steps, seconds=seconds))
            before, begin = now, time.perf_counter()

    def _log_step(self, seconds: float, density: Density) -> None:
        self.job.log(
            "step",
            step=self.step,
            steps=self.job.config.video.steps,
            seconds=round(seconds, 4),
            density=round(density.sparse, 4),
            sparse_calls=density.sparse_calls,
            dense_calls=density.dense_calls,
            peak_memory_bytes=self._peak_memory(),
        )

    def _wait(self) -> None:
        """Waits for the device, so that the clock measures what ran and not what was queued."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def _peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.on_gpu else None

    def _write(self, frames: Frames) -> str:
        encoder = video.write_mp4(frames, self.job.video, self.job.config.video.fps)
        video.contact_sheet([("", frames)], self.job.contact)
        return encoder


def _kernels(handle: Sparsified, density: Density) -> dict[str, str]:
    """Returns which kernels did the dense and the sparse calls, where there were any."""
    kernels = {"dense": "diffusers", "sparse": handle.kernels}
    counts = asdict(density)
    return {kind: name for kind, name in kernels.items() if counts[f"{kind}_calls"]}
