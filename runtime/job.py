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

from semvid.runtime.config import Config, resolved, to_toml

DEFAULT_ROOT = Path("semvid-jobs")
STOPPED = ("failed", "cancelled", "interrupted")


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
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, allow_nan=False)
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def stop(self, state: str, **values: Any) -> bool:
        """Appends the event that ends a run and returns True, or returns False where it was stopped before.

        Of several ranks that stop at once one alone gets True.

        Args:
            state: done, failed, cancelled or interrupted.
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
        """Yields the events so far; a last line cut short by a crash is passed over."""
        path = self.folder / "events.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    @property
    def state(self) -> str:
        """queued, running, done, failed, cancelled or interrupted, by the last event that names a state."""
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


def default_folder(prompt: str) -> Path:
    """Returns a new folder's path under semvid-jobs/, named by time and prompt."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{slug or 'video'}"
    folder, copies = DEFAULT_ROOT / stem, 1
    while folder.exists():
        copies += 1
        folder = DEFAULT_ROOT / f"{stem}-{copies}"
    return folder


def check_out(folder: Path) -> None:
    """Raises ValueError if a job can't be put into `folder`; makes nothing."""
    if (folder / "job.toml").exists():
        raise ValueError(f"--out is {str(folder)!r}, which already holds a job; accepted: a new or empty folder")
    parent = folder.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"--out is {str(folder)!r}, but {str(parent)!r} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out is {str(folder)!r}, but {str(parent)!r} can't be written")
