"""Checkpoints on disk: `checkpoint/step-000012/` holds parts (safetensors) and a manifest (JSON), whole or not at all.

A checkpoint is written under another name, fsynced and renamed. Its manifest is written last and has the size and the
SHA-256 of every part, and of itself, so that a damaged one is known. Files that belong to nobody here are left alone.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 22
# The names of safetensors' format.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class DamagedError(Exception):
    """A checkpoint is not what was written: the message says which file and how."""


class Part(NamedTuple):
    """One file of a checkpoint."""

    file: str
    bytes: int
    sha256: str


def name_of(step: int) -> str:
    """Returns the name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def temporary(root: Path, step: int) -> Path:
    """Returns where the checkpoint after `step` steps is while it is being written; makes the folder."""
    folder = root / f".{name_of(step)}.part"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sweep(root: Path) -> None:
    """Removes the beginnings of checkpoints that a killed process has left."""
    for folder in root.glob(".step-*.part"):
        shutil.rmtree(folder)


def steps(root: Path) -> list[int]:
    """Returns the steps that `root` has a checkpoint of, damaged ones too, the newest first."""
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    names = [re.fullmatch(r"step-(\d{6,})", path.name) for path in folders]
    return sorted((int(name[1]) for name in names if name), reverse=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], told: Callable[[], None] = lambda: None) -> Part:
    """Writes a safetensors file and returns what a manifest says of it.

    Written block by block, without a second copy in memory, and mostly without Python's lock, so that a thread can do
    it beside the next step.

    Args:
        path: the file.
        tensors: in host memory.
        told: called after each block.
    """
    # As the library orders them, so that each starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        x, begin = tensors[name], end
        end += x.nbytes
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = (tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data for name in names)
    return _write(path, _blocks([memoryview(len(text).to_bytes(8, "little") + text), *data]), told)


def write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """Writes the manifest of `folder`; the checkpoint is whole from here on."""
    content = {"sha256": hashlib.sha256(_canonical(body)).hexdigest(), "manifest": body}
    _write(folder / MANIFEST, [memoryview(_canonical(content))])


def commit(root: Path, step: int) -> None:
    """Gives the checkpoint after `step` steps its name, and removes all but it and the one before."""
    folder, final = temporary(root, step), root / name_of(step)
    sync(folder)
    if final.exists():
        # A damaged one, or one of a run before this.
        shutil.rmtree(final)
    folder.rename(final)
    sync(root)
    kept = [found for found in steps(root) if found <= step][:2]
    for found in steps(root):
        if found not in kept:
            shutil.rmtree(root / name_of(found))


def verified(root: Path, step: int) -> dict[str, Any]:
    """Returns the manifest of the checkpoint after `step` steps; every byte of every part is read.

    Raises:
        DamagedError: a file is missing, cut short or changed.
    """
    folder = root / name_of(step)
    body = read_manifest(folder)
    for part in body["parts"]:
        path = folder / part["file"]
        if not path.is_file():
            raise DamagedError(f"{part['file']} is missing")
        if path.stat().st_size != part["bytes"]:
            raise DamagedError(f"{part['file']} has {path.stat().st_size} of {part['bytes']} bytes")
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamagedError(f"{part['file']} can't be read: {error.strerror}") from None
        if digest != part["sha256"]:
            raise DamagedError(f"{part['file']} has another SHA-256 than was written")
    return body


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint.

    Raises:
        DamagedError: it is missing, cut short or changed.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        body: dict[str, Any] = content["manifest"]
        whole = content["sha256"] == hashlib.sha256(_canonical(body)).hexdigest()
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise DamagedError(f"{MANIFEST} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedError(f"{MANIFEST} is cut short or changed")
    return body


def write_record(folder: Path, rank: int, part: Part) -> None:
    """Tells rank 0 that a rank's part is written."""
    record = folder / f".rank-{rank:04d}.json"
    unfinished = record.with_suffix(".part")
    _write(unfinished, [memoryview(_canonical(part._asdict()))])
    unfinished.rename(record)


def take_records(folder: Path, world_size: int) -> list[Part] | None:
    """Returns every rank's part and removes what told of them; None while some are missing."""
    records = [folder / f".rank-{rank:04d}.json" for rank in range(world_size)]
    if not all(record.exists() for record in records):
        return None
    parts = [Part(**json.loads(record.read_text(encoding="utf-8"))) for record in records]
    for record in records:
        record.unlink()
    return parts


def sync(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, blocks: Iterable[memoryview], told: Callable[[], None] = lambda: None) -> Part:
    """Writes a file, waits until it is on the disk, and returns what a manifest says of it."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        try:
            for block in blocks:
                _write_block(file.fileno(), block)
                digest.update(block)
                size += len(block)
                told()
            os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(path)
            raise
    return Part(path.name, size, digest.hexdigest())


def _write_block(handle: int, block: memoryview) -> None:
    while len(block):
        block = block[os.write(handle, block) :]


def _blocks(chunks: Iterable[memoryview]) -> Iterator[memoryview]:
    for chunk in chunks:
        for begin in range(0, len(chunk), BLOCK_BYTES):
            yield chunk[begin : begin + BLOCK_BYTES]


def _canonical(body: Mapping[str, Any]) -> bytes:
    """Returns the one text of a JSON object that its hash is of."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
