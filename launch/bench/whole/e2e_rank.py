"""One rank of `semvid bench e2e`: forward passes of a whole transformer of random weights, by kind; VAE and text."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from semvid.kernels.dispatch import select
from semvid.launch import machine
from semvid.launch.bench.video_options import E2eOptions
from semvid.launch.bench.whole.replay import Replay, layer_densities
from semvid.launch.ranks import mesh_choice
from semvid.parallel import xdit
from semvid.parallel.phases import recording
from semvid.parallel.ranks import Ranks, connect, join, leave, slowest
from semvid.parallel.windows import open_windows
from semvid.runtime.attention.session import Session
from semvid.runtime.layers.fp8_linears import quantize_linears
from semvid.runtime.layers.fused_blocks import fuse
from semvid.runtime.models import install, load, predicted_memory, published
from semvid.runtime.models.families.adapters import adapter
from semvid.runtime.models.sharding import shard_transformer, unshard_transformer
from semvid.runtime.xdit import UspProcessor

# As many steps as make every kind come by: dense, then refreshes and reuses by turns.
STEPS, FIRST_SPARSE = 50, 10
# What a phase of an attention call is part of. The rest of a forward pass is linear layers, norms, cross-attention, and
# on one GPU the attention of the layers that stay dense.
REST = "linear and rest"
# A dense pass with our blocks, and what is added to a row's name with linear layers in FP8.
OURS, FP8 = "dense, ours", ", fp8"
PARTS = {
    "attention": ("attend",),
    "clustering": ("seed", "cluster", "means", "map", "plan"),
    "exchange": ("all-reduce", "all-gather", "pack", "exchange", "join", "wait", "return"),
}


def run(rank: int, world: int, folder: str, options: E2eOptions) -> None:
    """Measures as rank `rank` of `world` and writes the result to `folder`/`rank`.json."""
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, machine.usable_cores() // world))
    if world > 1:
        join(device, (rank, world, f"{folder}/store"))
    load.quiet()
    with torch.no_grad():
        found = _Video(options, world, device).measure()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    leave()


class _Video:
    """One rank's share of the passes of one video."""

    def __init__(self, options: E2eOptions, world: int, device: torch.device) -> None:
        self.options, self.device, self.deployment = options, device, options.deployment
        mesh = mesh_choice.resolve_mesh(options.mesh, world, guided=self.deployment.guided)
        self.ranks = connect(mesh) if world > 1 else Ranks()
        self.family = adapter(self.deployment.model.family)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.branch = ("cond", "uncond")[self.ranks.place.cfg]

    def measure(self) -> dict[str, Any]:
        """Returns what was found; every rank measures the same passes in the same order."""
        found: dict[str, Any] = {"mesh": str(self.ranks.mesh), "dtype": str(self.dtype).removeprefix("torch.")}
        if "transformer" in self.options.parts:
            found |= self._transformer()
        self._free()
        # One decodes and encodes; the others wait at the end.
        if self.ranks.rank == 0 and "vae" in self.options.parts:
            found["vae"] = self._vae()
        if self.ranks.rank == 0 and "text" in self.options.parts:
            found["text"] = self._text()
        slowest(0.0, self.device)
        return found

    def _transformer(self) -> dict[str, Any]:
        changes = {} if self.options.layers is None else self._fewer(self.options.layers)
        model = published.build_transformer(
            self.deployment.model, self.device, self.dtype, seed=self.options.seed, **changes
        )
        weights = sum(x.numel() * x.element_size() for x in model.parameters())
        inputs = self._inputs(model)
        rows = self._rivals(model, inputs)
        session, replay = self._install(model)
        rows += self._sparse(model, inputs, session)
        found = self._state(session, replay)
        # Everything is compiled by now.
        rows.append(self._time(OURS, partial(self._forward, model, inputs, 0), warmup=0, repeats=1))
        if self.options.fp8:
            quantize_linears(self.family.blocks(model), self.family.facts.heavy, session.ops)
            self._free()
            rows += self._sparse(model, inputs, session, FP8)
            rows.append(self._time(OURS + FP8, partial(self._forward, model, inputs, 0), warmup=0, repeats=1))
        return found | {"layers": len(self.family.attentions(model)), "weights_bytes": weights, "rows": rows}

    def _state(self, session: Session, replay: Replay) -> dict[str, Any]:
        """Returns what the sparse passes have left in the session."""
        memories = session.cache.memories
        own = sorted(place for place in memories if place[1] == self.branch)
        densities = [round(float(memories[place].density.mean()), 4) for place in own]
        sizes = torch.cat([x.keys.sizes.flatten() for x in memories.values()]).double().cpu()
        return {
            "backend": session.ops.name,
            "windows": session.windows is not None,
            "state_bytes": tensor_bytes(list(memories.values())),
            "density": sum(densities) / len(densities),
            "density_of_layers": densities,
            "drawn_layers": len(replay.drawn),
            "key_cluster_sizes": [round(float(sizes.quantile(q))) for q in (0.0, 0.5, 1.0)],
        }

    def _rivals(self, model: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the rows of dense passes that are not ours."""
        if self.ranks.mesh.sequence == 1:
            return [self._stock(model, inputs)]
        if self.device.type == "cuda":
            # Of cross-attention; self-attention is another's, or ours.
            model.set_attention_backend(load.CUDNN)
        if not self.options.usp:
            return []
        return [self._usp(model, inputs)]

    def _usp(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns the row of diffusers' blocks with xfuser's USP as their attention."""
        session = Session(self.deployment.config.attention, select(self.options.backend, self.device), 0, self.ranks)
        xdit.initialize(self.ranks)
        shard_transformer(model, session, self.family.plan(model))
        attentions = self.family.attentions(model)
        before = [attention.processor for attention in attentions]
        for attention in attentions:
            attention.set_processor(UspProcessor(session))
        name = f"dense, xfuser USP {xdit.dense_backend()}"
        row = self._time(name, partial(self._forward, model, inputs, 0))
        for attention, stock in zip(attentions, before, strict=True):
            attention.set_processor(stock)
        unshard_transformer(model, self.family.plan(model))
        xdit.release()
        return row

    def _stock(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns the row of diffusers' own dense pass by the fastest backend that takes it; a mask may keep it out."""
        call = partial(self._forward, model, inputs, 0)
        for backend in (load.CUDNN, "native") if self.device.type == "cuda" else ("native",):
            model.set_attention_backend(backend)
            try:
                return self._time(f"dense, diffusers {backend}", call)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if backend == "native":
                    raise
        raise AssertionError("the last backend returns or raises")

    def _sparse(self, model: Any, inputs: dict[str, Any], session: Session, suffix: str = "") -> list[dict[str, Any]]:
        """Returns the rows of the first refresh, of later ones and of reuses."""
        # The maps are drawn in this pass, so it is not timed.
        self._forward(model, inputs, FIRST_SPARSE)
        session.reset()
        first = self._time(f"first{suffix}", partial(self._forward, model, inputs, FIRST_SPARSE), warmup=0, repeats=1)
        if self._keeps_both():
            # One rank runs the other branch too, and peaks with the clusters of both.
            self._forward(model, inputs, FIRST_SPARSE, "uncond")
        timed: dict[str, list[tuple[float, dict[str, float], int]]] = {"reuse": [], "refresh": []}
        for i in range(2 * (self.options.repeats + 1)):
            # The odd steps reuse what the even ones have refreshed; the first two warm up.
            one = self._once(partial(self._forward, model, inputs, FIRST_SPARSE + 1 + i))
            if i >= 2:
                timed[("reuse", "refresh")[i % 2]].append(one)
        return [first, *(_row(name + suffix, timed[name]) for name in ("refresh", "reuse"))]

    def _keeps_both(self) -> bool:
        """Returns whether a rank keeps clusters of two branches."""
        alone = self.deployment.config.attention.share_branches == "no"
        return self.deployment.guided and self.ranks.mesh.cfg == 1 and alone

    def _install(self, model: Any) -> tuple[Session, Replay]:
        """Puts semvid's attention with replayed densities into the transformer."""
        attention = replace(
            self.deployment.config.attention,
            dense_steps=FIRST_SPARSE / STEPS,
            least_dense_steps=0,
            refresh="fixed",
            refresh_every=2,
            method="clusters",
        )
        ops = select(self.options.backend, self.device)
        layers = self.family.attentions(model)
        densities = layer_densities(
            self.deployment.model, len(layers), scale=self.options.density_scale, mean=self.options.density
        )
        replay = Replay(ops, densities, self.ranks, self.options.seed)
        session = Session(attention, replay.ops(), self.options.seed, self.ranks)
        fuse(self.family.blocks(model), ops)
        if self.ranks.mesh.sequence > 1:
            shard_transformer(model, session, self.family.plan(model))
            session.windows = open_windows(self.ranks, self.device)
        scheduler = SimpleNamespace(step_index=0, timesteps=range(STEPS))
        install.install(model, 0, lambda: scheduler, session, self.family)
        replay.follow(layers)
        return session, replay

    def _inputs(self, model: Any) -> dict[str, Any]:
        """Returns random latents of the video's size, a timestep and a prompt, as the transformer takes them."""
        video, geometry = self.deployment.config.video, self.deployment.model.geometry
        size = (
            (video.frames - 1) // geometry.frames_per_latent + 1,
            video.height // geometry.pixels_per_latent,
            video.width // geometry.pixels_per_latent,
        )
        torch.manual_seed(self.options.seed)
        like = torch.empty(0, device=self.device, dtype=self.dtype)
        latents = torch.randn(1, model.config.out_channels, *size, device=self.device)
        more = model.config.in_channels - latents.shape[1]
        condition = torch.randn(1, more, *size, device=self.device) if more else None
        timestep = torch.tensor(500.0, device=self.device)
        told = self.family.inputs(latents, timestep, condition, self.dtype)
        return told | self.family.drawn_prompt(model.config, like)

    def _forward(self, model: Any, inputs: dict[str, Any], step: int, branch: str | None = None) -> Tensor:
        with model.cache_context(branch or self.branch, step_index=step, num_inference_steps=STEPS):
            out: Tensor = model(**inputs, return_dict=False)[0]
        return out

    def _fewer(self, layers: int) -> dict[str, int]:
        """Returns the configuration of a transformer with fewer layers, of both kinds where there are two."""
        table = self.deployment.model.transformer
        if "num_single_layers" not in table:
            return {"num_layers": layers}
        double = max(1, layers * table["num_layers"] // self.deployment.model.geometry.layers)
        return {"num_layers": double, "num_single_layers": layers - double}

    def _time(
        self, name: str, call: Callable[[], Tensor], *, warmup: int = 1, repeats: int | None = None
    ) -> dict[str, Any]:
        for _ in range(warmup):
            call()
        return _row(name, [self._once(call) for _ in range(repeats or self.options.repeats)])

    def _once(self, call: Callable[[], Tensor]) -> tuple[float, dict[str, float], int]:
        """Returns the seconds of one pass where it takes longest, the ms of its phases here, and its peak memory.

        Raises:
            RuntimeError: its result is not finite.
        """
        self._ready()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with recording(self.device) as recorder:
            begin = recorder.mark(on_host=False)
            out = call()
            recorder.add("all", begin, recorder.mark(on_host=False))
        if not torch.isfinite(out).all():
            raise RuntimeError("a forward pass of random weights is not finite: its times would mean nothing")
        phases, peak = recorder.milliseconds(), 0
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        return slowest(phases.pop("all") / 1e3, self.device), phases, peak

    def _vae(self) -> dict[str, Any]:
        """Times the decoding of the video's latents, as `semvid run` would decode them."""
        model, video = self.deployment.model, self.deployment.config.video
        vae = published.build_vae(model, self.device)
        tiled = predicted_memory.is_tiled(model.vae, video.frames, video.height, video.width)
        if tiled:
            vae.enable_tiling()
        geometry = model.geometry
        channels = model.vae.get("z_dim") or model.vae["latent_channels"]
        frames = (video.frames - 1) // geometry.frames_per_latent + 1
        size = (frames, video.height // geometry.pixels_per_latent, video.width // geometry.pixels_per_latent)
        latents = torch.randn(1, channels, *size, device=self.device, dtype=vae.dtype)
        seconds, peak = self._alone(lambda: vae.decode(latents, return_dict=False)[0])
        return {"seconds": seconds, "peak_bytes": peak, "tiled": tiled}

    def _text(self) -> list[dict[str, Any]]:
        """Times each encoder on as many tokens as it reads at most."""
        rows = []
        for encoder in self.deployment.model.encoders:
            made = published.build_encoder(encoder, self.device, self.dtype)
            call = published.encoder_call(encoder, made)
            seconds, peak = self._alone(call)
            rows.append({"encoder": encoder.name, "seconds": seconds, "peak_bytes": peak})
            del made, call
            self._free()
        return rows

    def _alone(self, call: Callable[[], Any]) -> tuple[float, int | None]:
        """Returns the seconds of one call on this rank, the second of two, and its peak memory."""
        call()
        if self.device.type == "cpu":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin, None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with recording(self.device) as recorder:
            begin = recorder.mark(on_host=False)
            call()
            recorder.add("all", begin, recorder.mark(on_host=False))
        return recorder.milliseconds()["all"] / 1e3, torch.cuda.max_memory_allocated()

    def _ready(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        slowest(0.0, self.device)

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def tensor_bytes(value: Any) -> int:
    """Returns the bytes of all tensors in lists, tuples and dataclasses, each storage once."""
    found: dict[int, int] = {}

    def walk(part: Any) -> None:
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, list | tuple):
            for item in part:
                walk(item)
        elif is_dataclass(part):
            for field in fields(part):
                walk(getattr(part, field.name))

    walk(value)
    return sum(found.values())


def _row(name: str, timed: list[tuple[float, dict[str, float], int]]) -> dict[str, Any]:
    """Returns the median pass of a kind: its seconds, the parts of them, its peak memory."""
    ordered = sorted(timed, key=lambda one: one[0])
    seconds, phases, _ = ordered[(len(ordered) - 1) // 2]
    parts = {part: sum(phases.get(name, 0.0) for name in names) / 1e3 for part, names in PARTS.items()}
    return {
        "name": name,
        "seconds": seconds,
        "fastest": ordered[0][0],
        "slowest": ordered[-1][0],
        "repeats": len(timed),
        "parts": parts | {REST: seconds - sum(parts.values())} if phases else {},
        "phases_ms": {phase: round(ms, 3) for phase, ms in phases.items()},
        "peak_bytes": max(peak for *_, peak in timed) or None,
    }
