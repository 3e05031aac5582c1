"""The Python door: `from semvid.runtime import sparsify`. Nothing heavy is imported until a name is used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semvid.runtime.models import Sparsified, load_pipeline, sparsify

__all__ = ["Sparsified", "load_pipeline", "sparsify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from semvid.runtime import models

    return getattr(models, name)
