"""What an exception means to the user: one line, an exit code."""

import signal
import sys
from collections.abc import Callable

from semvid.runtime.jobs.job import StoppedError

STOPPED = 128 + signal.SIGTERM
MORE_MEMORY = "fewer --frames, a smaller --height and --width, or more --gpus need less"
INTERRUPTED = "interrupted; the job folder says how far it came"


def exit_code(program: str, work: Callable[[], int]) -> int:
    """Returns what `work` returns, or in one line what stopped it and 2 (bad input), 1 (the machine), 130 (Ctrl-C).

    143 is a job that was told to stop by SIGTERM, and that has said so.

    Args:
        program: what stands before the line.
        work: the program itself; a defect's exception passes through with its traceback.
    """
    try:
        return work()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message, code = explain(error)
    except StoppedError:
        return STOPPED
    except KeyboardInterrupt:
        message, code = INTERRUPTED, 130
    print(f"{program}: {message}", file=sys.stderr)
    return code


def explain(error: Exception) -> tuple[str, int]:
    """Returns what to tell a person of an error, and the exit code: 2 for bad input, 1 for what is the machine's.

    Raises:
        Exception: `error` itself, if it is a defect.
    """
    if isinstance(error, ValueError):
        return " ".join(str(error).split()), 2
    return failure(error), 1


def failure(error: Exception) -> str:
    """Returns what to tell a person of an error that is the machine's and not the input's.

    Raises:
        Exception: `error` itself, if it is neither the file system's nor a lack of memory: a defect keeps its trace.
    """
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    if lacks_memory(error):
        return f"out of memory; {MORE_MEMORY}"
    raise error


def lacks_memory(error: Exception) -> bool:
    """Returns whether an error says that memory, of the machine or of a GPU, is used up."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()
