"""diffusers' step caches around semvid's attention: which are on, and which can't be where.

A cache skips blocks or attention layers at some steps. What is skipped is not counted and does not age clusters: these
go by the number of the step, so the next call that does run refreshes what is due.
"""

from collections.abc import Sequence

import torch

from semvid.runtime.models.families.facts import Facts

# By what the names of their hooks' classes begin with.
CACHES = {
    "FBC": "FirstBlockCache",
    "FasterCache": "FasterCache",
    "MagCache": "MagCache",
    "PyramidAttentionBroadcast": "PyramidAttentionBroadcast",
    "SeaCache": "SeaCache",
    "TaylorSeerCache": "TaylorSeerCache",
}
# Those that keep one state and not one for each branch: the second branch would take the first one's attention.
BRANCHLESS = {"FasterCache", "PyramidAttentionBroadcast"}
# Those that compare tensors to decide whether to skip: each GPU would by its own tokens, and one that skips alone
# leaves the others waiting.
BY_CONTENT = {"FirstBlockCache", "SeaCache"}
BY_STEP = "MagCache, TaylorSeerCache"


def caches_of(transformer: torch.nn.Module) -> set[str]:
    """Returns the names of the caches whose hooks are on a transformer or its modules."""
    registries = [getattr(module, "_diffusers_hook", None) for module in transformer.modules()]
    hooks = {type(hook).__name__ for registry in registries if registry is not None for hook in registry.hooks.values()}
    return {cache for start, cache in CACHES.items() if any(name.startswith(start) for name in hooks)}


def check_caches(transformers: Sequence[torch.nn.Module], family: Facts, *, together: bool) -> list[set[str]]:
    """Returns the caches on each transformer of a pipeline.

    Args:
        transformers: of the pipeline.
        family: that it is of.
        together: whether several GPUs share the sequence, or the clusters of their branches.

    Raises:
        ValueError: a cache gives another result than it says, or GPUs would wait for each other.
    """
    found = [caches_of(transformer) for transformer in transformers]
    names = set().union(*found)
    if family.branches > 1 and names & BRANCHLESS:
        text = f"step cache is {_list(names & BRANCHLESS)}, which mixes the two branches of {family.title}"
        raise ValueError(f"{text}; accepted: FirstBlockCache, SeaCache, {BY_STEP}")
    if together and names & BY_CONTENT:
        text = (
            f"step cache is {_list(names & BY_CONTENT)}, by which each GPU that shares the sequence, or its branches' "
            "clusters, decides for itself"
        )
        raise ValueError(f"{text}; accepted: {BY_STEP}")
    for transformer, there in zip(transformers, found, strict=True):
        config = type(getattr(transformer, "_cache_config", None)).__name__
        if config == "TaylorSeerCacheConfig" and not there:
            text = f"TaylorSeerCacheConfig.cache_identifiers match no layer of {family.title}"
            raise ValueError(rf"{text}; accepted: such as ['blocks\.\d+\.attn1'], or use_lite_mode=True")
    return found


def check_unchanged(before: Sequence[set[str]], now: Sequence[set[str]]) -> None:
    """Checks that a pipeline whose sequence is shared has the caches that it had when it was shared out.

    Raises:
        ValueError: another one is there: put on later it sees the whole sequence in the first block and a part of it in
            the last.
    """
    if list(before) != list(now):
        text = f"step cache is {_list(set().union(*now)) or 'none'}, and was another when the sequence was shared"
        raise ValueError(f"{text}; accepted: enable_cache and disable_cache before sparsify, or after remove")


def check_kept(transformers: Sequence[torch.nn.Module]) -> None:
    """Checks that a job which writes checkpoints has no step cache.

    Raises:
        ValueError: it has: what a cache remembers is in no checkpoint, and a job that goes on would end otherwise.
    """
    names = set().union(*(caches_of(transformer) for transformer in transformers))
    if names:
        text = f"step cache is {_list(names)}, whose state no checkpoint holds"
        raise ValueError(f"{text}; accepted: none, or job.checkpoint_steps = 0")


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))
