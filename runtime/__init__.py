"""The Python door: `from semvid.runtime import sparsify`. Nothing heavy is imported until a name is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semvid.runtime.models.install import Sparsified, sparsify
    from semvid.runtime.models.load import load_pipeline

__all__ = ["Sparsified", "load_pipeline", "sparsify"]
HOMES = {"Sparsified": "install", "load_pipeline": "load", "sparsify": "install"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"semvid.runtime.models.{HOMES[name]}"), name)
