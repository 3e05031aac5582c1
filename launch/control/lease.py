"""Who runs a job folder: one process at a time, also across hosts.

A lease is a small file with its owner and a count that the owner's thread raises every few seconds. It is stale if its
owner was a process of this machine that is gone, or if the count stands still for LEASE_S by the clock of the one who
wants it: no time of one machine is compared with that of another, and a wall clock may go backwards.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from semvid.launch import env

NAME = ".lease.json"
BEAT_S = 2.0
LEASE_S = 20.0
_WIDTH = 16


class Owner(NamedTuple):
    """Who holds a lease."""

    token: str
    host: str
    machine: str
    """The boot and the namespace of its process ids."""
    pid: int
    born: int
    """When the process began, in the machine's own ticks: a number that is used again is another process."""
    beat: int


class HeldError(ValueError):
    """Somebody else runs the job: the message says who."""


@contextlib.contextmanager
def hold(folder: Path, lost: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lease of a job folder inside.

    Args:
        folder: the job's.
        lost: called from a thread if another process has taken the lease meanwhile, as it may where this one stood
            still for longer than LEASE_S. By default this process ends at once, and its ranks with it.

    Raises:
        HeldError: another process holds it.
        OSError: the folder can't be written.
    """
    own = _claim(folder)
    over = threading.Event()
    thread = threading.Thread(target=_keep, args=(folder / NAME, own, over, lost or _yield), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _drop(folder / NAME, own)


def owner(folder: Path) -> Owner | None:
    """Returns who holds the lease of a job folder, None if nobody does; a dead process of this machine is nobody."""
    found = _read(folder / NAME)
    return None if found is None or _is_dead(found) else found


def check_free(folder: Path) -> Owner | None:
    """Returns the lease that somebody has left on a job folder, None without one; waits for LEASE_S if it can't tell.

    Raises:
        HeldError: another process holds it.
    """
    path, found = folder / NAME, _read(folder / NAME)
    if found is not None and not _is_dead(found):
        _wait_for_a_beat(path, found, folder)
    return found


def _claim(folder: Path) -> Owner:
    path, found = folder / NAME, check_free(folder)
    pid = os.getpid()
    own = Owner(uuid.uuid4().hex, socket.gethostname(), _machine(), pid, _born(pid) or 0, 0)
    # Where two find a lease stale, one of them takes it. The lock reaches as far as the file system's locks do.
    with (folder / "job.toml").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        now = _read(path)
        if now is not None and (found is None or now.token != found.token) and not _is_dead(now):
            raise _held(folder, now)
        part = path.with_name(f"{NAME}.{own.token}")
        try:
            part.write_text(_text(own), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return own


def _wait_for_a_beat(path: Path, found: Owner, folder: Path) -> None:
    """Returns if a lease stands still for LEASE_S; raises HeldError at its first beat. A dead one's file may go."""
    if found.machine == _machine():
        # The process lives.
        raise _held(folder, found)
    until = time.monotonic() + LEASE_S
    while time.monotonic() < until:
        now = _read(path)
        if now is None:
            return
        if (now.token, now.beat) != (found.token, found.beat):
            raise _held(folder, now)
        time.sleep(BEAT_S / 4)


def _keep(path: Path, own: Owner, over: threading.Event, lost: Callable[[], None]) -> None:
    """Raises the count until `over`. It is written in place: that needs no room on a full disk."""
    place = _text(own).encode().rindex(b'"') - _WIDTH
    while not over.wait(BEAT_S):
        now = _read(path)
        if now is not None and now.token not in ("", own.token):
            lost()
            return
        own = own._replace(beat=own.beat + 1)
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_WRONLY)
            try:
                os.pwrite(handle, f"{own.beat:0{_WIDTH}d}".encode(), place)
            finally:
                os.close(handle)


def _yield() -> None:
    print("semvid: another process has taken over the job: this one stood still for too long", file=sys.stderr)
    env.end(1)


def _drop(path: Path, own: Owner) -> None:
    now = _read(path)
    if now is not None and now.token == own.token:
        with contextlib.suppress(OSError):
            path.unlink()


def _text(own: Owner) -> str:
    return json.dumps({**own._asdict(), "beat": f"{own.beat:0{_WIDTH}d}"})


def _read(path: Path) -> Owner | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Owner(**{**values, "beat": int(values["beat"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        # No lease of ours: nobody writes half of one.
        return Owner("", "", "", 0, 0, 0)


def _is_dead(found: Owner) -> bool:
    """Returns whether a lease's owner was a process of this machine that is gone, or the file is no lease."""
    return not found.token or (found.machine == _machine() and _born(found.pid) != found.born)


def _held(folder: Path, found: Owner) -> HeldError:
    who = f"process {found.pid} on {found.host}"
    return HeldError(f"{str(folder)!r} is being run by {who}; accepted: a job that nobody runs, or wait for it")


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    known = boot.is_file() and namespace.exists()
    return f"{boot.read_text().strip()}:{namespace.readlink()}" if known else socket.gethostname()


def _born(pid: int) -> int | None:
    """Returns when a process of this machine began, None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
