"""Putting semvid's attention into a pipeline, and out again."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

from semvid.kernels import dispatch
from semvid.parallel.ranks import Ranks
from semvid.parallel.windows import open_windows
from semvid.runtime.attention.density import Density
from semvid.runtime.attention.session import Position, Session
from semvid.runtime.config import AttentionConfig
from semvid.runtime.layers.fused_blocks import fuse, unfuse
from semvid.runtime.models.families.adapters import adapter_of
from semvid.runtime.models.families.family import Family, context_name
from semvid.runtime.models.folder import check_anchors
from semvid.runtime.models.load import transformers_of
from semvid.runtime.models.sharding import shard_transformer, unshard_transformer
from semvid.runtime.models.step_caches import check_caches, check_unchanged
from semvid.runtime.settings import resolve

HOOK = "semvid"


class Sparsified:
    """A pipeline with semvid's attention in it: reports density, forgets, and takes itself out again."""

    def __init__(self, pipeline: Any, session: Session, family: Family, stock: list[list[Any]]) -> None:
        self.pipeline = pipeline
        self.session = session
        self.family = family
        self._stock = stock

    @property
    def kernels(self) -> str:
        """The backend of the sparse ops: "reference", "triton", …"""
        return self.session.ops.name

    @property
    def dense_kernels(self) -> str:
        """Whose kernels do the dense calls."""
        ours = self.session.ranks.mesh.sequence > 1 or self.family.facts.joint
        return "PyTorch's" if ours else "diffusers"

    def density(self) -> Density:
        """Returns the densities of the current or last job, over its branches on all ranks.

        A collective where the branches are on several ranks: every rank must call it, and equally often.
        """
        return self.session.meter.read(self.session.ranks.cfg, self.pipeline.device)

    def reset(self) -> None:
        """Begins a new job by hand; a new call of the pipeline does it by itself."""
        self.session.reset()

    def remove(self) -> None:
        """Puts the attention back that was there. Doing it again does nothing."""
        for transformer, stock in zip(transformers_of(self.pipeline, self.family), self._stock, strict=False):
            for attention, processor in zip(self.family.attentions(transformer), stock, strict=True):
                attention.set_processor(processor)
            registry = registry_of(transformer)
            for name in [name for name in registry.hooks if name == HOOK or name.startswith(f"{HOOK}.family")]:
                take_out(registry, name)
            if self.session.ranks.mesh.sequence > 1:
                unshard_transformer(transformer, self.family.plan(transformer))
            unfuse(self.family.blocks(transformer))
        self._stock = []
        self.session.windows = None
        self.session.reset()


