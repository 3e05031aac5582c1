"""Runs one job from its configuration to its files: load, encode, denoise, decode, write.

A job that was stopped goes on from its newest whole checkpoint.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from semvid.parallel import phases
from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks
from semvid.runtime.attention.density import Density
from semvid.runtime.device import resolve_device
from semvid.runtime.jobs import checkpoint, checkpoint_files, denoise, heartbeat_hooks, video
from semvid.runtime.jobs.checkpoint import Checkpoint
from semvid.runtime.jobs.checkpoint_writer import Writer
from semvid.runtime.jobs.denoise import Denoising
from semvid.runtime.jobs.heartbeat import Pulse
from semvid.runtime.jobs.job import Job, StoppedError
from semvid.runtime.jobs.likeness import Frames
from semvid.runtime.models import folder, install, load, step_caches
from semvid.runtime.models.families.adapters import adapter_of
from semvid.runtime.models.install import Sparsified


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
    decoded_in_tiles: bool
    """Whether the VAE had to; it follows from the video's size. Then all ranks shared the tiles."""
    resumed_after: int
    """Steps that were done before this run; 0: it began at the first."""

    @property
    def seconds_per_step(self) -> float:
        """Median over all steps, those of earlier runs too."""
        return float(torch.tensor(self.step_seconds, dtype=torch.float64).median())


Watcher = Callable[[Progress], None]


def generate(
    job: Job,
    watch: Watcher = lambda _: None,
    pipeline: Any = None,
    ranks: Ranks | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
    told_to_stop: Callable[[], bool] = lambda: False,
    pulse: Pulse | None = None,
    keep: Callable[[Result], None] = lambda _: None,
) -> Result | None:
    """Runs `job`, writes its events, video and contact sheet, and returns what it made; None on a rank other than 0.

    Every rank of the job must enter. All of them denoise, write checkpoints and decode tiles, where the VAE has them;
    rank 0 alone decodes what is decoded whole, and writes the video. If the job is not done and has a checkpoint it
    goes on from there, on whatever ranks there are.

    Args:
        job: a folder with its configuration, the same on every rank.
        watch: called after each step and at the beginning of each phase.
        pipeline: the loaded checkpoint, to save loading it again; loaded from the configuration if absent.
        ranks: this process among those of the job; alone if absent. With several the caller logs what stops the job,
            since here nobody knows which rank was the first to fail.
        say: given lines that a person should read: where the job goes on, which checkpoint is damaged.
        told_to_stop: asked after each step; where one rank says so, all end with a checkpoint.
        pulse: counts what this rank passes, for whoever watches it.
        keep: given the result before the job counts as done.

    Raises:
        ValueError: the configuration does not fit the model, or a checkpoint is of another configuration or model.
        OSError: a file, such as a checkpoint, can't be written.
        StoppedError: the job was told to stop; its state is then "interrupted".
        KeyboardInterrupt: passed on; the job's state is then "cancelled".
    """
    # Here and not only on the command line: whoever starts a job, a size that does not fit is never changed silently.
    folder.check(job.config, folder.inspect(folder.locate(job.config.model.path)))
    if job.config.job.share_weights and (ranks is None or ranks.mesh.world_size == 1):
        raise ValueError("job.share_weights is True, but there is one GPU to hold them; accepted: several, by --gpus")
    run = _Run(job, watch, ranks or Ranks(), say, told_to_stop, pulse or Pulse())
    found = run.find()
    run.log("start", state="running", mesh=str(run.ranks.mesh), world_size=run.ranks.mesh.world_size)
    try:
        result = run.all(pipeline, found)
    except BaseException as error:
        run.writer.abandon()
        if run.ranks.mesh.world_size == 1:
            _log_stop(run, error)
        raise
    if result is not None:
        keep(result)
        job.stop("done", frames_sha256=result.frames_sha256, phase_seconds=result.phase_seconds)
    return result


def _log_stop(run: "_Run", error: BaseException) -> None:
    if isinstance(error, StoppedError):
        # Said already.
        return
    if isinstance(error, KeyboardInterrupt):
        run.job.stop("cancelled", step=run.step)
    else:
        run.job.stop("failed", step=run.step, reason=f"{type(error).__name__}: {error}")


