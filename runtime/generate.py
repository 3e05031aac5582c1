"""Runs one job from its configuration to its files: load, encode, denoise, decode, write."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks
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
    """Of the GPU's allocator, on rank 0; None on a CPU."""
    mesh: Mesh
    """How the ranks of the job shared it."""

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps."""
        return float(torch.tensor(self.step_seconds, dtype=torch.float64).median())


Watcher = Callable[[Progress], None]


def generate(
    job: Job, watch: Watcher = lambda _: None, pipeline: Any = None, ranks: Ranks | None = None
) -> Result | None:
    """Runs `job`, writes its events, video and contact sheet, and returns what it made; None on a rank other than 0.

    Every rank of the job must enter. All of them denoise; rank 0 alone decodes and writes.

    Args:
        job: a folder with its configuration, the same on every rank.
        watch: called after each step and at the beginning of each phase.
        pipeline: the loaded checkpoint, to save loading it again; loaded from the configuration if absent.
        ranks: this process among those of the job; alone if absent. With several the caller logs what stops the job,
            since here nobody knows which rank was the first to fail.

    Raises:
        ValueError: the configuration does not fit the checkpoint.
        KeyboardInterrupt: passed on; the job's state is then "cancelled".
    """
    # Here and not only on the command line: whoever starts a job, a size that does not fit is never changed silently.
    folder.check(job.config, folder.inspect(folder.locate(job.config.model.path)))
    run = _Run(job, watch, ranks or Ranks())
    run.log("start", state="running", mesh=str(run.ranks.mesh), world_size=run.ranks.mesh.world_size)
    try:
        result = run.all(pipeline)
    except BaseException as error:
        if run.ranks.mesh.world_size == 1:
            _log_stop(run, error)
        raise
    if result is not None:
        job.stop("done", frames_sha256=result.frames_sha256, phase_seconds=result.phase_seconds)
    return result


def _log_stop(run: "_Run", error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt):
        run.job.stop("cancelled", step=run.step)
    else:
        run.job.stop("failed", step=run.step, reason=f"{type(error).__name__}: {error}")


class _Run:
    """One pass of one rank through the phases; keeps the clock and the step."""

    def __init__(self, job: Job, watch: Watcher, ranks: Ranks) -> None:
        self.job = job
        self.watch = watch
        self.ranks = ranks
        self.leads = ranks.rank == 0
        self.on_gpu = False
        self.step = 0
        self.phase_seconds: dict[str, float] = {}
        self.step_seconds: list[float] = []

    def log(self, event: str, **values: Any) -> None:
        if self.leads:
            self.job.log(event, **values)

    def all(self, pipeline: Any) -> Result | None:
        config = self.job.config
        if pipeline is None:
            pipeline = self._phase("load", lambda: models.load_pipeline(folder.locate(config.model.path), config.model))
        seed = config.video.seed
        handle = models.sparsify(pipeline, attention=config.attention, seed=seed, ranks=self.ranks)
        self.on_gpu = pipeline.device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            state = self._phase("encode", lambda: denoise.start(pipeline, config.video, self.ranks))
            self._phase("denoise", lambda: self._denoise(pipeline, handle, state))
            denoise.finish(pipeline)
            density = handle.density()
        finally:
            handle.remove()
        return self._finish(pipeline, handle, state.latents, density) if self.leads else None

    def _finish(self, pipeline: Any, handle: Sparsified, latents: Tensor, density: Density) -> Result:
        frames = self._phase("decode", lambda: denoise.decode(pipeline, latents))
        encoder = self._phase("write", lambda: self._write(frames))
        return Result(
            frames=frames,
            latents=latents.cpu(),
            frames_sha256=video.frames_sha256(frames),
            encoder=encoder,
            density=density,
            kernels=_kernels(handle, density),
            step_seconds=self.step_seconds,
            phase_seconds=self.phase_seconds,
            device=pipeline.device.type,
            peak_memory_bytes=self._peak_memory(),
            mesh=self.ranks.mesh,
        )

    def _phase(self, name: str, work: Callable[[], Any]) -> Any:
        self.watch(Progress(phase=name, step=self.step, steps=self.job.config.video.steps, seconds=0.0))
        self.log("phase", phase=name)
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
        self.log(
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
