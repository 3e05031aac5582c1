from pathlib import Path

import pytest

from semvid.launch import env, errors, machine
from semvid.runtime.jobs.heartbeat import Fault


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("200000 100000", 2), ("50000 100000", 1), ("x", None)]
)
def test_a_containers_quota_limits_the_cores(text: str, cores: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert machine._quota(tmp_path / "cpu.max") == cores
    assert machine._quota(tmp_path / "absent") is None


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    env.prepare()
    assert (env.os.environ["OMP_NUM_THREADS"], env.os.environ["GOMP_SPINCOUNT"]) == ("7", "20000")


@pytest.mark.parametrize(("processes", "threads"), [(1, "8"), (3, "2"), (16, "1")])
def test_processes_share_the_cores(processes: int, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    env.prepare(processes)
    assert env.os.environ["OMP_NUM_THREADS"] == threads


def test_a_seat_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # A cluster may set it for every process.
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert env.seat() == env.Seat(0, 1, 0)
    env.take_seat(env.Seat(3, 4, 1), 29500)
    assert env.seat() == env.Seat(3, 4, 1)
    assert (env.os.environ["MASTER_ADDR"], env.os.environ["MASTER_PORT"]) == ("127.0.0.1", "29500")
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(ValueError, match="LOCAL_RANK is 'x' where RANK is set; accepted: what torchrun sets"):
        env.seat()


def test_a_wait_policy_of_the_users_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    env.prepare()
    assert "GOMP_SPINCOUNT" not in env.os.environ


def test_a_commit_is_named_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMVID_COMMIT", "abc")
    assert machine.commit() == "abc"


def test_a_failure_of_the_machine_is_one_line_and_a_defect_keeps_its_traceback() -> None:
    assert errors.failure(OSError(28, "No space left on device", "video.mp4")) == "No space left on device: video.mp4"
    assert "fewer --frames" in errors.failure(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "fewer --frames" in errors.failure(MemoryError())
    with pytest.raises(RuntimeError, match="shape"):
        errors.failure(RuntimeError("shape mismatch"))


FAULTS = [
    ("", ()),
    ("kill:point=start", (Fault(action="kill", point="start"),)),
    (
        "hang:rank=1:point=exchange:step=3;kill:point=write:times=2",
        (Fault(action="hang", point="exchange", rank=1, step=3), Fault(action="kill", point="write", times=2)),
    ),
]


@pytest.mark.parametrize(("text", "found"), FAULTS)
def test_faults_are_read(text: str, found: tuple[Fault, ...]) -> None:
    assert env.faults(text) == found


@pytest.mark.parametrize(
    "text", ["kill", "burn:point=start", "kill:point=lunch", "kill:point=start:rank=x", "kill:a=1"]
)
def test_a_fault_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="^SEMVID_FAULT is '.*'; accepted: kill or hang, then point="):
        env.faults(text)
