"""A job is a folder: job.toml (resolved), events.jsonl (progress), checkpoint/, video.mp4, contact.png. No torch."""

import fcntl
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from semvid.runtime.config import Config
from semvid.runtime.settings import resolved, to_toml

DEFAULT_ROOT = Path("semvid-jobs")
ENDS = ("done", "failed", "cancelled", "interrupted")
"""What a job stays in until somebody does something."""
STOPPED = (*ENDS, "recovering")


class StoppedError(Exception):
    """The job was told to stop, and has."""


@dataclass(frozen=True, slots=True)
class Job:
    """One video's folder."""

    folder: Path
    config: Config

    @property
    def video(self) -> Path:
        """Where the video is, once the job is done."""
        return self.folder / "video.mp4"

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.folder / "checkpoint"

    @property
    def contact(self) -> Path:
        """Where the contact sheet is, once the job is done."""
        return self.folder / "contact.png"

    def log(self, event: str, **values: Any) -> None:
        """Appends one line to events.jsonl: the time (Unix seconds), the event, its values."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, allow_nan=False) + "\n"
        with (self.folder / "events.jsonl").open("ab+", buffering=0) as file:
            # After a line that a full disk cut short, this one must not become a part of it.
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = "\n" + line
            file.write(line.encode())

    def stop(self, state: str, **values: Any) -> bool:
        """Appends the event that ends a run and returns True, or returns False where it was stopped before.

        Of several ranks that stop at once one alone gets True.

        Args:
            state: done, failed, cancelled, interrupted, or recovering where it will go on by itself.
            values: what else the event says.
        """
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if self.state in STOPPED:
                return False
            self.log("stop", state=state, **values)
            return True

    def sweep(self) -> None:
        """Removes the beginnings of files that a killed process has left."""
        for part in self.folder.glob(".*.part*"):
            part.unlink(missing_ok=True)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yields the events so far; a line cut short by a crash or a full disk is passed over."""
        path = self.folder / "events.jsonl"
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event

    @property
    def state(self) -> str:
        """queued, running, recovering, done, failed, cancelled or interrupted: the last that an event names."""
        return next((e["state"] for e in reversed(list(self.events())) if "state" in e), "queued")

    @property
    def done(self) -> bool:
        """Whether the last run that began has made the video."""
        ends = (event for event in reversed(list(self.events())) if event["event"] in ("start", "stop"))
        return any(event["state"] == "done" for event in itertools.islice(ends, 1))

    @property
    def step(self) -> int:
        """Denoising steps done in the current or last run."""
        for event in reversed(list(self.events())):
            if event["event"] in ("start", "resume", "step"):
                return int(event.get("step", 0))
        return 0


def create(folder: Path, config: Config) -> Job:
    """Returns a new job in `folder`, which is made with its job.toml.

    Raises:
        ValueError: as `check_out`, or the folder can't be written.
    """
    check_out(folder)
    part = folder / ".job.toml.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(to_toml(config), encoding="utf-8")
        part.replace(folder / "job.toml")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"--out is {str(folder)!r}, which can't be written: {reason}") from None
    return Job(folder, config)


def load(folder: Path) -> Job:
    """Returns the job of a folder.

    Raises:
        ValueError: it holds no readable job.toml.
    """
    return Job(folder, resolved(folder / "job.toml"))


def locate(root: Path, name: str) -> Path:
    """Returns the folder of the job `name` of `root`.

    Raises:
        ValueError: no job of that name lies directly in `root`; a name never leads elsewhere.
    """
    folder = root / name
    plain = re.fullmatch(r"[^./\\\0][^/\\\0]*", name) is not None
    if not plain or not folder.is_dir() or folder.resolve().parent != root.resolve():
        raise ValueError(f"job is {name!r}; accepted: the name of a job in {str(root)!r}, as `semvid jobs` lists them")
    return folder


def default_folder(prompt: str, root: Path = DEFAULT_ROOT) -> Path:
    """Returns a new folder's path in `root`, named by time and prompt."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{slug or 'video'}"
    folder, copies = root / stem, 1
    while folder.exists():
        copies += 1
        folder = root / f"{stem}-{copies}"
    return folder


def check_out(folder: Path) -> None:
    """Raises ValueError if a job can't be put into `folder`; makes nothing."""
    if (folder / "job.toml").exists():
        accepted = f"a new or empty folder, or: semvid resume {folder}"
        raise ValueError(f"--out is {str(folder)!r}, which already holds a job; accepted: {accepted}")
    parent = folder.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"--out is {str(folder)!r}, but {str(parent)!r} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out is {str(folder)!r}, but {str(parent)!r} can't be written")
    # Hidden files are not somebody's work: the beginning of one that could not be written.
    held = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    if held:
        raise ValueError(f"--out is {str(folder)!r}, which holds {held[0]!r}; accepted: a new or empty folder")
