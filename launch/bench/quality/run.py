"""`semvid bench quality`: how close each method comes to dense attention, at what density and in what time."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from semvid.launch import machine
from semvid.launch.bench.quality import methods as quality_methods
from semvid.launch.bench.quality import plot
from semvid.launch.bench.quality import report as quality_report
from semvid.launch.bench.quality.baselines import by_blocks, by_exact_mass
from semvid.launch.bench.quality.methods import Method, config_of
from semvid.launch.bench.quality.probe import ROWS, Probe
from semvid.launch.bench.quality.settings import read_settings
from semvid.parallel.phases import recording
from semvid.runtime.attention.density import Density
from semvid.runtime.attention.schedule import num_dense_steps
from semvid.runtime.config import AttentionConfig, Config, VideoConfig
from semvid.runtime.jobs import denoise
from semvid.runtime.jobs.likeness import Frames, likeness_on, relative_error
from semvid.runtime.models import folder, install, load
from semvid.runtime.settings import resolve

# Of the demo model's card. Seed i goes with prompt i.
PROMPTS = (
    "a big grey bunny standing in a meadow with fruit on the grass",
    "a flying squirrel gliding in a blue sky with clouds",
    "a big grey bunny walking in a dark forest",
    "a striped red ball moving left over grass, camera pans right",
    "a big white bunny smiling under a blue sky",
    "three rodents on a tree root in a meadow",
)
# The run whose clusters the oracle's map is compared on.
GAP = "ours-0.1"
WARM_UP = {"steps": 4, "every": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is measured."""

    model: str = "demo"
    size: tuple[int, int, int] = (33, 160, 288)
    """Frames, height, width."""
    steps: int = 30
    prompts: int = 2
    methods: tuple[str, ...] = ()
    """Names or families; all without any."""
    probe_every: int = 4
    """The sparse calls of every so-many-th step are compared with exact attention."""
    device: str = "auto"
    settings: Path | None = None
    """A file of settings beside the built-in methods; see `read_settings`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What one run of the loop made and took."""

    state: denoise.Denoising
    """Finished: its latents are the result."""
    density: Density
    seconds: float
    """Of all steps; where some are probed, those of their kind stand for them."""
    phase_ms: dict[str, float]


def check(options: Options) -> tuple[Config, list[Method]]:
    """Returns the configuration of the dense runs, and the methods that are compared with them; loads no model.

    Raises:
        ValueError: a size that the model can't make, an unknown method, a setting or a number that is not accepted.
    """
    accepted = {"prompts": f"1 .. {len(PROMPTS)}", "steps": "2 or more", "probe_every": "1 or more"}
    fits = {
        "prompts": 1 <= options.prompts <= len(PROMPTS),
        "steps": options.steps >= 2,
        "probe_every": options.probe_every >= 1,
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; accepted: {accepted[name]}")
    where = folder.locate(options.model)
    geometry = folder.inspect(where)
    if geometry.family.joint:
        what = f"{geometry.family.title}, whose attended sequence has text in it"
        raise ValueError(f"--model is {options.model!r}, a model of {what}; accepted: one of video tokens alone")
    frames, height, width = options.size
    video = {"frames": frames, "height": height, "width": width, "steps": options.steps, "prompt": PROMPTS[0]}
    model = {"path": options.model, "device": options.device}
    config = resolve(None, {"video": video, "model": model}, checkpoint=folder.defaults(where), preset="dense")
    folder.check(config, geometry)
    wanted = _wanted(options, geometry.tokens(config.video))
    for method in wanted:
        try:
            folder.check(replace(config, attention=config_of(method)), geometry)
        except ValueError as error:
            raise ValueError(f"method {method.name}: {error}") from None
    return config, wanted


def _wanted(options: Options, tokens: int) -> list[Method]:
    """Returns the methods to run, built-in ones first."""
    methods = quality_methods.methods(tokens)
    if options.settings is not None:
        methods += read_settings(options.settings, methods)
    return quality_methods.chosen(methods, options.methods)


def run(options: Options, out: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], list[str]]:
    """Returns the report and its lines, and writes quality.json (after every run) and plots into `out`.

    What an earlier call with the same options has measured there is kept and not run again.

    Args:
        options: what is measured.
        out: a folder, made if absent.
        say: told each run's outcome.

    Raises:
        ValueError: as `check`, or `out` holds a report of other options.
    """
    config, wanted = check(options)
    geometry = folder.inspect(folder.locate(options.model))
    report = _begin(options, out, geometry.tokens(config.video))
    _check_kept(report, wanted)
    load.quiet()
    out.mkdir(parents=True, exist_ok=True)
    pipeline = load.load_pipeline(folder.locate(config.model.path), config.model)
    report |= machine.surroundings(pipeline.device.type)
    bench = _Bench(pipeline, options, report, out, say)
    for number, prompt in enumerate(PROMPTS[: options.prompts]):
        bench.prompt(replace(config.video, prompt=prompt, seed=number), number, wanted)
    report["summary"] = quality_report.summary(report)
    _write(out / "quality.json", report)
    lines = quality_report.lines(report)
    missing = plot.plots(report, out)
    return report, [*lines, *([missing] if missing else []), f"report    {out / 'quality.json'}"]


