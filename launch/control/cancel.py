"""The wish that a job end: a file in its folder, which whoever runs the job looks for."""

from pathlib import Path

NAME = ".cancel"


def ask(folder: Path) -> None:
    """Asks whoever runs the job of a folder to end it."""
    (folder / NAME).touch()


def is_wanted(folder: Path) -> bool:
    """Returns whether somebody has asked for the end of the job of a folder."""
    return (folder / NAME).exists()


def forget(folder: Path) -> None:
    """Takes the wish back."""
    (folder / NAME).unlink(missing_ok=True)
