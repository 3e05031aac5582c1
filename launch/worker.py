"""One rank of one job: `python -m semvid.launch.worker --job DIR` runs the job.toml of a folder."""

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from semvid.launch import env


def run(folder: Path, label: str = "", pipeline: Any = None) -> tuple[Any, Any]:
    """Runs the job of a folder with a progress bar on stderr and returns (Job, Result).

    Args:
        folder: holds job.toml.
        label: stands before the bar.
        pipeline: the loaded checkpoint, if there is one already.

    Raises:
        ValueError: no job there, or its configuration does not fit the checkpoint.
    """
    env.prepare()
    from semvid.launch.report import Bar
    from semvid.runtime import job as jobs
    from semvid.runtime import models
    from semvid.runtime.generate import generate

    models.quiet()
    job = jobs.load(folder)
    with Bar(label) as bar:
        return job, generate(job, bar, pipeline)


def main() -> int:
    """Runs as a program; returns the exit code."""
    parser = ArgumentParser("semvid.launch.worker", description="Run the job.toml of a job folder.", allow_abbrev=False)
    parser.add_argument("--job", type=Path, required=True, metavar="DIR", help="the job folder")
    folder = parser.parse_args().job
    return env.exit_code("semvid.launch.worker", lambda: _report(folder))


def _report(folder: Path) -> int:
    job, result = run(folder)
    from semvid.launch.report import say, summary

    say(summary(job, result), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
