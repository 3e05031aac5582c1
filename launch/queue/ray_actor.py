"""The actor on a Ray cluster that runs a folder's queue, woken by whoever submits."""

import time
from pathlib import Path
from typing import Any

from semvid.launch.control.request import Request
from semvid.launch.queue.queue_actor import IDLE_S, LOOK_S, Supervisor
from semvid.launch.ranks.attempts import supervise
from semvid.launch.ranks.ray_cluster import NAMESPACE, START_S, _prefix, _remove, live, total
from semvid.runtime.jobs.job import Job


def sweep(job: Job) -> None:
    """Removes the placement groups of a job that a supervisor has left which is no more."""
    from ray.util.placement_group import get_placement_group, placement_group_table

    for found in placement_group_table().values():
        if found["name"].startswith(_prefix(job)) and found["state"] != "REMOVED":
            _remove(get_placement_group(found["name"]))


def _run(job: Job, request: Request) -> int:
    # What a supervisor before this one has left.
    sweep(job)
    return supervise(job, lambda: live(job, request))


def _leave(root: Path) -> None:
    """Ends the actor that runs the queue of a folder, this one, for good."""
    import ray

    ray.kill(ray.get_actor(_queue_name(root), namespace=NAMESPACE), no_restart=True)


def wake(root: Path, idle_s: float = IDLE_S) -> Any:
    """Returns the supervisor of a folder of jobs, started if there is none, that will look at the folder again.

    Raises:
        RuntimeError: it does not answer.
    """
    import ray

    until, root = time.monotonic() + START_S, root.resolve()
    options = {"name": _queue_name(root), "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    while time.monotonic() < until:
        remote: Any = ray.remote(Supervisor).options(**options, max_restarts=-1, max_task_retries=0, num_cpus=0)
        actor = remote.remote(str(root), total, _run, _leave, idle_s)
        try:
            if ray.get(actor.poke.remote(), timeout=START_S):
                return actor
        except ray.exceptions.RayError:
            # It has just ended, or is being started again.
            pass
        time.sleep(LOOK_S)
    raise RuntimeError(f"the supervisor of {str(root)!r} has not answered for {START_S:g} s")


def _queue_name(root: Path) -> str:
    return f"queue:{root.resolve()}"