class _Bench:
    """All runs on one loaded pipeline."""

    def __init__(
        self, pipeline: Any, options: Options, report: dict[str, Any], out: Path, say: Callable[[str], None]
    ) -> None:
        self.pipeline = pipeline
        self.options = options
        self.report = report
        self.out = out
        self.say = say
        self.warm: set[str] = set()

    def prompt(self, video: VideoConfig, number: int, wanted: Sequence[Method]) -> None:
        """Measures what is wanted and not yet there, for one prompt."""
        done = {run["method"] for run in self.report["runs"] if run["prompt"] == number}
        left = [method for method in wanted if method.name not in done]
        if not left and "dense" in done:
            return
        latents, frames = self._dense(video, number)
        for method in left:
            made, probe = self._made(video, method)
            found = denoise.decode(self.pipeline, made.state)
            psnr, ssim = likeness_on(found, frames, self.pipeline.device)
            self._keep(
                method=method.name,
                family=method.family,
                attention=dict(method.attention),
                prompt=number,
                **_of_run(made),
                psnr=psnr,
                ssim=ssim,
                latent_error=relative_error(made.state.latents, latents),
                calls=probe.found,
            )

    def _dense(self, video: VideoConfig, number: int) -> tuple[Tensor, Frames]:
        """Returns dense latents and frames, from the disk if they are there."""
        path = self.out / f"dense-{number}.safetensors"
        if not path.is_file():
            dense = Method(name="dense", family="dense", attention={"method": "dense"})
            made, _ = self._made(video, dense)
            frames = denoise.decode(self.pipeline, made.state)
            save_file({"latents": made.state.latents.cpu(), "frames": torch.from_numpy(frames)}, path)
            if not any(run["method"] == "dense" and run["prompt"] == number for run in self.report["runs"]):
                self._keep(method="dense", family="dense", attention={}, prompt=number, **_of_run(made))
        stored = load_file(path)
        return stored["latents"].to(self.pipeline.device), stored["frames"].numpy()

    def _made(self, video: VideoConfig, method: Method) -> tuple[Made, Probe]:
        attention = config_of(method)
        if self.pipeline.device.type == "cuda" and method.name not in self.warm:
            # Kernels are compiled here and not on the clock.
            every = min(attention.refresh_every, WARM_UP["every"])
            short = replace(attention, dense_steps=0.0, least_dense_steps=0, refresh_every=every)
            self._loop(replace(video, steps=WARM_UP["steps"]), method, short)
            self.warm.add(method.name)
        return self._loop(video, method, attention)

    def _loop(self, video: VideoConfig, method: Method, attention: AttentionConfig) -> tuple[Made, Probe]:
        handle = install.sparsify(self.pipeline, attention=attention, seed=video.seed)
        session = handle.session
        if method.rival is not None:
            session.renew = by_blocks(method.block) if method.rival == "blocks" else by_exact_mass
        probe = Probe(session, self.options.probe_every, gap=method.name == GAP)
        session.probe = probe
        try:
            state = denoise.start(self.pipeline, video)
            # Not the text encoder's attention: its mask leaves no choice of kernel.
            other = _other_backend(method.family == "noise", self.pipeline.device)
            with other, recording(self.pipeline.device) as recorder:
                times = list(self._timed(state))
            denoise.finish(self.pipeline)
            density = handle.density()
        finally:
            handle.remove()
        first = num_dense_steps(attention, video.steps) if attention.method != "dense" else 0
        seconds = _without_probes(times, first, probe)
        return Made(state=state, density=density, seconds=seconds, phase_ms=recorder.milliseconds()), probe

    def _timed(self, state: denoise.Denoising) -> Iterator[float]:
        self._wait()
        begin = time.perf_counter()
        for _ in denoise.steps(self.pipeline, state):
            self._wait()
            now = time.perf_counter()
            yield now - begin
            begin = now

    def _wait(self) -> None:
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize()

    def _keep(self, **found: Any) -> None:
        self.report["runs"].append(found)
        _write(self.out / "quality.json", self.report)
        self.say(quality_report.run_line(found))


