"""What a result must name: versions, commit, device; and how many cores this process may use."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("semvid", "torch", "triton", "diffusers", "transformers", "ray", "av")


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
