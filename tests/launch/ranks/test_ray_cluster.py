"""Jobs on a real Ray of this machine: recovery from the death of every kind of process, the queue, nothing left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from semvid.launch import cli, env
from semvid.launch.control import lease, status
from semvid.launch.control.request import NoRoomError, Request
from semvid.launch.queue import ray_actor
from semvid.launch.ranks import rank_process, ray_cluster
from semvid.launch.ranks.rank_order import Where, meeting_place, orders_of, rank_order
from semvid.runtime.config import Config
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs.job import Job

MESH = "cfg=1,ring=1,ulysses=2"
SIZE = ["--height", "64", "--width", "96", "--frames", "9", "--steps", "6", "--guidance", "3"]
PATH = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
PATIENCE_S = 180.0

pytestmark = pytest.mark.usefixtures("one_thread_a_rank")


def options(model: Path, every: int = 1) -> list[str]:
    """A job of six steps with a checkpoint after each."""
    return [*SIZE, "--model", str(model), "--dtype", "fp32", "--device", "cpu", "--checkpoint-every", str(every)]


def shared(*more: str) -> list[str]:
    return ["--gpus", "2", "--mesh", MESH, *more]


@pytest.fixture(scope="module")
def undisturbed(one_thread_a_rank: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the video of `options` on two processes where nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole") / "job"
    args = ["run", "a red ball", *options(tiny_model), *shared("--launcher", "local"), "--out", str(folder)]
    assert cli.main(args) == 0
    return sha256(jobs.load(folder))


def sha256(job: Job) -> str:
    return str(json.loads((job.folder / "report.json").read_text())["frames_sha256"])


@pytest.fixture(scope="module")
def head(one_thread_a_rank: None) -> Iterator[Any]:
    """A Ray cluster of four CPUs on the loopback interface."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield made
    made.shutdown()