def _of_run(made: Made) -> dict[str, Any]:
    density = made.density
    return {
        "density": density.sparse,
        "density_all_calls": density.overall,
        "sparse_calls": density.sparse_calls,
        "calls_in_all": density.calls,
        "seconds": made.seconds,
        "phase_ms": made.phase_ms,
    }


def _without_probes(times: Sequence[float], first: int, probe: Probe) -> float:
    """Returns the seconds of all steps, the mean of a kind's other steps standing for each that was probed.

    The kinds are the dense steps, before `first`, and the others.
    """
    total = 0.0
    for kind in (range(first), range(first, len(times))):
        clean = [times[step] for step in kind if step < first or not probe.looks_at(step)]
        if kind:
            total += len(kind) * sum(clean) / len(clean) if clean else sum(times[step] for step in kind)
    return total


@contextlib.contextmanager
def _other_backend(other: bool, device: torch.device) -> Iterator[None]:
    """Lets PyTorch's dense attention take another kernel than it would by itself."""
    if not other:
        yield
        return
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION if device.type == "cuda" else SDPBackend.MATH]):
        yield


def _begin(options: Options, out: Path, tokens: int) -> dict[str, Any]:
    """Returns the report that `out` holds, or a new one."""
    what = {
        "model": options.model,
        "size": "x".join(map(str, options.size)),
        "tokens": tokens,
        "steps": options.steps,
        "probe_every": options.probe_every,
    }
    path = out / "quality.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in what if found.get(name) != what[name]]
        if differing:
            name = differing[0]
            raise ValueError(
                f"--out holds a report of {name} {found.get(name)!r}, not {what[name]!r}; accepted: another folder"
            )
        return found
    return {**what, "rows_compared": ROWS, "prompts": list(PROMPTS), "runs": []}


def _check_kept(report: dict[str, Any], wanted: Sequence[Method]) -> None:
    """Raises ValueError if a method that was measured before has other settings now: its figures would be kept."""
    settings = {method.name: json.loads(json.dumps(dict(method.attention))) for method in wanted}
    for found in report["runs"]:
        now = settings.get(found["method"], found["attention"])
        differing = sorted(key for key in {*now, *found["attention"]} if now.get(key) != found["attention"].get(key))
        if differing:
            raise ValueError(
                f"--out holds a run of {found['method']} with another {differing[0]}; accepted: another folder or name"
            )


def _write(path: Path, report: dict[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def as_options(model: str, size: str, **others: Any) -> Options:
    """Returns options of a command line's words.

    Raises:
        ValueError: a size of another form.
    """
    parts = size.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--size is {size!r}; accepted: frames x height x width, such as 33x160x288")
    return Options(model=model, size=(int(parts[0]), int(parts[1]), int(parts[2])), **others)
