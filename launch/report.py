"""What a person sees of a run: the bar, the summary, and the JSON line."""

import json
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from tqdm import tqdm

from semvid.runtime.jobs.job import Job
from semvid.runtime.settings import measured

if TYPE_CHECKING:
    from semvid.runtime.jobs.generate import Progress, Result

NAME = "report.json"
SPARSE = "sparse calls"


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

    def __call__(self, progress: "Progress") -> None:
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


def summary(report: Mapping[str, Any]) -> list[str]:
    """Returns the lines that end a run, from `as_json`."""
    rest = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["phase_seconds"].items())
    steps, slowest = report["steps"], max(report["step_seconds"])
    lines = [
        f"video     {report['video']}",
        f"encoder   {report['encoder']}",
        f"step      {report['seconds_per_step']:.3f} s (median of {steps}, slowest {slowest:.3f} s)",
        f"time      {rest}",
        f"density   {_density_text(report)}",
        f"preset    {report['preset']}{_where_measured(report['preset_measured'])}",
        f"decoding  {_decoding_text(report)}",
        f"kernels   {', '.join(f'{kind}: {name}' for kind, name in report['kernels'].items())}",
    ]
    if report["resumed_after_step"]:
        after = report["resumed_after_step"]
        lines.append(f"resumed   after step {after}; phases are those of this run, steps are all")
    if report["gpus"] > 1:
        lines.append(f"mesh      {report['mesh']}: {report['gpus']} processes")
    if report["peak_memory_bytes"] is not None:
        which = "the GPU" if report["gpus"] == 1 else "the first GPU"
        lines.append(f"memory    {report['peak_memory_bytes'] / 2**30:.2f} GiB of {which} at most")
    return [*lines, f"frames    sha256 {report['frames_sha256']}"]


def _where_measured(found: str | None) -> str:
    """Returns what a preset's file says on where its values were measured, as the end of a line."""
    return "" if found is None else f"; measured on {found}"


def _decoding_text(report: Mapping[str, Any]) -> str:
    """Returns how the VAE decoded, and on how many GPUs."""
    if not report["decoded_in_tiles"]:
        return "whole" if report["gpus"] == 1 else "whole, on the first GPU"
    return "in tiles" if report["gpus"] == 1 else f"in tiles, shared among {report['gpus']} processes"


def _density_text(report: Mapping[str, Any]) -> str:
    """Returns the densities in words, with the calls they are over."""
    calls, sparse_calls = report["all_calls"], report["density_calls"]
    if report["density_over"] != SPARSE:
        return f"1 over all {calls} self-attention calls (all dense)"
    sparse = f"{report['density']:.3f} over the {sparse_calls} sparse of {calls} self-attention calls"
    return f"{sparse}; {report['density_all_calls']:.3f} over all"


def as_json(job: Job, result: "Result", surroundings: dict[str, Any]) -> dict[str, Any]:
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
        "density_over": SPARSE if density.sparse_calls else "all calls (all dense)",
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


def keep(job: Job, report: Mapping[str, Any]) -> None:
    """Writes a run's report into its folder, whole or not at all."""
    part = job.folder / f".{NAME}.part"
    part.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(job.folder / NAME)


def tell(job: Job, as_json: bool) -> None:
    """Prints the report of a job that is done: the summary, and with `as_json` one JSON object on stdout."""
    report = json.loads((job.folder / NAME).read_text(encoding="utf-8"))
    say(summary(report), sys.stderr if as_json else sys.stdout)
    if as_json:
        say([json.dumps(report, allow_nan=False)], sys.stdout)
