"""The transformer on sequence shards: every rank runs the whole model on its own tokens.

diffusers models publish as `_cp_plan` which inputs and outputs of which modules are split along which dimension, and
which outputs are gathered. The hooks here follow it with shards of any length, where diffusers' own want lengths that
divide.

Padding is zeros where it is split off and from there on whatever the token-wise layers make of zeros (biases,
modulation by the timestep): finite, and no other token's. Only attention mixes tokens, so it alone must leave padding
out; `Session.shard` says how many rows are tokens. Gathering drops it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models._modeling_parallel import ContextParallelInput
from torch import Tensor, nn

from semvid.parallel.shard import Shard
from semvid.runtime.attention.session import Session

HOOK = "semvid.shard"


@dataclass(frozen=True)
class PromptInput(ContextParallelInput):
    """Text rows of a joint sequence: shared like its video tokens, but of another length, `Session.prompt`'s."""


def shard_transformer(transformer: nn.Module, session: Session, plan: Mapping[str, Any] | None) -> None:
    """Makes `transformer` run on this rank's shard, inside; it takes and returns the whole latents as before.

    From then on every rank of `session.ranks.sequence` must run the same forward passes: gathering is a collective.
    Each pass learns the sequence's length from the first tensor that it splits, and leaves it in `session.shard`.

    Args:
        transformer: a diffusers model, not sharded yet.
        session: says which shard is this rank's.
        plan: of the form of diffusers' `_cp_plan`, or None.

    Raises:
        ValueError: the model has no plan.
    """
    if plan is None:
        model = type(transformer).__name__
        raise ValueError(f"{model} has no _cp_plan: its sequence can't be shared; accepted: ring=1,ulysses=1")
    for name, entry in plan.items():
        for module in _modules(transformer, name):
            hook = _SplitHook(session, entry) if isinstance(entry, Mapping) else _GatherHook(session, entry)
            _registry(module).register_hook(hook, f"{HOOK}:{name}")
    # Registered last it runs first, before the model's own inputs are split.
    _registry(transformer).register_hook(_PassHook(session), HOOK)


def unshard_transformer(transformer: nn.Module, plan: Mapping[str, Any] | None) -> None:
    """Makes a `transformer` sharded by `plan` run on the whole sequence again."""
    for name in plan or {}:
        for module in _modules(transformer, name):
            _registry(module).remove_hook(f"{HOOK}:{name}", recurse=False)
    _registry(transformer).remove_hook(HOOK, recurse=False)


class _PassHook(ModelHook):
    """Forgets the shard of the forward pass before: the next may be of another length."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.session.shard = None
        return args, kwargs


class _SplitHook(ModelHook):
    """Splits a module's inputs (by name) or outputs (by position) as its plan of ContextParallelInputs says."""

    def __init__(self, session: Session, plan: Mapping[str | int, Any]) -> None:
        super().__init__()
        self.session = session
        self.inputs = {name: entry for name, entry in plan.items() if isinstance(name, str)}
        self.outputs = {place: entry for place, entry in plan.items() if isinstance(place, int)}
        self.parameters: list[str] = []

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.parameters = list(inspect.signature(module.forward).parameters)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        # What came by position stays there, and likewise by name: wrappers further in may look for it.
        values = list(args)
        for name, entry in self.inputs.items():
            if name in kwargs:
                kwargs[name] = self._split_input(kwargs[name], entry)
            elif (place := self.parameters.index(name)) < len(values):
                values[place] = self._split_input(values[place], entry)
        return tuple(values), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return _replace(output, self.outputs, self._split)

    def _split_input(self, value: Any, entry: Any) -> Any:
        """Returns this rank's part of a tensor, or of each in a list whose entry is a list too."""
        if isinstance(value, list | tuple):
            return [self._split_input(x, e) for x, e in zip(value, entry, strict=True)]
        return value if value is None or entry.split_output else self._split(value, entry)

    def _split(self, x: Tensor, entry: Any) -> Tensor:
        """Returns this rank's rows; x itself where it has not the dimensions that the plan speaks of, as diffusers."""
        if entry.expected_dims not in (None, x.dim()):
            return x
        session = self.session
        if isinstance(entry, PromptInput):
            assert session.prompt is not None, "a hook on the transformer finds the prompt"
            return session.prompt.rows.split(x, entry.split_dim)
        if session.shard is None:
            session.shard = Shard(session.ranks.shard, session.ranks.mesh.sequence, x.shape[entry.split_dim])
        return session.shard.split(x, entry.split_dim)


class _GatherHook(ModelHook):
    """Gathers a module's outputs as its plan says: a ContextParallelOutput, or one (or None) for each output."""

    def __init__(self, session: Session, plan: Any) -> None:
        super().__init__()
        self.session = session
        entries = plan if isinstance(plan, list | tuple) else [plan]
        self.outputs = {place: entry for place, entry in enumerate(entries) if entry is not None}

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return _replace(output, self.outputs, self._gather)

    def _gather(self, x: Tensor, entry: Any) -> Tensor:
        shard = self.session.shard
        assert shard is not None, "the plan splits before it gathers"
        return shard.gather(x, entry.gather_dim, self.session.ranks.sequence)


def _replace(output: Any, entries: Mapping[int, Any], change: Callable[[Tensor, Any], Tensor]) -> Any:
    """Returns a module's output, a tensor or several, with `change` made to those that have an entry."""
    if not entries:
        return output
    parts = [output] if isinstance(output, Tensor) else list(output)
    for place, entry in entries.items():
        parts[place] = change(parts[place], entry)
    return parts[0] if isinstance(output, Tensor) else tuple(parts)


def _modules(transformer: nn.Module, name: str) -> list[nn.Module]:
    """Returns the modules of a plan's name: "" is the transformer, "blocks.*.attn" that of every block."""
    parents, star, rest = name.partition(".*")
    if not star:
        return [transformer.get_submodule(name)]
    return [module.get_submodule(rest.removeprefix(".")) for module in transformer.get_submodule(parents).children()]


def _registry(module: nn.Module) -> HookRegistry:
    return HookRegistry.check_if_exists_or_initialize(module)
