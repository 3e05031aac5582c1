"""A configuration from layers of TOML, and back. Needs no torch.

Each layer lies over the one before: the defaults of `semvid.runtime.config`, `semvid.toml` in the checkpoint folder,
the preset, a configuration file, the command line.
"""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from semvid.runtime.config import Config, check, require

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEMO_MODEL = CONFIGS / "demo-model"
DEPLOYMENTS = CONFIGS / "deployments"

T = TypeVar("T")
Layer = Mapping[str, Any]


def presets() -> list[str]:
    """Returns the names of the presets that semvid carries."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def deployments() -> list[str]:
    """Returns the names of the deployments that semvid carries: a published model, a video's size, a number of GPUs."""
    return sorted(path.stem for path in DEPLOYMENTS.glob("*.toml"))


def config_file(path: Path) -> Path:
    """Returns the file of --config: that of a deployment where `path` is its name, else `path`."""
    return DEPLOYMENTS / f"{path}.toml" if str(path) in deployments() else path


def read_toml(path: Path, option: str) -> dict[str, Any]:
    """Returns a TOML file's content.

    Raises:
        ValueError: it can't be read or is no TOML; the message names `option`.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} is {str(path)!r}, which can't be read: {_reason(error)}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{option} is {str(path)!r}, which is no valid TOML: {error}") from None


def read_preset(name: str, option: str = "--preset") -> dict[str, Any]:
    """Returns the [attention] table of a preset: a name of `presets`, or the path of a TOML file.

    Raises:
        ValueError: no such preset or file, or the file holds something other than [attention].
    """
    path = Path(name) if name.endswith(".toml") else CONFIGS / f"{name}.toml"
    if not name.endswith(".toml") and name not in presets():
        known = presets()
        raise ValueError(f"{option} is {name!r}; accepted: {', '.join(known)}, or a .toml file{_near(name, known)}")
    layer = read_toml(path, option)
    stray = sorted(set(layer) - {"attention", "measured"})
    if stray:
        raise ValueError(f"{option} is {name!r}, a file with {stray[0]!r}; a preset holds [attention] and measured")
    return dict(layer.get("attention", {}))


def measured(name: str) -> str | None:
    """Returns what a preset's file says on where its values were measured, None if it says nothing or is gone."""
    path = Path(name) if name.endswith(".toml") else CONFIGS / f"{name}.toml"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get("measured")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def resolve(
    file: Layer | None,
    options: Layer,
    *,
    checkpoint: Layer | None = None,
    preset: str | None = None,
    preset_option: str = "--preset",
) -> Config:
    """Returns the configuration of a job from its layers.

    Args:
        file: the content of a configuration file; may name its preset.
        options: given on the command line, as {"video": {"frames": 33}, …}.
        checkpoint: the content of the checkpoint's `semvid.toml`, its own defaults; may name a preset.
        preset: given on the command line; it replaces the file's preset and its [attention].
        preset_option: what an error calls it.

    Raises:
        ValueError: an unknown key, a wrong type or a value outside what is accepted; the message names the option.
    """
    file = dict(file or {})
    # What a deployment says of itself is for `semvid estimate` and `semvid bench`.
    file.pop("deployment", None)
    for table in ("model", "video", "attention", "job"):
        # Said here, before the layers are laid over each other and this value is lost.
        require(isinstance(file.get(table, {}), Mapping), table, file.get(table), "a table")
    if preset is not None:
        file.pop("attention", None)
    name = preset or file.get("preset", (checkpoint or {}).get("preset", Config().preset))
    if not isinstance(name, str):
        raise ValueError(f"preset is {name!r}; accepted: {', '.join(presets())}, or a .toml file")
    layers = [checkpoint or {}, {"attention": read_preset(name, preset_option)}, file, options, {"preset": name}]
    config = _build(Config, _merged(layers), "")
    check(config)
    return config


def resolved(path: Path) -> Config:
    """Returns the configuration that `to_toml` wrote to `path`; no layer is added.

    Raises:
        ValueError: as `read_toml` and `resolve`.
    """
    config = _build(Config, read_toml(path, "job"), "")
    check(config)
    return config


def to_toml(config: Config) -> str:
    """Returns the configuration as TOML, every option written out; `resolve` reads it back to an equal one."""
    return tomli_w.dumps(_plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    """Returns `value` without None and with lists for tuples, as TOML has neither."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _merged(layers: Sequence[Layer]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            inside = merged.get(key)
            merged[key] = _merged([inside, value]) if isinstance(inside, dict) and isinstance(value, Mapping) else value
    return merged


def _build(cls: type[T], values: Any, where: str) -> T:
    """Returns a dataclass made of a TOML table; unknown keys and wrong types raise ValueError."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where.rstrip('.')} is {values!r}; accepted: a table")
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in types:
            raise ValueError(f"unknown option {where + key!r}; accepted: {', '.join(types)}{_near(key, list(types))}")
    return cls(**{key: _convert(types[key], value, where + key) for key, value in values.items()})


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Returns `value` as the type of its field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, value, name + ".")
    if origin is tuple:
        require(isinstance(value, list | tuple), name, value, "a list of tables")
        return tuple(_convert(args[0], item, name) for item in value)
    if origin is Literal:
        require(value in args, name, value, ", ".join(map(str, args)), near=_near(str(value), [str(a) for a in args]))
        return value
    if type(None) in args:
        return None if value is None else _convert(args[0], value, name)
    if kind is float and type(value) is int:
        return float(value)
    accepted = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    require(type(value) is kind, name, value, accepted[kind])
    return value


def _near(word: str, known: list[str]) -> str:
    """Returns "; did you mean …?" if a known word is near, else nothing."""
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