class _Run:
    """One pass of one rank through the phases; keeps the clock and the step."""

    def __init__(
        self,
        job: Job,
        watch: Watcher,
        ranks: Ranks,
        say: Callable[[str], None],
        told_to_stop: Callable[[], bool],
        pulse: Pulse,
    ) -> None:
        self.job = job
        self.watch = watch
        self.ranks = ranks
        self.say = say
        self.told_to_stop = told_to_stop
        self.pulse = pulse
        self.leads = ranks.rank == 0
        self.device = resolve_device(job.config.model.device)
        self.on_gpu = False
        self.identity = checkpoint.describe(job.config)
        self.writer = Writer(job.checkpoints, ranks, self._log_checkpoint, pulse)
        self.saved_at = time.monotonic()
        self.stall_s = 0.0
        self.resumed_after = 0
        self.step = 0
        self.phase_seconds: dict[str, float] = {}
        self.step_seconds: list[float] = []

    def log(self, event: str, **values: Any) -> None:
        if self.leads:
            self.job.log(event, **values)

    def find(self) -> Checkpoint | None:
        """Returns the checkpoint to go on from, the same on every rank; every one must enter."""
        root, found = self.job.checkpoints, None
        if self.leads:
            checkpoint_files.sweep(root)
            again = not self.job.done and any(event["event"] == "start" for event in self.job.events())
            found = checkpoint.newest(root, self._report_damage) if again else None
            if again and found is None:
                self.say("there is no checkpoint; it begins at the first step")
        if found is not None:
            checkpoint.check_fits(found, self.identity)
        (step,) = self.ranks.largest([0 if found is None else found.step], self.device)
        if self.leads or step == 0:
            return found
        return Checkpoint(root, step, checkpoint_files.read_manifest(root / checkpoint_files.name_of(step)))

    def all(self, pipeline: Any, found: Checkpoint | None) -> Result | None:
        config = self.job.config
        if pipeline is None:
            pipeline = self._phase("load", self._load)
        if config.job.checkpoint_steps:
            step_caches.check_kept(load.transformers_of(pipeline, adapter_of(pipeline)))
        seed = config.video.seed
        handle = install.sparsify(pipeline, attention=config.attention, seed=seed, ranks=self.ranks)
        self.on_gpu = pipeline.device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with heartbeat_hooks.beating(pipeline, self.pulse):
            return self._make(pipeline, handle, found)

    def _make(self, pipeline: Any, handle: Sparsified, found: Checkpoint | None) -> Result | None:
        config = self.job.config
        try:
            state = self._phase("encode", lambda: denoise.start(pipeline, config.video, self.ranks))
            if found is not None:
                self._resume(pipeline, handle, state, found)
            self._phase("denoise", lambda: self._denoise(pipeline, handle, state))
            denoise.finish(pipeline)
            density = handle.density()
        finally:
            handle.remove()
        frames = self._decode(pipeline, state)
        result = None if frames is None else self._finish(pipeline, handle, state, density, frames)
        self.writer.join()
        return result

    def _decode(self, pipeline: Any, state: Denoising) -> Frames | None:
        """Returns the frames on the first rank; the others help it where there are tiles to be shared."""
        frames: Frames | None = None
        if self.ranks.mesh.world_size > 1 and denoise.decodes_in_tiles(pipeline, state):
            beat = partial(self.pulse.beat, "decode")
            frames = self._phase("decode", lambda: denoise.decode_shared(pipeline, state, beat))
        elif self.leads:
            frames = self._phase("decode", lambda: denoise.decode(pipeline, state))
        return frames

    def _load(self) -> Any:
        config = self.job.config
        pipeline = load.load_pipeline(
            folder.locate(config.model.path),
            config.model,
            encoders="host" if self.leads else "none",
            share=config.job.share_weights,
        )
        # The first rank reads the encoders too. The others wait for it here, where starting takes what time it takes.
        self.ranks.largest([0], self.device)
        return pipeline

    def _finish(self, pipeline: Any, handle: Sparsified, state: Denoising, density: Density, frames: Frames) -> Result:
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
            mesh=self.ranks.mesh,
            decoded_in_tiles=denoise.decodes_in_tiles(pipeline, state),
            resumed_after=self.resumed_after,
        )

    def _phase(self, name: str, work: Callable[[], Any]) -> Any:
        self.watch(Progress(phase=name, step=self.step, steps=self.job.config.video.steps, seconds=0.0))
        self.pulse.beat(name)
        self.log("phase", phase=name)
        begin = time.perf_counter()
        result = work()
        self._wait()
        self.phase_seconds[name] = round(time.perf_counter() - begin, 4)
        return result

    def _resume(self, pipeline: Any, handle: Sparsified, state: Denoising, found: Checkpoint) -> None:
        """Puts the state of a checkpoint into a job that has just been started."""
        checkpoint.restore(found, handle.session, pipeline.scheduler, state)
        self.step = self.resumed_after = self.pulse.step = found.step
        self.step_seconds = found.step_seconds
        self.log("resume", step=found.step)
        if self.leads:
            self.say(f"goes on after step {found.step} of {self.job.config.video.steps}")

    def _keep(self, pipeline: Any, handle: Sparsified, state: Denoising, density: Density) -> None:
        """Writes a checkpoint, in the background, if it is time; ends the run if it was told to stop."""
        self.writer.check()
        due, stop = self._wanted()
        if due:
            begin = time.perf_counter()
            self.writer.join()
            tensors, scheduler = checkpoint.capture(handle.session, pipeline.scheduler, state)
            body = checkpoint.manifest(
                self.step, self.identity, scheduler, density, [*self.step_seconds], str(self.ranks.mesh)
            )
            self.writer.submit(self.step, tensors, body)
            self.stall_s, self.saved_at = time.perf_counter() - begin, time.monotonic()
        if stop:
            self.writer.join()
            place = f"after step {self.step}" if due else "from the beginning, without checkpoints,"
            line = f"told to stop; it goes on {place} with: semvid resume {self.job.folder}"
            if self.leads:
                self.job.stop("interrupted", step=self.step)
                self.say(line)
            # No rank leaves before all are here: the first that does is the end of all.
            self.ranks.largest([0], self.device)
            raise StoppedError(line)

    def _wanted(self) -> tuple[bool, bool]:
        """Returns whether to write a checkpoint now, and whether to stop; the same on every rank, which all enter."""
        options = self.job.config.job
        # One clock decides.
        waited = self.leads and 0 < options.checkpoint_seconds <= time.monotonic() - self.saved_at
        waited, stop = map(bool, self.ranks.largest([waited, self.told_to_stop()], self.device))
        if options.checkpoint_steps == 0:
            return False, stop
        return waited or stop or self.step % options.checkpoint_steps == 0, stop

    def _log_checkpoint(self, step: int, size: int, seconds: float) -> None:
        self.log("checkpoint", step=step, bytes=size, seconds=round(seconds, 4), stall_seconds=round(self.stall_s, 4))

    def _report_damage(self, name: str, reason: str) -> None:
        self.log("damaged", checkpoint=name, reason=reason)
        self.say(f"checkpoint {name} is damaged and passed over: {reason}")

    def _denoise(self, pipeline: Any, handle: Sparsified, state: Denoising) -> None:
        if self.job.config.job.checkpoint_steps:
            # What can't be held in a checkpoint is refused here and not after many steps.
            checkpoint.scheduler_state(pipeline.scheduler)
        steps = self.job.config.video.steps
        before, begin = handle.density(), time.perf_counter()
        with phases.recording(pipeline.device) as recorder:
            for step in denoise.steps(pipeline, state):
                self._wait()
                seconds = time.perf_counter() - begin
                now = handle.density()
                self.step = self.pulse.step = step + 1
                self.pulse.beat("step")
                self.step_seconds.append(seconds)
                self._log_step(seconds, now.minus(before), recorder.take())
                self.watch(Progress(phase="denoise", step=self.step, steps=steps, seconds=seconds))
                self._keep(pipeline, handle, state, now)
                before, begin = now, time.perf_counter()

    def _log_step(self, seconds: float, density: Density, phase_ms: dict[str, float]) -> None:
        self.log(
            "step",
            step=self.step,
            steps=self.job.config.video.steps,
            seconds=round(seconds, 4),
            density=round(density.sparse, 4),
            sparse_calls=density.sparse_calls,
            dense_calls=density.dense_calls,
            phase_ms={name: round(ms, 3) for name, ms in phase_ms.items()},
            peak_memory_bytes=self._peak_memory(),
        )

    def _wait(self) -> None:
        """Waits for the device, so that the clock measures what ran and not what was queued."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def _peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.on_gpu else None

    def _write(self, frames: Frames) -> str:
        fps = self.job.config.video.fps
        encoder = video.write_mp4(frames, self.job.video, fps, lambda: self.pulse.beat("write"))
        video.contact_sheet([("", frames)], self.job.contact)
        return encoder


def _kernels(handle: Sparsified, density: Density) -> dict[str, str]:
    """Returns which kernels did the dense and the sparse calls, where there were any."""
    kernels = {"dense": handle.dense_kernels, "sparse": handle.kernels}
    counts = asdict(density)
    return {kind: name for kind, name in kernels.items() if counts[f"{kind}_calls"]}
