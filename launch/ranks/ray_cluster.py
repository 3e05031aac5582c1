"""Ray, and the one file that knows it: a job's ranks on a cluster, an actor a GPU, started, watched, ended together.

An actor does no work: the rank is a process of its own under it. So a rank that hangs in a collective can be ended, its
exit code is known, and it sees all GPUs of its job on its host, as memory shared between them needs. What a rank prints
goes to the job folder, which lies on a file system that all hosts share.
"""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from semvid.launch import env, errors, machine
from semvid.launch.control import cancel
from semvid.launch.control.request import NoRoomError, Request
from semvid.launch.ranks.attempts import cause_of, note_death
from semvid.launch.ranks.rank_order import Where, meeting_place, orders_of, rank_order
from semvid.launch.ranks.rank_process import Child, Order, Sight
from semvid.launch.ranks.watch import Watch
from semvid.runtime.jobs.job import Job

NAMESPACE = "semvid"
POLL_S = 0.3
ROOM_S = 60.0
START_S = 180.0
END_S = 10.0
LOST_S = 30.0
"""An actor that has not answered for so long is lost, and its host perhaps with it."""


@contextlib.contextmanager
def connected(address: str | None, cpus: int) -> Iterator[None]:
    """Connects to a Ray cluster inside; without an address one of this machine alone is started, and ended after.

    That one listens on the loopback interface alone, without a dashboard. Ray's token authentication is on unless
    RAY_AUTH_MODE says otherwise.

    Args:
        address: "auto", "ray://host:10001" or "host:6379"; None starts one.
        cpus: how many processes without a GPU the one that is started takes at once.

    Raises:
        ValueError: there is no cluster at the address.
        OSError: none could be started.
    """
    env.prepare_ray(loopback=address is None or address.startswith(("127.0.0.1:", "localhost:")))
    import ray

    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(address or "local", **options)
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if address is None:
            raise OSError(errno.EAGAIN, f"no Ray could be started on this machine: {reason}") from error
        raise ValueError(f"--address is {address!r}, where no Ray cluster answers: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()


def total(on_gpu: bool) -> int:
    """Returns how many ranks the cluster has room for if nothing else runs."""
    import ray

    return int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0))


def live(
    job: Job,
    request: Request,
    told_to_stop: Callable[[], bool] = lambda: False,
    each: Callable[[], None] = lambda: None,
    room_s: float = ROOM_S,
) -> int:
    """Runs one life of a job on the cluster and returns the exit code: 0, 1, 2, 130 (cancelled) or 143 (stopped).

    After a death, a hang, or the loss of a host the job's state is "recovering" and its last event says why. Nothing of
    it is left on the cluster, whatever happens.

    Args:
        job: whose folder all hosts see under this path.
        request: how many GPUs, on how many hosts, and how they share the job.
        told_to_stop: asked all the while; the ranks then end with a checkpoint.
        each: called all the while.
        room_s: how long to wait for the GPUs.

    Raises:
        NoRoomError: they did not come free; the message says what there is.
        KeyboardInterrupt: passed on; the job's state is then "cancelled".
    """
    import ray

    try:
        with _reserved(job, request, room_s) as group, _seated(group, request) as actors:
            places = _places(actors)
            if isinstance(places, str):
                note_death(job, 0, places)
                return 1
            order = rank_order(places)
            ranks = [actors[number] for number in order]
            _start(job, request, ranks, [places[number] for number in order])
            return _watch(job, ranks, told_to_stop, each)
    except ray.exceptions.RayError as error:
        # An actor that was lost between two looks.
        note_death(job, 0, f"Ray: {_last_line(error)}")
        return 1
    except KeyboardInterrupt:
        job.sweep()
        job.stop("cancelled", step=job.step)
        raise


