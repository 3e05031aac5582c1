"""Who runs the queue of a folder on a cluster: looks again and again, and ends when nothing is left. No Ray."""

import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from semvid.launch.queue.queue import Queue, Runner

LOOK_S = 1.0
IDLE_S = 60.0
"""So long a supervisor that has nothing to do stays."""


class Supervisor:
    """An actor. Ray starts it again if it dies; it ends itself when it is idle."""

    def __init__(
        self,
        root: str,
        total: Callable[[bool], int],
        run: Runner,
        leave: Callable[[Path], None],
        idle_s: float = IDLE_S,
    ) -> None:
        """Begins to look.

        Args:
            root: the folder whose jobs are run.
            total: as of Queue; it, `run` and `leave` are functions of a module, as they travel to another host.
            run: as of Queue.
            leave: ends the process of this actor, whose folder it is given.
            idle_s: how long to stay with nothing to do.
        """
        self.queue = Queue(Path(root), total, run)
        self.leave = leave
        self.idle_s = idle_s
        self.poked_at = time.monotonic()
        self.closing = False
        self.lock = threading.Lock()
        threading.Thread(target=self._follow, daemon=True).start()

    def poke(self) -> bool:
        """Returns whether this supervisor will look at the folder again; False where it is about to end."""
        with self.lock:
            self.poked_at = time.monotonic()
            return not self.closing

    def pid(self) -> int:
        """Returns the id of its process."""
        return os.getpid()

    def _follow(self) -> None:
        while not self._done():
            try:
                self.queue.step()
            except Exception:  # noqa: BLE001 - a folder that can't be read now may be read later
                traceback.print_exc()
            time.sleep(LOOK_S)
        self.leave(self.queue.root)

    def _done(self) -> bool:
        with self.lock:
            idle = self.queue.idle
            if not idle:
                self.poked_at = time.monotonic()
            self.closing = idle and time.monotonic() - self.poked_at > self.idle_s
            return self.closing
