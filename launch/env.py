"""The process's surroundings: environment variables, its seat among others, signals, threads."""

import contextlib
import ctypes
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from semvid.launch import machine
from semvid.runtime.jobs import heartbeat
from semvid.runtime.jobs.heartbeat import Fault, Pulse

PR_SET_PDEATHSIG = 1
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Where all ranks are on one machine they need not be reached by others."""
BOARD = "SEMVID_BOARD"
"""The number of an open file: the board of a rank that is watched."""
PARENT = "SEMVID_PARENT"
"""The process that a rank must not outlive."""
FAULT = "SEMVID_FAULT"
"""Faults of a test, such as kill:rank=1:point=exchange:step=3;hang:point=decode."""


class Seat(NamedTuple):
    """This process among those that torchrun started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among those of this machine: which GPU it takes."""


def prepare_ray(*, loopback: bool) -> None:
    """Sets what must be set before ray is imported; what the user has set stays.

    Args:
        loopback: the cluster is one of this machine alone, which nobody else can reach.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if loopback:
        # Ray's own way on systems with a firewall that asks: all its processes listen on 127.0.0.1.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a port of this machine that nobody uses now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def ray_address() -> str | None:
    """Returns the address of the cluster that the environment names, as in a job of `ray job submit`."""
    return os.environ.get("RAY_ADDRESS") or None


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
    os.environ.update(rank_variables(place, "127.0.0.1", port))
    for name, value in LOOPBACK.items():
        os.environ.setdefault(name, value)


def rank_variables(place: Seat, host: str, port: int) -> dict[str, str]:
    """Returns torchrun's variables for a rank that meets the others at a host's port."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: str(value) for name, value in zip(names, place, strict=True)}
    return {**found, "MASTER_ADDR": host, "MASTER_PORT": str(port)}


def inherited() -> dict[str, str]:
    """Returns this process's environment."""
    return dict(os.environ)


def watched(folder: Path, rank: int, board: Any = None) -> Pulse:
    """Returns the pulse of a rank of the job in `folder`, on `board` or on that of the environment, if there is one.

    Raises:
        ValueError: SEMVID_FAULT is none.
    """
    if board is None and BOARD in os.environ:
        board = mmap.mmap(int(os.environ[BOARD]), heartbeat.BOARD_BYTES)
    return Pulse(board, rank, faults(os.environ.get(FAULT, "")), folder)


def follow_parent() -> None:
    """Has the system end this process with the one that the environment names as its parent, if it names one."""
    if PARENT not in os.environ:
        return
    # Whatever the parent has held back.
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):
        # It went before that.
        end(1)


def is_watched() -> bool:
    """Returns whether who started this process watches it and goes on with the job if it dies."""
    return BOARD in os.environ


def fault_text() -> str:
    """Returns SEMVID_FAULT, checked; "" where it is not set.

    Raises:
        ValueError: it is none.
    """
    text = os.environ.get(FAULT, "")
    faults(text)
    return text


def faults(text: str) -> tuple[Fault, ...]:
    """Returns the faults of a text such as "kill:rank=1:point=exchange:step=3;hang:point=decode".

    Raises:
        ValueError: it is none.
    """
    found = []
    for part in filter(None, text.split(";")):
        action, *pairs = part.split(":")
        values = dict(pair.partition("=")[::2] for pair in pairs)
        numbers = {name: values.pop(name) for name in ("rank", "step", "times") if name in values}
        point = values.pop("point", "")
        if (
            action not in ("kill", "hang")
            or point not in heartbeat.POINTS
            or values
            or not all(number.isdecimal() for number in numbers.values())
        ):
            accepted = f"kill or hang, then point=({'|'.join(heartbeat.POINTS)}) and, if wanted, rank=, step=, times="
            raise ValueError(f"{FAULT} is {text!r}; accepted: {accepted}, all joined by colons")
        given = {name: int(number) for name, number in numbers.items()}
        found.append(Fault(action="kill" if action == "kill" else "hang", point=point, **given))
    return tuple(found)


def threads() -> int | None:
    """Returns how many threads the user has set for a process; None: they follow from the cores."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdecimal() else None


def meeting() -> tuple[str, int, bool]:
    """Returns where the ranks meet: host, port, and whether torchrun has a store there that it keeps over restarts."""
    elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), elastic


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
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.usable_cores() // processes)))
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
