"""The queue of a folder of jobs: which run now, which wait, which have lost who ran them. No Ray.

Its whole state lies in the job folders: what is asked for in queue.json, how far it came in events.jsonl, and who runs
it in the lease. So a new queue on the same folder goes on where one that died has left off.
"""

import contextlib
import dataclasses
import fcntl
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from semvid.launch.control import cancel, lease, request
from semvid.launch.control.request import NoRoomError, Request
from semvid.launch.control.status import found
from semvid.launch.ranks.attempts import verdict
from semvid.runtime.config import Config
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job

AGAIN_S = 30.0
"""So long a job that somebody else seems to run is left alone before it is tried again."""
PATIENCE_S = 600.0
"""A job that has waited so long is overtaken by no other."""

Runner = Callable[[Job, Request], int]


def submit(root: Path, configs: Sequence[Config], wanted: Request) -> list[Job]:
    """Returns new jobs at the end of the queue of `root`, one for each configuration.

    Raises:
        ValueError: a folder can't be written.
    """
    made = []
    with _numbers(root) as first:
        for number, config in enumerate(configs, first):
            job = jobs.create(jobs.default_folder(config.video.prompt, root), config)
            put(job, dataclasses.replace(wanted, number=number))
            made.append(job)
    return made


def submit_again(job: Job, wanted: Request) -> None:
    """Puts a job that has ended, or a new one, at the end of the queue of its folder."""
    with _numbers(job.folder.parent) as number:
        cancel.forget(job.folder)
        put(job, dataclasses.replace(wanted, number=number))


def put(job: Job, wanted: Request) -> None:
    """Makes a job one that waits."""
    request.write(job, wanted)
    job.log("submit", state="queued", gpus=wanted.gpus)


@contextlib.contextmanager
def _numbers(root: Path) -> Iterator[int]:
    """Yields the first number that no job of `root` has; nobody else takes one meanwhile."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".queue.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        taken = [asked.number for job in found(root) if (asked := request.read(job.folder))]
        yield max(taken, default=0) + 1


class Queue:
    """Runs the jobs of a folder, as many at once as there are GPUs for, each in a thread that watches it."""

    def __init__(self, root: Path, total: Callable[[bool], int], run: Runner) -> None:
        """Begins with what is in the folder.

        Args:
            root: whose jobs are run.
            total: how many GPUs (True) or cores (False) the cluster has.
            run: runs a job to its end; raises NoRoomError where the GPUs don't come free.
        """
        self.root = root
        self.total = total
        self.run = run
        self.active: dict[Path, tuple[Request, threading.Thread]] = {}
        self.not_before: dict[Path, float] = {}
        self.no_room_until: dict[Path, float] = {}
        self.told_why: set[Path] = set()
        self.waiting_since: dict[Path, float] = {}

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self.active and not self._wanted()

    def step(self) -> None:
        """Looks once: starts what there is room for."""
        for folder in [folder for folder, (_, thread) in self.active.items() if not thread.is_alive()]:
            del self.active[folder]
        blocked: set[bool] = set()
        for job, asked in self.waiting():
            since, total = self.waiting_since.setdefault(job.folder, time.monotonic()), self.total(asked.on_gpu)
            if cancel.is_wanted(job.folder) or (asked.on_gpu not in blocked and self._fits(asked, total)):
                self._start(job, asked)
            elif asked.gpus > total:
                self._say_why(job, f"--gpus is {asked.gpus}, but the cluster has {total}; it waits for more")
            elif time.monotonic() - since > PATIENCE_S:
                # Else a large one would starve behind small ones.
                blocked.add(asked.on_gpu)

    def waiting(self) -> list[tuple[Job, Request]]:
        """Returns the jobs that should run now and that this queue does not run, in the order of their numbers."""
        now = time.monotonic()
        return [item for item in self._wanted() if self.no_room_until.get(item[0].folder, 0) <= now]

    def _wanted(self) -> list[tuple[Job, Request]]:
        """Returns those and the ones for which there was no room a moment ago."""
        now, wanted = time.monotonic(), []
        for job in found(self.root):
            asked = request.read(job.folder)
            if asked is None or job.folder in self.active or self.not_before.get(job.folder, 0) > now:
                continue
            if job.state in ("queued", "running", "recovering"):
                wanted.append((job, asked))
        return sorted(wanted, key=lambda item: item[1].number)

    def _say_why(self, job: Job, reason: str) -> None:
        """Logs, once, why a job waits."""
        if job.folder not in self.told_why:
            self.told_why.add(job.folder)
            with contextlib.suppress(OSError):
                job.log("wait", state="queued", reason=reason)

    def _fits(self, asked: Request, total: int) -> bool:
        used = sum(other.gpus for other, _ in self.active.values() if other.on_gpu == asked.on_gpu)
        return used + asked.gpus <= total

    def _start(self, job: Job, asked: Request) -> None:
        thread = threading.Thread(target=self._work, args=(job, asked), daemon=True)
        self.active[job.folder] = asked, thread
        self.waiting_since.pop(job.folder, None)
        thread.start()

    def _work(self, job: Job, asked: Request) -> None:
        """Runs one job to its end; whatever happens, the queue moves on."""
        try:
            with lease.hold(job.folder):
                self._hold(job, asked)
        except lease.HeldError:
            self.not_before[job.folder] = time.monotonic() + AGAIN_S
        except OSError:
            # A folder that can't be written now.
            traceback.print_exc()
            self.not_before[job.folder] = time.monotonic() + AGAIN_S

    def _hold(self, job: Job, asked: Request) -> None:
        if job.state not in ("queued", "running", "recovering"):
            # It ended between the look and the lease.
            return
        if cancel.is_wanted(job.folder):
            job.stop("cancelled", step=job.step)
            cancel.forget(job.folder)
            return
        if job.state == "running":
            job.stop("recovering", step=job.step, reason="the process that supervised it is gone")
        if job.state == "recovering" and (cause := verdict(job)) is not None:
            job.log("stop", state="failed", step=job.step, reason=cause)
            return
        job.log("adopt", state="queued")
        try:
            self.run(job, asked)
        except NoRoomError as error:
            # Others, which may fit, come first for a while.
            self.no_room_until[job.folder] = time.monotonic() + AGAIN_S
            job.log("wait", state="queued", reason=str(error))
        except KeyboardInterrupt:
            cancel.forget(job.folder)
        except Exception as error:  # noqa: BLE001 - one job's defect must not end the others
            traceback.print_exc()
            job.log("stop", state="failed", step=job.step, reason=f"{type(error).__name__}: {error}")
