"""Goes on with a job whose ranks die: again from its last checkpoint, until it is done or fails at the same place.

How often it has failed is read from the job's own events, so that it survives whoever supervises.
"""

import signal
import sys
from collections.abc import Callable
from typing import Any

from semvid.launch.ranks.worker import end_bar
from semvid.runtime.jobs.job import Job

PROGRAM = "semvid"
WITHOUT_CHECKPOINT = 10
"""Deaths at any steps between two checkpoints: a job that never comes as far as the next one has failed too."""


def supervise(job: Job, live: Callable[[], int], say: Callable[[str], None] | None = None) -> int:
    """Runs the lives of a job until one ends it, and returns the exit code of the last.

    Args:
        job: what is run.
        live: runs all ranks until they end and returns the exit code; after a death from which the job may go on the
            job's state is "recovering" and its last event says which rank, at which step, and why.
        say: given a line a life.
    """
    say = say or (lambda line: print(f"{PROGRAM}: {line}", file=sys.stderr))
    while True:
        code = live()
        if job.state == "done":
            # Who died after that is not missed.
            return 0
        if job.state != "recovering":
            return code
        cause = verdict(job)
        if cause is not None:
            last = last_stop(job)
            job.log("stop", state="failed", step=last.get("step", 0), rank=last.get("rank"), reason=cause)
            say(cause)
            return code or 1
        say("goes on from the last checkpoint")
        job.log("restart", state="queued")


def verdict(job: Job) -> str | None:
    """Returns why a job that has just died has failed for good, or None if it may go on.

    It has if it died job.failures times at one step, or WITHOUT_CHECKPOINT times without a checkpoint in between.
    """
    at_step, since, last = 0, 0, last_stop(job)
    for event in job.events():
        if event["event"] in ("begin", "submit"):
            # Somebody wanted it tried again.
            at_step = since = 0
        elif event["event"] == "checkpoint":
            since = 0
        elif event["event"] == "stop" and event.get("state") == "recovering":
            since += 1
            at_step += event.get("step") == last.get("step")
    reason, step = last.get("reason", "it died"), last.get("step", 0)
    if at_step >= job.config.job.failures:
        return f"failed {at_step} times at step {step}; last: {reason}"
    if since >= WITHOUT_CHECKPOINT:
        return f"failed {since} times without a new checkpoint; last, at step {step}: {reason}"
    return None


def last_stop(job: Job) -> dict[str, Any]:
    """Returns the last event that ended a life of the job, {} if there was none."""
    return next((event for event in reversed(list(job.events())) if event["event"] == "stop"), {})


def cause_of(code: int) -> str:
    """Returns what the exit code of a process that failed says."""
    reason = f"ended with exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return f"{reason}, as the system does where memory runs out" if code == -signal.SIGKILL else reason


def note_death(job: Job, rank: int | None, reason: str, ends_as: str = "recovering") -> bool:
    """Logs how a rank ended (None: who knows which), if it could not do so itself, and returns whether that was so."""
    job.sweep()
    return job.stop(ends_as, step=job.step, rank=rank, reason=reason)


def report_death(job: Job, rank: int | None, reason: str, ends_as: str) -> None:
    """Says and logs how a rank ended (None: who knows which), if it could not do so itself."""
    running = job.state == "running"
    if note_death(job, rank, reason, ends_as):
        end_bar(running)
        name = "" if rank is None else f"rank {rank}: "
        print(f"{PROGRAM}: {name}{reason}", file=sys.stderr)
