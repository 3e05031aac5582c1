import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from semvid.runtime.jobs import likeness as metrics
from semvid.runtime.jobs import video
from semvid.runtime.jobs.likeness import Frames, compare_frames, likeness_on, relative_error


@pytest.fixture
def frames() -> Frames:
    """A bright square that moves over a soft gradient."""
    y, x = np.mgrid[0:64, 0:96]
    movie = np.stack([np.stack([2 * x, 3 * y, x + y], -1) for _ in range(9)]).clip(0, 255).astype(np.uint8)
    for i in range(9):
        movie[i, 20:40, 8 * i : 8 * i + 16] = 250
    return movie


def test_the_h264_file_holds_every_frame(frames: Frames, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="needs PyAV, which is not installed")
    assert video.write_mp4(frames, tmp_path / "video.mp4", 24) == "H.264 (PyAV)"
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 24)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 6
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_without_pyav_opencv_writes_and_says_so(
    frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    assert "OpenCV; PyAV is not installed" in video.write_mp4(frames, tmp_path / "video.mp4", 16)
    reader = cv2.VideoCapture(str(tmp_path / "video.mp4"))
    decoded = [reader.read() for _ in range(10)]
    assert [ok for ok, _ in decoded] == [True] * 9 + [False]
    assert np.abs(decoded[4][1][..., ::-1].astype(int) - frames[4]).mean() < 8


def test_a_failed_write_leaves_nothing(frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(images: object, size: object, path: Path, fps: int) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    for writer in ("_write_av", "_write_cv"):
        monkeypatch.setattr(video, writer, fail)
    with pytest.raises(OSError, match="no space"):
        video.write_mp4(frames, tmp_path / "video.mp4", 16)
    assert list(tmp_path.iterdir()) == []


def test_the_contact_sheet_shows_first_and_last_frame(frames: Frames, tmp_path: Path) -> None:
    video.contact_sheet([("", frames)], tmp_path / "one.png")
    video.contact_sheet([("a", frames), ("b", frames)], tmp_path / "two.png")
    one, two = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "two.png"))
    assert one.shape == (160, 1440, 3)
    assert two.shape == (2 * (160 + video.LABEL_HEIGHT), 1440, 3)
    assert one[75, 20].min() > 200  # the square stands at the left of the first frame
    assert one[75, 1200 + 180].min() > 200  # and further right in the last


def test_equal_hashes_mean_equal_frames(frames: Frames) -> None:
    other = frames.copy()
    other[3, 5, 7, 1] ^= 1
    assert video.frames_sha256(frames) == video.frames_sha256(frames.copy())
    assert video.frames_sha256(frames) != video.frames_sha256(other)
    assert video.frames_sha256(frames) != video.frames_sha256(frames.reshape(9, 96, 64, 3))


def test_psnr_and_ssim_follow_their_definitions(frames: Frames) -> None:
    noisy = (frames.astype(int) + np.where(np.arange(96) % 2, 5, -5)[None, None, :, None]).clip(0, 255).astype(np.uint8)
    noisy[0] = frames[0]
    likeness = compare_frames(noisy, frames)
    assert likeness.psnr[0] is None
    assert likeness.ssim[0] == pytest.approx(1)
    for i in range(1, 9):
        mse = ((noisy[i].astype(float) - frames[i]) ** 2).mean()
        assert likeness.psnr[i] == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-6)
        assert likeness.ssim[i] < 1
    assert likeness.mean_psnr == pytest.approx(np.mean([x for x in likeness.psnr if x is not None]))
    assert compare_frames(frames, frames).mean_psnr is None


def test_videos_of_different_sizes_are_refused(frames: Frames) -> None:
    with pytest.raises(ValueError, match="can't be compared"):
        compare_frames(frames, frames[:5])


def test_lpips_is_measured_only_where_its_weights_are(
    frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = ModuleType("lpips")
    fake.LPIPS = lambda **_: lambda a, b: (a - b).abs().mean((1, 2, 3))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", fake)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert compare_frames(frames, frames).lpips is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    other = frames - frames // 2
    assert compare_frames(frames, frames).lpips == 0
    expected = np.abs(frames.astype(float) - other).mean() / 127.5
    assert compare_frames(frames, other).lpips == pytest.approx(expected, rel=1e-5)


def test_relative_error_is_the_norm_of_the_difference() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])
    assert relative_error(a, b) == pytest.approx(10**0.5 / 5)
    assert relative_error(b, b) == 0


def test_likeness_on_a_device_is_that_of_scikit_image() -> None:
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    b = np.clip(a + generator.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    b[1] = a[1]
    expected = compare_frames(a, b)
    psnr, ssim = likeness_on(a, b, torch.device("cpu"))
    assert psnr == pytest.approx(expected.mean_psnr, rel=1e-9)
    assert ssim == pytest.approx(expected.mean_ssim, rel=1e-6)
    assert likeness_on(a, a, torch.device("cpu")) == (None, pytest.approx(1.0))
