"""`ray job submit -- semvid run …`: the command runs on the cluster's head and finds the cluster by itself."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from semvid.runtime.jobs import job as jobs
from tests.launch.ranks.test_ray_cluster import MESH, PATH, options, sha256, undisturbed  # noqa: F401

pytest.importorskip("aiohttp", reason="Ray's job server needs ray[default]")

pytestmark = pytest.mark.usefixtures("one_thread_a_rank")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_of_rays_own_runs_on_its_cluster(tiny_model: Path, undisturbed: str, tmp_path: Path) -> None:  # noqa: F811
    from ray.cluster_utils import Cluster

    port = free_port()
    arguments = {"num_cpus": 4, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    head = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        words = [sys.executable, "-m", "semvid.launch.cli", "run", "a red ball", *options(tiny_model), "--gpus", "2"]
        words += ["--mesh", MESH, "--address", "auto", "--out", str(tmp_path / "job"), "--json"]
        environment = json.dumps({"env_vars": PATH})
        submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", f"http://127.0.0.1:{port}"]
        submit += ["--runtime-env-json", environment, "--", *words]
        found = subprocess.run(submit, env=os.environ | PATH, capture_output=True, text=True, timeout=600)
    finally:
        head.shutdown()
    assert found.returncode == 0, found.stdout + found.stderr
    assert "succeeded" in found.stdout
    assert sha256(jobs.load(tmp_path / "job")) == undisturbed
