"""Settings of one's own for `semvid bench quality`: a TOML file, each table one method beside the built-in ones."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from semvid.launch.bench.quality.methods import FAMILIES, OURS, Method, config_of, own_presets, preset_layer
from semvid.runtime.config import AttentionConfig
from semvid.runtime.settings import read_toml

FAMILY = "own"
"""Of a table that names none."""
BASE = "ours"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
OPTIONS = tuple(f.name for f in fields(AttentionConfig))


def bases() -> dict[str, Mapping[str, Any]]:
    """Returns what a table may begin from: options over the svg2 preset, by name."""
    return {BASE: OURS, "svg2": {}, **{name: preset_layer(name) for name in own_presets()}}


def read_settings(path: Path, built_in: Sequence[Method]) -> list[Method]:
    """Returns the methods of a settings file, in its order.

    The file holds tables [methods.NAME]: options of [attention] over those of `base` ("ours" if absent), and `family`,
    the curve of the plots that the method belongs to ("own" if absent; "ours" and "svg2" may be joined).

    Raises:
        ValueError: the file can't be read, or a table is not accepted; the message names the file, the table and the
            option.
    """
    content = read_toml(path, "--settings")
    where = f"--settings {path}"
    stray = sorted(set(content) - {"methods"})
    if stray:
        raise ValueError(f"{where} holds {stray[0]!r}; accepted: tables [methods.NAME]")
    tables = content.get("methods", {})
    if not isinstance(tables, Mapping) or not tables:
        raise ValueError(f"{where} holds no method; accepted: tables [methods.NAME]")
    taken = {"dense", *FAMILIES, *(method.name for method in built_in)}
    return [_method(f"{where}: methods.{name}", name, table, taken) for name, table in tables.items()]


def _method(where: str, name: str, table: Any, taken: set[str]) -> Method:
    if not NAME.fullmatch(name):
        raise ValueError(f"{where} is no name; accepted: letters, digits, '.', '_' and '-'")
    if name in taken:
        raise ValueError(f"{where} is the name of a built-in method or family; accepted: another name")
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} is {table!r}; accepted: a table of options of [attention], base and family")
    if any(isinstance(value, Mapping) for value in table.values()):
        raise ValueError(f'{where} holds a table; accepted: options. A name with a dot is quoted: [methods."a-0.5"]')
    change = dict(table)
    base, family = change.pop("base", BASE), change.pop("family", FAMILY)
    known = bases()
    if base not in known:
        raise ValueError(f"{where}.base is {base!r}; accepted: {', '.join(known)}")
    _check_family(f"{where}.family", family)
    method = Method(name=name, family=family, attention={**known[base], **change})
    try:
        config_of(method)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return method


def _check_family(where: str, family: Any) -> None:
    """Raises ValueError for a family that only built-in methods may have: what they say would no longer hold."""
    open_to_all = (BASE, "svg2", FAMILY)
    closed = [name for name in FAMILIES if name not in open_to_all]
    if not isinstance(family, str) or not NAME.fullmatch(family) or family in closed:
        raise ValueError(f"{where} is {family!r}; accepted: {', '.join(open_to_all)}, or a new name")
