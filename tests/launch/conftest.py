"""Fixtures of the commands' tests. Ray's variables stand here because Ray reads them when it is imported."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from semvid.launch import env

# A token of these tests alone, and nothing that listens beyond this machine.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
env.prepare_ray(loopback=True)


@pytest.fixture(scope="module")
def one_thread_a_rank() -> Iterator[None]:
    """Lets every process that is started compute with one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder: what a command writes by default would land here."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
