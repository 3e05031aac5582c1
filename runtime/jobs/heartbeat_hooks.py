"""Has a pipeline's models beat: every block of its encoders, its transformers and its VAE, also on the GPU."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from semvid.parallel import phases
from semvid.runtime.jobs.heartbeat import Pulse

POLL_S = 0.5


@contextlib.contextmanager
def beating(pipeline: Any, pulse: Pulse) -> Iterator[None]:
    """Counts, inside, each block of the pipeline's models and each phase of an attention call.

    A host may queue a whole step and then wait for its GPU. There an event behind each block tells how far the GPU
    has come; a thread looks which have passed, and counts nothing of its own.
    """
    marks: deque[torch.cuda.Event] = deque()
    on_gpu = pipeline.device.type == "cuda"
    with contextlib.ExitStack() as stack:
        stack.enter_context(phases.telling(pulse.beat))
        for point, block in _blocks(pipeline):
            hook = _counting(pulse, point, marks if on_gpu else None)
            stack.callback(block.register_forward_pre_hook(hook).remove)
        if on_gpu:
            stack.enter_context(_following(marks, pulse))
        yield


def _blocks(pipeline: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields the members of every ModuleList of a pipeline's models, whatever the family, and the point of each.

    A rank may lack some models: of several the first alone encodes.
    """
    for name, model in pipeline.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        for path, module in model.named_modules(prefix=name):
            if isinstance(module, torch.nn.ModuleList):
                yield from ((_point(path), block) for block in module)


def _point(path: str) -> str:
    """Returns what the blocks at a path, such as "vae.decoder.up_blocks", count as."""
    if path.startswith("transformer"):
        return "block"
    # Of a VAE the encoder serves videos that begin with an image.
    return "encode" if "encoder" in path else "decode"


def _counting(pulse: Pulse, point: str, marks: "deque[torch.cuda.Event] | None") -> Callable[..., None]:
    # Of several ranks the first alone encodes, and decodes unless there are tiles, of which each has others.
    beat = pulse.beat if point == "block" else pulse.beat_alone

    def count(*_: Any) -> None:
        beat(point)
        if marks is not None and not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event()
            event.record()
            marks.append(event)

    return count


@contextlib.contextmanager
def _following(marks: "deque[torch.cuda.Event]", pulse: Pulse) -> Iterator[None]:
    """Counts, inside, the events that the GPU has passed."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(POLL_S):
            passed = 0
            while marks and marks[0].query():
                marks.popleft()
                passed += 1
            if passed:
                pulse.beat_of_device(passed)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