class Keeper:
    """The actor: keeps the process of one rank."""

    def __init__(self) -> None:
        self.child: Child | None = None

    def where(self) -> Where:
        """Returns where this is."""
        import ray

        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        address = ray.util.get_node_ip_address()
        return Where(context.get_node_id(), address, tuple(map(str, gpus)), machine.usable_cores())

    def free_port(self, host: str) -> int:
        """Returns a port of this host that nobody uses."""
        return env.free_port(host)

    def start(self, order: Order) -> None:
        """Starts the rank."""
        self.child = Child(order)

    def look(self) -> Sight | None:
        """Returns how the rank is, None before it has been started."""
        return None if self.child is None else self.child.look()

    def tell_to_stop(self) -> None:
        """Tells the rank to end after its step."""
        if self.child is not None:
            self.child.tell_to_stop()

    def end(self) -> None:
        """Ends the rank at once."""
        if self.child is not None:
            self.child.end()


@contextlib.contextmanager
def _reserved(job: Job, request: Request, room_s: float) -> Iterator[Any]:
    """Yields a placement group with room for the job, and removes it after.

    A job that fits on one host gets one; else it is packed on as few as possible, or on as many as the request says.
    """
    import ray
    from ray.util.placement_group import placement_group

    kind, per_node = "GPU" if request.on_gpu else "CPU", request.gpus // (request.nodes or 1)
    largest = max((node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]), default=0)
    bundles = [{kind: per_node}] * request.nodes if request.nodes else [{kind: 1}] * request.gpus
    pack = "STRICT_PACK" if largest >= request.gpus else "PACK"
    strategy = "STRICT_SPREAD" if (request.nodes or 1) > 1 else pack
    group = placement_group(bundles, strategy, name=f"{_prefix(job)}{os.getpid()}-{time.monotonic_ns()}")
    try:
        until = time.monotonic() + room_s
        while not group.wait(1):
            if cancel.is_wanted(job.folder):
                raise KeyboardInterrupt
            if time.monotonic() > until:
                raise NoRoomError(_no_room(request, kind, largest, room_s))
        yield group
    finally:
        _remove(group)


def _prefix(job: Job) -> str:
    return f"semvid:{job.folder.resolve()}:"


def _remove(group: Any) -> None:
    """Removes a placement group, and with it the actors in it, and waits until it is gone."""
    from ray.util.placement_group import placement_group_table, remove_placement_group

    remove_placement_group(group)
    until = time.monotonic() + END_S
    while placement_group_table(group).get("state") not in ("REMOVED", None) and time.monotonic() < until:
        time.sleep(0.05)


def _no_room(request: Request, kind: str, largest: float, room_s: float) -> str:
    import ray

    there, free = (int(found.get(kind, 0)) for found in (ray.cluster_resources(), ray.available_resources()))
    nodes = sum(node["Alive"] for node in ray.nodes())
    spread = f" on {request.nodes} hosts" if request.nodes else ""
    return (
        f"--gpus is {request.gpus}{spread}, but the cluster has {there} {kind}s on {nodes} hosts, at most {largest:g} "
        f"on one, and {free} were free after {room_s:g} s; accepted: what there is, or wait until it is free"
    )


