"""The process's surroundings: cores, thread settings, quiet libraries, and what a result must name."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("semvid", "torch", "triton", "diffusers", "transformers", "av")


def prepare() -> None:
    """Sets what must be set before torch is imported; what the user has set stays.

    A waiting thread spins for some microseconds and then sleeps. Spinning on, GNU OpenMP's way, takes the cores away
    from whoever shares them and costs several times the run; sleeping at once costs twice as much on idle cores. As
    many threads are used as the process may have cores, also in a container with a quota.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    # Checkpoints are local folders: nothing is looked up on a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


def exit_code(program: str, work: Callable[[], int]) -> int:
    """Returns what `work` returns, or in one line what stopped it and 2 (bad input), 1 (the machine), 130 (Ctrl-C).

    Args:
        program: what stands before the line.
        work: the program itself; a defect's exception passes through with its traceback.
    """
    try:
        return work()
    except ValueError as error:
        message, code = " ".join(str(error).split()), 2
    except (OSError, MemoryError, RuntimeError) as error:
        message, code = failure(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted; the job folder says how far it came", 130
    print(f"{program}: {message}", file=sys.stderr)
    return code


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