def wait_until(true: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    until = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < until, what
        time.sleep(0.1)
    return found


def processes(*words: str) -> list[int]:
    """The processes of this machine whose command line has all of `words`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in text for word in words) and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def rank_of(process: int) -> str:
    pairs = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next(pair.decode().removeprefix("RANK=") for pair in pairs if pair.startswith(b"RANK="))


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def left_behind(folder: Path) -> list[str]:
    """What a job has left on the cluster and on this machine. The caller is connected."""
    from ray._private import state
    from ray.util.placement_group import placement_group_table

    groups = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
    actors = [a["ActorClassName"] for a in state.actors().values() if a["State"] not in ("DEAD",)]
    ranks = [f"process {process}" for process in processes("semvid.launch.ranks.worker", str(folder.resolve()))]
    return [group for group in groups if str(folder.resolve()) in group] + ranks + [a for a in actors if a == "Keeper"]


def listening(words: str) -> list[str]:
    """The addresses, beyond the loopback interface, where processes with `words` in their command line listen."""
    inodes = set()
    for process in processes(words):
        for path in Path(f"/proc/{process}/fd").glob("*"):
            try:
                target = str(path.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    beyond = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes and fields[1].split(":")[0] not in loopback:
                beyond.append(fields[1])
    return beyond


@pytest.mark.timeout(300)
def test_two_gpus_mean_ray_which_is_started_recovers_a_dead_rank_and_is_gone_after(
    undisturbed: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    args = ["run", "a red ball", *options(tiny_model), *shared("--json", "--out", str(folder))]
    fault = {env.FAULT: "kill:rank=1:point=exchange:step=3;hang:rank=0:point=cluster:step=5"}
    words = [sys.executable, "-m", "semvid.launch.cli", *args, "--config", str(tmp_path / "short.toml")]
    (tmp_path / "short.toml").write_text("[job]\nhang_seconds = 6.0\n")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | PATH | fault
    )
    wait_until(lambda: (folder / ".fault-hang-cluster-0-5-0").exists() or process.poll() is not None, "the hang")
    # While it hangs: Ray's processes and the ranks, all alive.
    raylets = [pid for pid in processes("raylet", "session_") if process.pid in (parent_of(pid), pid)]
    assert raylets, "this command has started a Ray of its own"
    sessions = {Path(f"/proc/{pid}/cmdline").read_text().split("session_")[1][:26] for pid in raylets}
    beyond = [found for session in sessions for found in listening(session)]
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert beyond == []
    report = json.loads(out)
    assert (report["frames_sha256"], report["gpus"], report["mesh"]) == (undisturbed, 2, MESH)
    job = jobs.load(folder)
    reasons = [e["reason"] for e in job.events() if e["event"] == "stop" and e["state"] == "recovering"]
    assert reasons == [
        "killed by SIGKILL, as the system does where memory runs out",
        "hangs: no rank has moved for job.hang_seconds = 6 s; this one came least far, to 'cluster'",
    ]
    assert err.count("semvid: goes on from the last checkpoint") == 2
    assert "Token authentication" not in err
    assert f"frames    sha256 {undisturbed}" in err
    wait_until(lambda: not [pid for session in sessions for pid in processes(session)], "Ray's processes are gone", 30)
    assert processes(str(folder)) == []


ENDS = [(signal.SIGINT, 130, "cancelled"), (signal.SIGTERM, 143, "interrupted")]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("end", "code", "state"), ENDS, ids=["ctrl-c", "sigterm"])
def test_the_command_can_be_ended_and_leaves_nothing_behind(
    end: signal.Signals, code: int, state: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    args = ["run", "a red ball", *options(tiny_model, every=1000), "--steps", "4000", *shared("--out", str(folder))]
    words = [sys.executable, "-m", "semvid.launch.cli", *args]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | PATH, start_new_session=True)
    wait_until(lambda: (folder / "events.jsonl").exists() or process.poll() is not None, "it has begun")
    job = jobs.load(folder)
    wait_until(lambda: job.step > 0 or process.poll() is not None, "it runs")
    # A terminal's Ctrl-C is for all processes.
    (os.killpg if end == signal.SIGINT else os.kill)(process.pid, end)
    err = process.communicate(timeout=60)[1]
    assert (process.returncode, job.state) == (code, state), err
    assert "Traceback" not in err
    assert (folder / "checkpoint" / f"step-{job.step:06d}").is_dir() == (state == "interrupted")
    wait_until(lambda: not processes(str(folder)), "its processes are gone", 10)


@pytest.mark.timeout(400)
def test_a_job_survives_the_death_of_every_kind_of_process(
    head: Any, undisturbed: str, tiny_model: Path, tmp_path: Path
) -> None:
    """One job hangs at four steps; each time another process is killed, which ends the hang."""
    folder = tmp_path / "queue" / "job"
    steps = {2: "rank", 3: "worker", 4: "supervisor", 5: "driver"}
    fault = {env.FAULT: ";".join(f"hang:rank=1:point=cluster:step={step}" for step in steps)}
    (tmp_path / "short.toml").write_text("[job]\nhang_seconds = 25.0\n")
    args = ["run", "a red ball", *options(tiny_model), *shared("--out", str(folder), "--address", head.address)]
    words = [sys.executable, "-m", "semvid.launch.cli", *args, "--config", str(tmp_path / "short.toml")]
    driver = subprocess.Popen(words, env=os.environ | PATH | fault, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with ray_cluster.connected(head.address, 0):
        for step, kind in steps.items():
            wait_until(lambda step=step: (folder / f".fault-hang-cluster-1-{step}-0").exists(), f"the hang at {step}")
            ranks = {rank_of(pid): pid for pid in processes("semvid.launch.ranks.worker", str(folder))}
            assert sorted(ranks) == ["0", "1"]
            victim = {
                "rank": lambda ranks=ranks: ranks["0"],
                "worker": lambda ranks=ranks: parent_of(ranks["1"]),
                "supervisor": supervisor_of(folder.parent),
                "driver": lambda: driver.pid,
            }[kind]()
            os.kill(victim, signal.SIGKILL)
        driver.communicate()
        job = jobs.load(folder)
        wait_until(lambda: job.state in ("done", "failed"), "the end of the job")
        wait_until(lambda: not left_behind(folder), f"left: {left_behind(folder)}", 30)
    events = [e for e in job.events() if e["event"] == "stop"]
    assert [(e["state"], e["step"]) for e in events[:-1]] == [("recovering", step) for step in steps]
    reasons = [e["reason"] for e in events[:-1]]
    assert reasons[:3] == [
        "killed by SIGKILL, as the system does where memory runs out",
        "its Ray actor or its host is lost",
        "the process that supervised it is gone",
    ]
    # Nobody noticed that the driver is gone; what ended this hang is the heartbeat.
    assert reasons[3].startswith("hangs: no rank has moved for job.hang_seconds = 25 s")
    assert (job.state, sha256(job)) == ("done", undisturbed)
    assert lease.owner(folder) is None


def supervisor_of(root: Path) -> Callable[[], int]:
    def pid() -> int:
        import ray

        return int(ray.get(ray_actor.wake(root).pid.remote()))

    return pid


@pytest.mark.timeout(120)
def test_a_supervisor_with_nothing_to_do_is_gone_and_another_can_be_woken(head: Any, tmp_path: Path) -> None:
    from ray._private import state

    def alive() -> list[str]:
        found = state.actors().values()
        return [a["ActorID"] for a in found if a["ActorClassName"] == "Supervisor" and a["State"] != "DEAD"]

    with ray_cluster.connected(head.address, 0):
        before = set(alive())
        for _ in range(2):
            ray_actor.wake(tmp_path, idle_s=0.5)
            assert len(set(alive()) - before) == 1
            wait_until(lambda: set(alive()) <= before, "the supervisor is gone", 30)


@pytest.mark.timeout(300)
def test_a_job_goes_on_when_its_host_is_gone(undisturbed: str, tiny_model: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    folder = tmp_path / "queue" / "job"
    fault = {env.FAULT: "hang:rank=1:point=cluster:step=3"}
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = {node.node_id: node for node in (two.add_node(num_cpus=2), two.add_node(num_cpus=2))}
        args = ["run", "a red ball", *options(tiny_model), *shared("--out", str(folder), "--address", two.address)]
        words = [sys.executable, "-m", "semvid.launch.cli", *args]
        driver = subprocess.Popen(words, env=os.environ | PATH | fault, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: list(folder.glob(".fault-*")) or driver.poll() is not None, "the hang")
        with ray_cluster.connected(two.address, 0):
            (busy,) = nodes_in_use(folder)
            two.remove_node(nodes[busy], allow_graceful=False)
            err = driver.communicate(timeout=PATIENCE_S)[1]
            assert driver.returncode == 0, err
            wait_until(lambda: not left_behind(folder), "nothing is left", 30)
    finally:
        two.shutdown()
    job = jobs.load(folder)
    assert (job.state, sha256(job)) == ("done", undisturbed)
    assert next(e["reason"] for e in job.events() if e["event"] == "stop" and e["state"] == "recovering") in (
        "its Ray actor or its host is lost",
        "the process that supervised it is gone",
    )


def nodes_in_use(folder: Path) -> set[str]:
    """The nodes of the placement groups of a job."""
    from ray.util.placement_group import placement_group_table

    tables = [t for t in placement_group_table().values() if str(folder.resolve()) in t["name"]]
    return {node for t in tables if t["state"] == "CREATED" for node in t["bundles_to_node_id"].values()}


@pytest.fixture
def job(tiny_config: Callable[..., Config], tmp_path: Path) -> Job:
    """A new job."""
    return jobs.create(tmp_path / "one" / "job", tiny_config("dense", steps=2, frames=5))


@pytest.mark.timeout(120)
def test_what_there_is_no_room_for_is_said_with_both_numbers(head: Any, job: Job) -> None:
    with ray_cluster.connected(head.address, 0):
        message = (
            r"--gpus is 9, but the cluster has 4 CPUs on 1 hosts, at most 4 on one, and 4 were free after 1 s; accepted"
        )
        with pytest.raises(NoRoomError, match=f"^{message}"):
            ray_cluster.live(job, Request(gpus=9, on_gpu=False), room_s=1)
        with pytest.raises(NoRoomError, match="--gpus is 2 on 2 hosts, but the cluster has 4 CPUs on 1 hosts"):
            ray_cluster.live(job, Request(gpus=2, nodes=2, on_gpu=False), room_s=1)
        with pytest.raises(NoRoomError, match="--gpus is 1, but the cluster has 0 GPUs"):
            ray_cluster.live(job, Request(gpus=1), room_s=1)
        assert left_behind(job.folder) == []


@pytest.mark.timeout(120)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a defect")], ids=["ctrl-c", "defect"])
def test_nothing_is_left_after_ctrl_c_or_an_error(head: Any, job: Job, error: BaseException) -> None:
    with ray_cluster.connected(head.address, 0):

        def raise_later() -> None:
            if processes("semvid.launch.ranks.worker", str(job.folder)):
                raise error

        with pytest.raises(type(error)):
            ray_cluster.live(job, Request(gpus=2, on_gpu=False, threads=1), each=raise_later)
        wait_until(lambda: not left_behind(job.folder), "nothing is left", 15)
    assert job.state == ("cancelled" if isinstance(error, KeyboardInterrupt) else "queued")


@pytest.mark.timeout(120)
def test_ray_asks_for_its_token(head: Any, tmp_path: Path) -> None:
    program = f"import ray; ray.init({head.address!r}, log_to_driver=False)"
    wrong = os.environ | PATH | {"RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run([sys.executable, "-c", program], env=wrong, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr


@pytest.mark.timeout(60)
def test_an_address_without_a_cluster_is_refused_in_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def nobody(*_: Any, **__: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nStart one.")

    monkeypatch.setattr(ray, "init", nobody)
    args = ["submit", "a red ball", *options(tiny_model), "--root", str(tmp_path / "root"), "--address", "auto"]
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert (
        err == "semvid: --address is 'auto', where no Ray cluster answers: Could not find any running Ray instance.\n"
    )
    assert not (tmp_path / "root").exists()


@pytest.mark.timeout(400)
def test_the_queue_runs_what_fits_and_can_be_listed_cancelled_and_resumed(
    head: Any, undisturbed: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, prompts = tmp_path / "jobs", tmp_path / "prompts.toml"
    prompts.write_text('[[video]]\nprompt = "a red ball"\n\n[[video]]\nprompt = "a blue ball"\nseed = 7\n')
    where = ["--root", str(root)]
    address = ["--address", head.address]

    def shown(*args: str) -> Any:
        capsys.readouterr()
        assert cli.main(list(args)) == 0
        return capsys.readouterr().out

    submit = ["submit", *options(tiny_model), *shared("--json"), *where, *address]
    red, blue = json.loads(shown(*submit, "--prompts", str(prompts)))
    # Three of two CPUs on four: this one waits, and is cancelled before it starts.
    (green,) = json.loads(shown(*submit, "a green ball"))
    large = json.loads(
        shown(*submit[:-4], "a large ball", "--gpus", "8", "--mesh", "cfg=2,ulysses=4", *where, *address)
    )
    assert cli.main(["cancel", green, *where]) == 0
    rows = {row["job"]: row for row in json.loads(shown("jobs", "--json", *where))}
    assert list(rows) == [red, blue, green, *large]
    assert [rows[name]["gpus"] for name in rows] == [2, 2, 2, 8]
    assert rows[green]["state"] == "cancelled"

    def states() -> list[str]:
        return [status.state_of(job) for job in status.found(root)]

    wait_until(lambda: states()[:2] == ["done", "done"], f"both are done: {states()}")
    # More than the cluster has: it waits, and keeps nobody waiting.
    assert states()[2:] == ["cancelled", "queued"]
    assert cli.main(["cancel", large[0], *where]) == 0
    assert sha256(jobs.load(root / red)) == undisturbed != sha256(jobs.load(root / blue))
    lines = shown("jobs", *where).splitlines()
    assert lines[0].split() == ["job", "state", "step", "left", "density", "gpus"]
    assert lines[1].split()[:3] == [red, "done", "6/6"]
    assert f"frames    sha256 {undisturbed}" in shown("logs", red, *where)
    # A cancelled job is one that can go on.
    assert cli.main(["resume", green, *where, *shared(), *address]) == 0
    wait_until(lambda: states() == ["done", "done", "cancelled", "done"], f"it went on: {states()}", 5)


@pytest.mark.timeout(200)
def test_a_job_that_runs_is_cancelled(head: Any, tiny_model: Path, tmp_path: Path) -> None:
    root = tmp_path / "jobs"
    args = ["submit", "a red ball", *options(tiny_model), "--steps", "4000", *shared("--root", str(root))]
    assert cli.main([*args, "--address", head.address]) == 0
    (job,) = status.found(root)
    wait_until(lambda: job.step >= 2, "it runs")
    assert cli.main(["cancel", job.folder.name, "--root", str(root)]) == 0
    wait_until(lambda: job.state == "cancelled", "it is cancelled", 30)
    with ray_cluster.connected(head.address, 0):
        wait_until(lambda: not left_behind(job.folder), "nothing is left", 30)


BAD_NAMES = ["..", "../one", "/etc", "a/b", ".hidden", "", "absent", "one/../one", "link", "\0"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("command", ["cancel", "logs", "resume"])
def test_a_jobs_name_leads_nowhere_else(
    command: str, name: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(job.folder)
    assert cli.main([command, name, "--root", str(root)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "job is " in err
    assert not list(job.events())


REFUSED = [
    (
        ["run", "x", "--launcher", "local", "--address", "auto"],
        "--address is for --launcher ray; --launcher is 'local'",
    ),
    (["run", "x", "--launcher", "torchrun", "--nodes", "2"], "--nodes is for --launcher ray; --launcher is 'torchrun'"),
    (["run", "x", "--gpus", "3", "--nodes", "2"], "--nodes is 2; accepted: a divisor of --gpus 3"),
    (["submit", "x", "--out", "here"], "--out is 'here'; accepted: nothing, as jobs of a queue are named by time"),
    (["submit", "x", "--prompts", "absent"], "--prompts is 'absent', but there is a PROMPT too; accepted: one of them"),
    (["submit", "--prompts", "absent"], "--prompts is 'absent', which can't be read"),
    (["submit", "--prompts", "empty.txt"], "--prompts is 'empty.txt', which holds no prompt"),
    (["submit", "--prompts", "bad.toml"], "--prompts is 'bad.toml'; accepted: [[video]] tables alone"),
    (["submit", "--prompts", "stray.toml"], "unknown option 'size' in [[video]]; accepted: prompt, seed"),
    (["submit", "--prompts", "odd.toml"], "frames is 32; accepted: 4k + 1"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_no_cluster_can_do_is_refused_before_one_is_asked(
    args: list[str], message: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "empty.txt": "\n",
        "bad.toml": "steps = 3",
        "stray.toml": "[[video]]\nprompt = 'x'\nsize = 3\n",
        "odd.toml": "[[video]]\nprompt = 'x'\n[[video]]\nprompt = 'y'\nframes = 32\n",
    }
    for name, text in files.items():
        (empty / name).write_text(text)
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in empty.iterdir()) == sorted(files)


def test_ranks_are_numbered_host_by_host_and_gpu_by_gpu() -> None:
    places = [
        Where("b", "10.0.0.2", ("10",), 16),
        Where("a", "10.0.0.1", ("0",), 8),
        Where("b", "10.0.0.2", ("9",), 16),
        Where("a", "10.0.0.1", ("1",), 8),
    ]
    order = rank_order(places)
    assert order == [2, 0, 1, 3]
    ranks = [places[number] for number in order]
    assert meeting_place(ranks) == "10.0.0.2"
    assert meeting_place(ranks[:2]) == "127.0.0.1"
    orders = orders_of(Path("/jobs/one"), Request(gpus=4), ranks, "10.0.0.2", 7)
    assert [tuple(one.seat) for one in orders] == [(0, 4, 0), (1, 4, 1), (2, 4, 0), (3, 4, 1)]
    # Every rank sees all GPUs of its host: memory that they share needs it.
    assert [one.gpus for one in orders] == [("9", "10")] * 2 + [("0", "1")] * 2
    assert [one.threads for one in orders] == [8, 8, 4, 4]
    assert not any(one.loopback for one in orders)
    assert all(one.loopback for one in orders_of(Path("/jobs/one"), Request(gpus=2), ranks[:2], "127.0.0.1", 7))


@pytest.mark.timeout(60)
def test_a_rank_ends_with_the_process_that_keeps_it(job: Job) -> None:
    program = (
        "import sys, time; from pathlib import Path; from semvid.launch.ranks.rank_process import Child, Order; "
        "from semvid.launch.env import Seat; "
        "Child(Order(folder=Path(sys.argv[1]), seat=Seat(0, 1, 0), host='127.0.0.1', port=1, gpus=(), threads=1, "
        "faults='hang:point=start')); print('started', flush=True); time.sleep(600)"
    )
    keeper = subprocess.Popen(
        [sys.executable, "-c", program, str(job.folder)], stdout=subprocess.PIPE, env=os.environ | PATH
    )
    assert keeper.stdout is not None
    assert keeper.stdout.readline() == b"started\n"
    assert len(processes("semvid.launch.ranks.worker", str(job.folder))) == 1
    keeper.kill()
    keeper.wait()
    wait_until(lambda: not processes("semvid.launch.ranks.worker", str(job.folder)), "the rank is gone", 10)
    assert rank_process.log_of(job.folder, 0).is_file()
