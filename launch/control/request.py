"""What somebody wants of a cluster for a job, and how it stands in the job folder. No Ray."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semvid.runtime.config import Config
from semvid.runtime.jobs.job import Job

NAME = "queue.json"


class NoRoomError(ValueError):
    """The cluster has not the GPUs that a job asks for, or not free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """How many GPUs a job gets, and how they share it. None of it changes the video but `threads` on a CPU."""

    gpus: int = 1
    """Ranks: a GPU each, or a CPU core where the job runs on the CPU."""
    nodes: int | None = None
    """Hosts, with equally many each; None: as few as possible."""
    mesh: str | None = None
    """Degrees of the axes; None: those that serve so many ranks best."""
    on_gpu: bool = True
    threads: int | None = None
    """Of PyTorch on the CPU, a rank; None: its share of the cores."""
    faults: str = ""
    """For tests; as in SEMVID_FAULT."""
    number: int = 0
    """Its place in the queue."""


def check(request: Request) -> None:
    """Raises ValueError if no cluster can realise a request."""
    if request.gpus < 1:
        raise ValueError(f"--gpus is {request.gpus}; accepted: 1 or more")
    nodes = request.nodes
    if nodes is not None and (nodes < 1 or request.gpus % nodes):
        raise ValueError(f"--nodes is {nodes}; accepted: a divisor of --gpus {request.gpus}, as each host has as many")


def on_gpu(config: Config) -> bool:
    """Returns whether a job's ranks take a GPU each."""
    return config.model.device != "cpu"


def write(job: Job, request: Request) -> None:
    """Puts a request into a job's folder, whole or not at all."""
    part = job.folder / f".{NAME}.part"
    part.write_text(json.dumps(dataclasses.asdict(request), indent=1) + "\n", encoding="utf-8")
    part.replace(job.folder / NAME)


def read(folder: Path) -> Request | None:
    """Returns the request in a job's folder, None if it has none or what is there is no request."""
    try:
        values: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return Request(**values)
    except (OSError, ValueError, TypeError):
        return None
