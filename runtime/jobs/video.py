"""Frames into files: H.264 by PyAV, by OpenCV where PyAV is missing; a contact sheet; the hash of the frames."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from semvid.runtime.jobs.likeness import Frames

SHEET_COLUMNS = 6
SHEET_WIDTH = 1440
LABEL_HEIGHT = 18


def frames_sha256(frames: Frames) -> str:
    """Returns the SHA-256 of the decoded frames and their size: equal means the same video, before any encoding.

    Args:
        frames: uint8 [F, height, width, 3].
    """
    digest = hashlib.sha256(repr(frames.shape).encode())
    digest.update(np.ascontiguousarray(frames).tobytes())
    return digest.hexdigest()


def encoder() -> str:
    """Returns what `write_mp4` will use here: "H.264 (PyAV)" or "MPEG-4 Part 2 (OpenCV; PyAV is not installed)"."""
    return "H.264 (PyAV)" if importlib.util.find_spec("av") else "MPEG-4 Part 2 (OpenCV; PyAV is not installed)"


def write_mp4(frames: Frames, path: Path, fps: int, told: Callable[[], None] = lambda: None) -> str:
    """Writes the video whole or not at all, and returns the encoder used.

    Args:
        frames: uint8 [F, height, width, 3], even height and width.
        path: where; replaced if there.
        fps: frames per second.
        told: called before each frame.

    Raises:
        OSError: the file can't be written or no encoder works.
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        (_write_av if importlib.util.find_spec("av") else _write_cv)(
            _telling(frames, told), frames.shape[1:3], part, fps
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return encoder()


def contact_sheet(videos: Sequence[tuple[str, Frames]], path: Path) -> None:
    """Writes a PNG with a row of six frames, first to last, for each video.

    Args:
        videos: (label, uint8 [F, height, width, 3]); labels are drawn if there is more than one video.
        path: where.
    """
    rows = []
    for label, frames in videos:
        picks = np.linspace(0, len(frames) - 1, SHEET_COLUMNS).round().astype(int)
        row = Image.fromarray(np.concatenate([frames[i] for i in picks], axis=1))
        row = row.resize((SHEET_WIDTH, round(row.height * SHEET_WIDTH / row.width)), Image.Resampling.LANCZOS)
        rows.append(row if len(videos) == 1 else _labelled(row, label))
    sheet = Image.new("RGB", (SHEET_WIDTH, sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    sheet.save(part)
    part.replace(path)


def _labelled(row: Image.Image, label: str) -> Image.Image:
    canvas = Image.new("RGB", (row.width, row.height + LABEL_HEIGHT), "white")
    canvas.paste(row, (0, LABEL_HEIGHT))
    ImageDraw.Draw(canvas).text((6, 3), label, fill="black")
    return canvas


def _telling(frames: Frames, told: Callable[[], None]) -> Iterator[Frames]:
    for image in frames:
        told()
        yield image


def _write_av(images: Iterator[Frames], size: tuple[int, ...], path: Path, fps: int) -> None:
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "18", "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = size[0], size[1], "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _write_cv(images: Iterator[Frames], size: tuple[int, ...], path: Path, fps: int) -> None:
    import cv2

    height, width = size
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise OSError(f"OpenCV has no encoder that writes {path}")
    for image in images:
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    writer.release()
