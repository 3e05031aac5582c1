"""Writes checkpoints in a thread, beside the next step: each rank its part, rank 0 the manifest, once all are there."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from semvid.parallel.ranks import Ranks
from semvid.runtime.jobs import checkpoint_files
from semvid.runtime.jobs.heartbeat import Pulse
from semvid.runtime.jobs.staging import Staged, Staging

PATIENCE_S = 600.0
POLL_S = 0.02

Told = Callable[[int, int, float], None]
"""Given the step, bytes and seconds of a checkpoint that is whole."""


class Writer:
    """One checkpoint at a time; the next waits for it. What goes wrong in the thread is raised at the next call.

    The thread enters no collective: rank 0 sees in the folder which parts are there.
    """

    def __init__(self, root: Path, ranks: Ranks, told: Told = lambda *_: None, pulse: Pulse | None = None) -> None:
        self.root = root
        self.ranks = ranks
        self.told = told
        self.pulse = pulse or Pulse()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = threading.Event()
        self._staging = Staging()

    def submit(self, step: int, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        """Starts copying and writing the checkpoint after `step` steps and returns.

        Args:
            step: steps done.
            tensors: this rank's part, on the CPU or a GPU; nobody may change them.
            body: rank 0's manifest but for the parts.

        Raises:
            OSError: of the checkpoint before.
        """
        self.join()
        staged = self._staging.copied(tensors)
        self._thread = threading.Thread(target=self._work, args=(step, staged, body), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what went wrong so far, if anything; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.join()

    def join(self) -> None:
        """Waits until what was submitted is on the disk.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def abandon(self) -> None:
        """Waits for the own part alone; a checkpoint that lacks others' parts never becomes one. Raises nothing."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, step: int, staged: Staged, body: Mapping[str, Any]) -> None:
        try:
            self._write(step, staged, body)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            self._error = error

    def _write(self, step: int, staged: Staged, body: Mapping[str, Any]) -> None:
        begin, rank = time.perf_counter(), self.ranks.rank
        folder = checkpoint_files.temporary(self.root, step)
        path = folder / f"rank-{rank:04d}.safetensors"
        try:
            own = checkpoint_files.write_tensors(path, staged.wait(), self.pulse.beat_of_writer)
            self.pulse.reach("checkpoint")
        except OSError:
            # A full disk: at least what is of no use goes.
            with contextlib.suppress(OSError):
                path.unlink()
                if self.ranks.mesh.world_size == 1:
                    # Another rank may be about to write into it, and would fail by this instead of the disk.
                    folder.rmdir()
            raise
        checkpoint_files.write_record(folder, rank, own)
        self.pulse.beat_of_part()
        if rank > 0:
            return
        found = self._gather(folder)
        if found is None:
            return
        checkpoint_files.write_manifest(folder, {**body, "parts": [part._asdict() for part in found]})
        checkpoint_files.commit(self.root, step)
        self.told(step, sum(part.bytes for part in found), time.perf_counter() - begin)

    def _gather(self, folder: Path) -> list[checkpoint_files.Part] | None:
        """Returns every rank's part once all are written; None if this run ends before."""
        patience, world_size = time.monotonic() + PATIENCE_S, self.ranks.mesh.world_size
        while (found := checkpoint_files.take_records(folder, world_size)) is None:
            if self._abandoned.wait(POLL_S):
                return None
            if time.monotonic() > patience:
                raise TimeoutError(f"{folder} lacks parts of some of {world_size} ranks after {PATIENCE_S:.0f} s")
        return found
