"""A job as its folder tells it: the bar of one that runs elsewhere, and the table of all. No Ray, no torch."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from semvid.launch.control import lease, request
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job

ALIVE = ("queued", "running", "recovering")
COLUMNS = ("job", "state", "step", "left", "density", "gpus")


class Follower:
    """Shows what has been added to a job's events since the last look."""

    def __init__(self, job: Job, show: Callable[[Any], None], say: Callable[[str], None]) -> None:
        self.job = job
        self.show = show
        self.say = say
        self.read_bytes = self._size()
        self.step = 0

    def look(self) -> None:
        """Shows steps and phases, and says what went wrong, in the order in which it came."""
        with (self.job.folder / "events.jsonl").open("rb") as file:
            file.seek(self.read_bytes)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self.read_bytes += len(whole)
        for line in whole.splitlines():
            try:
                self._tell(json.loads(line))
            except ValueError:
                continue

    def _tell(self, event: Mapping[str, Any]) -> None:
        kind, steps = event.get("event"), self.job.config.video.steps
        if kind in ("resume", "step"):
            self.step = event["step"]
        if kind == "resume":
            self.say(f"goes on after step {self.step} of {steps}")
        elif kind == "damaged":
            self.say(f"checkpoint {event['checkpoint']} is damaged and passed over: {event['reason']}")
        elif kind == "wait":
            self.say(f"waits: {event.get('reason')}")
        elif kind == "stop" and event.get("state") == "recovering":
            rank = "" if event.get("rank") is None else f"rank {event['rank']}: "
            self.say(f"{rank}{event.get('reason', 'it died')}")
        elif kind in ("step", "phase"):
            phase, seconds = event.get("phase", "denoise"), event.get("seconds", 0.0)
            self.show(SimpleNamespace(phase=phase, step=self.step, steps=steps, seconds=seconds))

    def _size(self) -> int:
        path = self.job.folder / "events.jsonl"
        return path.stat().st_size if path.exists() else 0


def state_of(job: Job) -> str:
    """Returns a job's state; "abandoned" where it should run and the process that ran it, on this machine, is gone."""
    state, asked = job.state, request.read(job.folder)
    if state == "queued" and asked is None and not any(job.events()):
        return "new"
    waits = state == "queued" and asked is not None
    return "abandoned" if state in ALIVE and not waits and lease.owner(job.folder) is None else state


def status(job: Job) -> dict[str, Any]:
    """Returns what `semvid jobs` shows of a job; times in seconds, None where nothing is known."""
    events, state = list(job.events()), state_of(job)
    steps, of = [e for e in events if e["event"] == "step"], job.config.video.steps
    mine = [e for e in steps if isinstance(e.get("seconds"), int | float)]
    start: dict[str, Any] = next((e for e in reversed(events) if e["event"] == "start"), {})
    asked = request.read(job.folder)
    last: dict[str, Any] = next((e for e in reversed(events) if e["event"] in ("phase", "stop", "wait")), {})
    recent = [e["seconds"] for e in mine[-5:]]
    left = statistics.median(recent) * (of - job.step) if recent and state in ALIVE else None
    return {
        "job": job.folder.name,
        "state": state,
        "phase": last.get("phase") if state == "running" else None,
        "step": job.step,
        "steps": of,
        "seconds_left": None if left is None else round(left, 1),
        "density": next((e["density"] for e in reversed(mine) if e.get("sparse_calls")), None),
        "gpus": start.get("world_size") or (asked.gpus if asked else None),
        "deaths": sum(e["event"] == "stop" and e.get("state") == "recovering" for e in events),
        "reason": last.get("reason") if state in ("failed", "recovering") or last.get("event") == "wait" else None,
        "prompt": job.config.video.prompt,
        "video": str(job.video) if state == "done" else None,
    }


def found(root: Path) -> list[Job]:
    """Returns the jobs that lie directly in `root`, in the order of the queue; what is no readable job is left out."""
    readable: list[Job] = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            readable.append(jobs.load(jobs.locate(root, path.name)))
        except ValueError:
            continue
    return sorted(readable, key=lambda job: asked.number if (asked := request.read(job.folder)) else 0)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the rows of `status` as lines of text."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    notes = ["", *(f"    {row['reason']}" if row["reason"] else "" for row in rows)]
    return [text.rstrip() for pair in zip(lines, notes, strict=True) for text in pair if text]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    phase = f" ({row['phase']})" if row["phase"] not in (None, "denoise") else ""
    left = "" if row["seconds_left"] is None else _clock(row["seconds_left"])
    density = "" if row["density"] is None else f"{row['density']:.3f}"
    return row["job"], row["state"] + phase, f"{row['step']}/{row['steps']}", left, density, str(row["gpus"] or "")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