def sparsify(
    pipeline: Any,
    preset: str = "svg2",
    *,
    attention: AttentionConfig | None = None,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> Sparsified:
    """Puts semvid's attention into a diffusers pipeline and returns the handle that reports and removes it.

    Settings belong to this pipeline alone. Each call of the pipeline is a job of its own: clusters are kept from
    step to step inside it and forgotten between two.

    Args:
        pipeline: one of `semvid.runtime.models.families.facts.FAMILIES`.
        preset: a name (`semvid.runtime.settings.presets`) or a TOML file with [attention].
        attention: the whole setting, instead of a preset.
        seed: of the first centroids.
        ranks: this process among those of the job (`semvid.parallel.ranks.connect`); alone if absent. Where several
            share the sequence every one must call the pipeline alike. Where they share the branches the loop must be
            `semvid.runtime.jobs.denoise`'s: the pipeline's own runs both.

    Raises:
        ValueError: an unsupported pipeline, one that is sparsified already, a setting that is not accepted, a step
            cache that can't be with it, or a shared sequence where the model can't be sharded.
    """
    family = adapter_of(pipeline)
    models = transformers_of(pipeline, family)
    if any(type(model).__module__.startswith("xfuser") for model in models):
        # It splits the sequence by itself, behind this attention's back.
        raise ValueError("pipeline's transformer is xDiT's; accepted for those: semvid.runtime.xdit.register")
    if any(registry_of(model).get_hook(HOOK) is not None for model in models):
        raise ValueError("this pipeline is sparsified already; remove() that handle first")
    if attention is None:
        attention = resolve(None, {"video": {"prompt": "-"}}, preset=preset).attention
    check_anchors(attention, family.facts)
    check_device(pipeline.device)
    admit = _admission(models, family, ranks or Ranks(), attention)
    session = Session(attention, dispatch.select(attention.backend, pipeline.device), seed, ranks or Ranks())
    if attention.method != "dense":
        # First, so that everything else stays around it.
        for model in models:
            fuse(family.blocks(model), session.ops)
    if session.ranks.mesh.sequence > 1:
        for model in models:
            shard_transformer(model, session, family.plan(model))
        session.windows = open_windows(session.ranks, pipeline.device)
    stock = [
        install(model, number, lambda: pipeline.scheduler, session, family, admit)
        for number, model in enumerate(models)
    ]
    return Sparsified(pipeline, session, family, stock)


def check_device(device: torch.device) -> None:
    """Raises ValueError if a pipeline is on another GPU than the current one, on which kernels would be launched."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise ValueError(
            f"pipeline is on {device}, and the current device is cuda:{torch.cuda.current_device()}; accepted: "
            f"torch.cuda.set_device({device.index}) before"
        )


def _admission(models: list[Any], family: Family, ranks: Ranks, attention: AttentionConfig) -> Callable[[], None]:
    """Checks the step caches that are on the transformers, and returns what checks them again when a job begins; that
    refuses a pipeline that has been moved since, too: its ops were chosen for where it was.
    """
    shared = ranks.mesh.sequence > 1
    # Each branch on its own ranks, which wait for the other's clusters.
    together = shared or (ranks.mesh.cfg > 1 and attention.share_branches == "yes")
    before, device = check_caches(models, family.facts, together=together), models[0].device

    def admit() -> None:
        now = check_caches(models, family.facts, together=together)
        if shared:
            check_unchanged(before, now)
        if models[0].device != device:
            text = f"pipeline is on {models[0].device}, and was on {device} when it was sparsified"
            raise ValueError(f"{text}; accepted: sparsify after it is where it runs")

    return admit


def install(
    model: Any,
    number: int,
    scheduler: Callable[[], Any],
    session: Session,
    family: Family,
    admit: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Puts semvid's processors and hooks into one transformer and returns the processors that were there.

    Args:
        model: the transformer.
        number: its place among those of the pipeline.
        scheduler: returns the one of now, which says the step where the loop does not.
        session: of the job.
        family: of the model.
        admit: called when a job begins; refuses what has been put on the pipeline since.
    """
    stock, registry = [], registry_of(model)
    for layer, attention in enumerate(family.attentions(model)):
        stock.append(getattr(attention, "processor"))  # noqa: B009 - diffusers' classes have no common type
        attention.set_processor(family.processor(stock[-1], session, layer))
    for place, hook in enumerate(family.hooks(session)):
        registry.register_hook(hook, f"{HOOK}.family.{place}")
    registry.register_hook(PositionHook(session, scheduler, number, admit), HOOK)
    return stock


class PositionHook(ModelHook):
    """Tells the session, before each forward pass of the transformer, which step and branch it is.

    diffusers pipelines announce both through `cache_context`; where the step is not announced it is the scheduler's.
    """

    _is_stateful = True

    def __init__(
        self, session: Session, scheduler: Callable[[], Any], number: int = 0, admit: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self.number = number
        self.admit = admit
        self.session = session
        self.scheduler = scheduler
        # diffusers sets the context on every StateManager of a stateful hook.
        self.announced = StateManager(BaseState)

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.session.position is None:
            self.admit()
        context = self.announced.context
        step = self.scheduler().step_index if context.step_index is None else context.step_index
        steps = context.num_inference_steps or len(self.scheduler().timesteps)
        self.session.enter(Position(step or 0, steps, context_name(context.name, self.number)))
        if self.number:
            self._forget_earlier_transformers()
        return args, kwargs

    def _forget_earlier_transformers(self) -> None:
        """Frees what other transformers remember: they come one after the other and never back."""
        memories = self.session.cache.memories
        mine = {context_name(branch, self.number) for branch in ("cond", "uncond")}
        for place in [place for place in memories if place[1] not in mine]:
            del memories[place]

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.session.finish()
        return module


def take_out(registry: HookRegistry, name: str) -> None:
    """Removes a hook from among others.

    diffusers' own way loses the hook above it where that one has a forward of its own, as those of caches have: it puts
    what was below in place of that forward, and leaves the removed hook where that forward looks for what is below.
    """
    place = registry._hook_order.index(name) + 1
    above = registry._fn_refs[place] if place < len(registry._fn_refs) else None
    kept = None if above is None else above.forward
    registry.remove_hook(name, recurse=False)
    if above is not None and above.original_forward is not None:
        above.original_forward, above.forward = above.forward, kept


def registry_of(transformer: torch.nn.Module) -> HookRegistry:
    """Returns diffusers' hooks of `transformer`."""
    return HookRegistry.check_if_exists_or_initialize(transformer)
