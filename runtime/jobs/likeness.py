"""The distance between two videos: PSNR, SSIM, LPIPS, error of the latents."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Frames = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Likeness:
    """How close two videos are, frame by frame. PSNR in dB; None where the frames are equal (it is infinite)."""

    psnr: list[float | None]
    ssim: list[float]
    lpips: float | None
    """Mean over frames; None where the package or its weights are missing."""

    @property
    def mean_psnr(self) -> float | None:
        """Mean PSNR over the frames that differ, in dB; None if all are equal."""
        finite = [x for x in self.psnr if x is not None]
        return float(np.mean(finite)) if finite else None

    @property
    def mean_ssim(self) -> float:
        """Mean SSIM over the frames."""
        return float(np.mean(self.ssim))


def compare_frames(a: Frames, b: Frames) -> Likeness:
    """Returns PSNR and SSIM (scikit-image, data range 255) of two videos of equal size.

    Args:
        a: uint8 [F, height, width, 3].
        b: likewise.

    Raises:
        ValueError: the sizes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"videos of sizes {a.shape} and {b.shape} can't be compared")
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    pairs = list(zip(a, b, strict=True))
    psnr = [None if np.array_equal(*pair) else float(peak_signal_noise_ratio(*pair, data_range=255)) for pair in pairs]
    ssim = [float(structural_similarity(*pair, channel_axis=-1, data_range=255)) for pair in pairs]
    return Likeness(psnr, ssim, _lpips(a, b))


def likeness_on(a: Frames, b: Frames, device: torch.device) -> tuple[float | None, float]:
    """Returns mean PSNR over the frames that differ, in dB (None if none does), and mean SSIM, computed on `device`.

    Both are those of `compare_frames`: scikit-image takes seconds a frame at 480 × 832.

    Args:
        a: uint8 [F, height, width, 3].
        b: likewise.
        device: where to compute, frame by frame in fp64.
    """
    psnr, ssim = [], []
    for pair in zip(a, b, strict=True):
        x, y = (torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].double() for frame in pair)
        if not torch.equal(x, y):
            psnr.append(10 * torch.log10(255**2 / (x - y).square().mean()))
        ssim.append(_structural_similarity(x, y))
    return float(torch.stack(psnr).mean()) if psnr else None, float(torch.stack(ssim).mean())


def _structural_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Returns SSIM (Wang et al. 2004) of [1, 3, height, width], range 255: 7 × 7 windows, sample variances."""
    size = 7
    n = size * size
    means = [torch.nn.functional.avg_pool2d(z, size, 1) for z in (x, y, x * x, y * y, x * y)]
    mx, my = means[:2]
    vx, vy, vxy = (n / (n - 1) * (m - p) for m, p in zip(means[2:], (mx * mx, my * my, mx * my), strict=True))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean()


def relative_error(a: Tensor, b: Tensor) -> float:
    """Returns ‖a - b‖ / ‖b‖ in fp64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(torch.float64).tiny))


def _lpips(a: Frames, b: Frames) -> float | None:
    """Returns the mean LPIPS (AlexNet) over frames, None unless the package and AlexNet's weights are on the disk."""
    weights = list((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-owt-*.pth"))
    if importlib.util.find_spec("lpips") is None or not weights:
        return None
    import lpips

    model = lpips.LPIPS(net="alex", verbose=False)
    scaled = [torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (a, b)]
    with torch.no_grad():
        parts = [model(x, y).flatten() for x, y in zip(*(s.split(8) for s in scaled), strict=True)]
    return float(torch.cat(parts).mean())
