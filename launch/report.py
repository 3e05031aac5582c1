"""What a person sees of a run: the bar, the summary, and the JSON line."""

import sys
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from semvid.runtime.config import measured
from semvid.runtime.generate import Progress, Result
from semvid.runtime.job import Job
from semvid.runtime.metrics import Density


class Bar:
    """A progress bar on stderr: one tick a denoising step, with the time left; names the phase."""

    def __init__(self, label: str = "") -> None:
        self.label = label
        self.bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(f"semvid: {text}", file=sys.stderr)

    def __call__(self, progress: Progress) -> None:
        """Shows `progress`; made to be a watcher of `generate`."""
        if self.bar is None:
            form = "{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps, {elapsed} gone, {remaining} left"
            self.bar = tqdm(total=progress.steps, bar_format=form, file=sys.stderr)
        self.bar.set_description_str(f"{self.label}{progress.phase:7}", refresh=False)
        if progress.phase == "encode":
            # The time left is the loop's; loading is not part of it.
            self.bar.reset()
        self.bar.n = progress.step
        self.bar.refresh()


def summary(job: Job, result: Result) -> list[str]:
    """Returns the lines that end a run."""
    times = result.phase_seconds
    rest = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items())
    slowest = max(result.step_seconds)
    lines = [
        f"video     {job.video}",
        f"encoder   {result.encoder}",
        f"step      {result.seconds_per_step:.3f} s (median of {len(result.step_seconds)}, slowest {slowest:.3f} s)",
        f"time      {rest}",
        f"density   {density_text(result.density)}",
        f"preset    {job.config.preset}{_where_measured(job.config.preset)}",
        f"decoding  {'in tiles' if result.decoded_in_tiles else 'whole'}",
        f"kernels   {', '.join(f'{kind}: {name}' for kind, name in result.kernels.items())}",
    ]
    if result.resumed_after:
        lines.append(f"resumed   after step {result.resumed_after}; phases are those of this run, steps are all")
    if result.mesh.world_size > 1:
        lines.append(f"mesh      {result.mesh}: {result.mesh.world_size} processes")
    if result.peak_memory_bytes is not None:
        which = "the GPU" if result.mesh.world_size == 1 else "the first GPU"
        lines.append(f"memory    {result.peak_memory_bytes / 2**30:.2f} GiB of {which} at most")
    return [*lines, f"frames    sha256 {result.frames_sha256}"]


def _where_measured(preset: str) -> str:
    """Returns what a preset's file says on where its values were measured, as the end of a line."""
    found = measured(preset)
    return "" if found is None else f"; measured on {found}"


def density_text(density: Density) -> str:
    """Returns the densities in words, with the calls they are over."""
    if density.sparse_calls == 0:
        return f"1 over all {density.calls} self-attention calls (all dense)"
    sparse = f"{density.sparse:.3f} over the {density.sparse_calls} sparse of {density.calls} self-attention calls"
    return f"{sparse}; {density.overall:.3f} over all"


def as_json(job: Job, result: Result, surroundings: dict[str, Any]) -> dict[str, Any]:
    """Returns a run as JSON values. Times in seconds, memory in bytes."""
    density = result.density
    return {
        "video": str(job.video),
        "job": str(job.folder),
        "preset": job.config.preset,
        "preset_measured": measured(job.config.preset),
        "steps": len(result.step_seconds),
        "seconds_per_step": result.seconds_per_step,
        "step_seconds": [round(x, 4) for x in result.step_seconds],
        "phase_seconds": result.phase_seconds,
        "density": density.sparse,
        "density_calls": density.sparse_calls or density.dense_calls,
        "density_over": "sparse calls" if density.sparse_calls else "all calls (all dense)",
        "density_all_calls": density.overall,
        "all_calls": density.calls,
        "kernels": result.kernels,
        "mesh": str(result.mesh),
        "gpus": result.mesh.world_size,
        "encoder": result.encoder,
        "decoded_in_tiles": result.decoded_in_tiles,
        "peak_memory_bytes": result.peak_memory_bytes,
        "resumed_after_step": result.resumed_after,
        "frames_sha256": result.frames_sha256,
        **surroundings,
    }


def say(lines: list[str], file: TextIO) -> None:
    """Prints lines."""
    print("\n".join(lines), file=file, flush=True)
