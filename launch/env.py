"""The process's surroundings: cores, thread settings, its seat among others, and what a result must name."""

import contextlib
import importlib.metadata
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from semvid.runtime.job import StoppedError

PACKAGES = ("semvid", "torch", "triton", "diffusers", "transformers", "av")
STOPPED = 128 + signal.SIGTERM
INTERRUPTED = "interrupted; the job folder says how far it came"


class Seat(NamedTuple):
    """This process among those that torchrun started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among those of this machine: which GPU it takes."""


def seat() -> Seat:
    """Returns this process's seat by torchrun's variables; without them it is alone.

    Raises:
        ValueError: some of them are set and some are not, or one is no number.
    """
    if "RANK" not in os.environ:
        return Seat()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
            raise ValueError(f"{name} is {value!r} where RANK is set; accepted: what torchrun sets, or no RANK")
    return Seat(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def take_seat(place: Seat, port: int) -> None:
    """Sets torchrun's variables for a process of this machine, so that `seat` and torch find them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    os.environ.update({name: str(value) for name, value in zip(names, place, strict=True)})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def hush() -> None:
    """Turns warnings off: of several ranks one is heard."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def end(code: int) -> NoReturn:
    """Ends the process at once. Python's own way out can wait for ranks that are in the middle of a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare(processes: int = 1) -> None:
    """Sets what must be set before torch is imported; what the user has set stays.

    A waiting thread spins for some microseconds and then sleeps. Spinning on, GNU OpenMP's way, takes the cores away
    from whoever shares them and costs several times the run; sleeping at once costs twice as much on idle cores. As
    many threads are used as the process may have cores, also in a container with a quota.

    Args:
        processes: how many will share the cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    # Nothing here needs NVLink multicast, and binding memory to it can leave a host's GPUs hanging.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    # Checkpoints are local folders: nothing is looked up on a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Notes SIGTERM, as machines send it that are taken back, and yields what says whether it has come."""
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(program: str, work: Callable[[], int]) -> int:
    """Returns what `work` returns, or in one line what stopped it and 2 (bad input), 1 (the machine), 130 (Ctrl-C).

    143 is a job that was told to stop by SIGTERM, and that has said so.

    Args:
        program: what stands before the line.
        work: the program itself; a defect's exception passes through with its traceback.
    """
    try:
        return work()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message, code = explain(error)
    except StoppedError:
        return STOPPED
    except KeyboardInterrupt:
        message, code = INTERRUPTED, 130
    print(f"{program}: {message}", file=sys.stderr)
    return code


def explain(error: Exception) -> tuple[str, int]:
    """Returns what to tell a person of an error, and the exit code: 2 for bad input, 1 for what is the machine's.

    Raises:
        Exception: `error` itself, if it is a defect.
    """
    if isinstance(error, ValueError):
        return " ".join(str(error).split()), 2
    return failure(error), 1


def failure(error: Exception) -> str:
    """Returns what to tell a person of an error that is the machine's and not the input's.

    Raises:
        Exception: `error` itself, if it is neither the file system's nor a lack of memory: a defect keeps its trace.
    """
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "out of memory; fewer --frames or a smaller --height and --width need less"
    raise error


def usable_cores() -> int:
    """Returns how many cores this process may use: its affinity, or a container's CPU quota if that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(Path("/sys/fs/cgroup/cpu.max"))
    return max(1, min(cores, quota or cores))


def versions() -> dict[str, str]:
    """Returns the installed version of each package that a result depends on; "" where one is missing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def surroundings(device: str) -> dict[str, Any]:
    """Returns what a measured number must name: device, versions, and the commit where it is known."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {usable_cores()} cores"
    return {"device": name, "versions": versions(), "commit": commit()}


def commit() -> str | None:
    """Returns the commit of the source that runs: SEMVID_COMMIT, or what git says; None for an installed package."""
    if "SEMVID_COMMIT" in os.environ:
        return os.environ["SEMVID_COMMIT"]
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _quota(path: Path) -> int | None:
    """Returns the cores of a cgroup v2 cpu.max file ("200000 100000" is 2), None without a limit."""
    try:
        limit, period = path.read_text().split()
        return None if limit == "max" else max(1, round(int(limit) / int(period)))
    except (OSError, ValueError):
        return None
