"""The adapter of each family."""

from typing import Any

from semvid.runtime.models.families import facts
from semvid.runtime.models.families.facts import Facts
from semvid.runtime.models.families.family import Family
from semvid.runtime.models.families.hunyuan import Hunyuan
from semvid.runtime.models.families.wan import Wan
from semvid.runtime.models.families.wan_image import WanImage
from semvid.runtime.models.families.wan_pair import WanPair
from semvid.runtime.models.families.wan_small import WanSmall

ADAPTERS: tuple[type[Family], ...] = (Wan, WanImage, WanPair, WanSmall, Hunyuan)


def adapter(family: Facts) -> Family:
    """Returns the adapter of a family."""
    (found,) = (kind for kind in ADAPTERS if kind.facts.name == family.name)
    return found()


def adapter_of(pipeline: Any) -> Family:
    """Returns the adapter of a loaded pipeline.

    Raises:
        ValueError: a pipeline of no supported family, or one whose transformers are missing or of another class.
    """
    config = getattr(pipeline, "config", None)
    index = {name: getattr(config, name, None) for name in ("boundary_ratio", "expand_timesteps")}
    second = getattr(pipeline, "transformer_2", None)
    index |= {"_class_name": type(pipeline).__name__, "transformer_2": [None if second is None else "diffusers"]}
    try:
        family = facts.recognize(index)
    except ValueError as error:
        raise ValueError(f"pipeline is {error}") from None
    for name in family.transformers:
        if getattr(pipeline, name, None) is None:
            raise ValueError(f"pipeline is a {family.pipeline} without {name!r}, which {family.title} needs")
    return adapter(family)