@contextlib.contextmanager
def _seated(group: Any, request: Request) -> Iterator[list[Any]]:
    """Yields an actor for each rank, and ends them and their ranks after."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    per_bundle = request.gpus // (request.nodes or request.gpus)
    need = {"num_gpus": 1, "num_cpus": 0} if request.on_gpu else {"num_gpus": 0, "num_cpus": 1}
    remote: Any = ray.remote(Keeper)
    actors: list[Any] = []
    try:
        for number in range(request.gpus):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number // per_bundle)
            actors.append(remote.options(scheduling_strategy=strategy, max_restarts=0, **need).remote())
        yield actors
    finally:
        ends = [actor.end.remote() for actor in actors]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=END_S)
        for actor in actors:
            ray.kill(actor, no_restart=True)


def _places(actors: Sequence[Any]) -> list[Where] | str:
    """Returns where each actor is, or why they have not all started."""
    import ray

    try:
        found: list[Where] = ray.get([actor.where.remote() for actor in actors], timeout=START_S)
    except ray.exceptions.GetTimeoutError:
        return f"Ray has not started its actors within {START_S:g} s"
    except ray.exceptions.RayError as error:
        # Such as a host without semvid: the cause is the last line.
        return f"Ray could not start its actors: {_last_line(error)}"
    return found


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _start(job: Job, request: Request, actors: Sequence[Any], places: Sequence[Where]) -> None:
    """Starts the process of every rank."""
    import ray

    host = meeting_place(places)
    port = ray.get(actors[0].free_port.remote(host), timeout=START_S)
    orders = orders_of(job.folder.resolve(), request, places, host, port)
    ray.get([actor.start.remote(order) for actor, order in zip(actors, orders, strict=True)], timeout=START_S)


def _watch(job: Job, actors: Sequence[Any], told_to_stop: Callable[[], bool], each: Callable[[], None]) -> int:
    """Waits until all ranks are done or one is not well, and returns the exit code."""
    watch, looks, told = Watch(job.config.job), _Looks(actors), False
    while True:
        sights, lost = looks.take()
        each()
        if cancel.is_wanted(job.folder):
            raise KeyboardInterrupt
        if lost:
            note_death(job, lost[0], "its Ray actor or its host is lost")
            return 1
        codes = [(rank, sight.code) for rank, sight in enumerate(sights) if sight.code]
        if codes:
            return _after_failure(job, looks, codes, told)
        if all(sight.code == 0 for sight in sights):
            return 0
        if told_to_stop() and not told:
            told = True
            for actor in actors:
                actor.tell_to_stop.remote()
        hung = watch.look({rank: sight.board for rank, sight in enumerate(sights) if sight.code is None})
        if hung is not None:
            note_death(job, *hung)
            return 1
        time.sleep(POLL_S)


def _after_failure(job: Job, looks: "_Looks", codes: Sequence[tuple[int, int]], told: bool) -> int:
    """Returns the exit code of a life that ranks have ended, and logs the cause if they could not."""
    # What was killed could not speak; what exits by itself may only follow.
    rank, code = min(codes, key=lambda found: found[1])
    if code == errors.STOPPED:
        # All have come as far before the first went.
        until = time.monotonic() + END_S
        while time.monotonic() < until and any(sight.code is None for sight in looks.take()[0]):
            time.sleep(POLL_S)
    if told and code in (-15, errors.STOPPED):
        job.stop("interrupted", step=job.step)
        return errors.STOPPED
    if code == 2 and job.state == "failed":
        return 2
    note_death(job, rank, cause_of(code))
    return max(1, code)


class _Looks:
    """The last sight of each rank; one that does not answer keeps nobody from seeing the others."""

    def __init__(self, actors: Sequence[Any]) -> None:
        import ray

        self.ray = ray
        self.actors = actors
        self.sights: list[Sight] = ray.get([actor.look.remote() for actor in actors], timeout=START_S)
        self.asked: dict[int, Any] = {}
        self.asked_at = [time.monotonic()] * len(actors)

    def take(self) -> tuple[list[Sight], list[int]]:
        """Returns what is seen of each rank, and the ranks whose actor is gone or silent."""
        for rank, actor in enumerate(self.actors):
            if rank not in self.asked:
                self.asked[rank], self.asked_at[rank] = actor.look.remote(), time.monotonic()
        self.ray.wait(list(self.asked.values()), num_returns=len(self.asked), timeout=1)
        lost = []
        for rank, reference in list(self.asked.items()):
            try:
                self.sights[rank] = self.ray.get(reference, timeout=0)
                del self.asked[rank]
            except self.ray.exceptions.GetTimeoutError:
                if time.monotonic() - self.asked_at[rank] > LOST_S:
                    lost.append(rank)
            except self.ray.exceptions.RayError:
                lost.append(rank)
        return self.sights, lost
