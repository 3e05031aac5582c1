"""`semvid compare`: two presets, the same seed, and how far apart the videos are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semvid.launch import machine
from semvid.launch.ranks import worker
from semvid.launch.report import as_json
from semvid.runtime.config import Config
from semvid.runtime.jobs import job as jobs
from semvid.runtime.jobs import video
from semvid.runtime.jobs.likeness import compare_frames, relative_error
from semvid.runtime.models import folder as folders
from semvid.runtime.models import load


def compare(folder: Path, configs: Mapping[str, Config]) -> dict[str, Any]:
    """Returns the report of two runs, "preset" judged by "against", and writes it beside both job folders.

    Both run on one loaded checkpoint, unless one alone has FP8 layers. Writes `preset/` and `against/` (job folders),
    contact.png, compare.json.

    Args:
        folder: where; made if absent.
        configs: the configuration of each side.
    """
    load.quiet()
    report: dict[str, Any] = {}
    results = {}
    pipeline, loaded = None, None
    for side, config in configs.items():
        if config.model != loaded:
            # Let go of first: there may be no room for two.
            pipeline = None
            pipeline, loaded = load.load_pipeline(folders.locate(config.model.path), config.model), config.model
        job = jobs.create(folder / side, config)
        job, results[side] = worker.run(job.folder, f"{config.preset} ", pipeline)
        report[side] = as_json(job, results[side], {})
    ours, theirs = results["preset"], results["against"]
    likeness = compare_frames(ours.frames, theirs.frames)
    sheet = folder / "contact.png"
    video.contact_sheet([(configs[side].preset, results[side].frames) for side in configs], sheet)
    report |= {
        "mean_psnr": likeness.mean_psnr,
        "psnr": likeness.psnr,
        "mean_ssim": likeness.mean_ssim,
        "ssim": likeness.ssim,
        "lpips": likeness.lpips,
        "latent_error": relative_error(ours.latents, theirs.latents),
        "same_frames": ours.frames_sha256 == theirs.frames_sha256,
        "contact": str(sheet),
        **machine.surroundings(ours.device),
    }
    (folder / "compare.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return report


def table(report: Mapping[str, Any]) -> list[str]:
    """Returns the report as lines of text."""
    rows: list[tuple[str, ...]] = [("", "preset", "against")]
    for title, key, form in (
        ("preset", "preset", "{}"),
        ("s per step", "seconds_per_step", "{:.3f}"),
        ("density", "density", "{:.3f}"),
        ("over", "density_over", "{}"),
        ("of all calls", "density_all_calls", "{:.3f}"),
        ("denoise s", None, "{:.1f}"),
    ):
        sides = (report[side] for side in ("preset", "against"))
        values = [side["phase_seconds"]["denoise"] if key is None else side[key] for side in sides]
        rows.append((title, *(form.format(value) for value in values)))
    lines = ["  ".join(f"{cell:24}" for cell in row).rstrip() for row in rows]
    psnr = [x for x in report["psnr"] if x is not None]
    worst = "" if not psnr else f", worst frame {min(psnr):.2f} dB"
    mean = "infinite: the frames are equal" if not psnr else f"{report['mean_psnr']:.2f} dB"
    lpips = "not measured: the lpips package or its weights are missing" if report["lpips"] is None else report["lpips"]
    return [
        *lines,
        f"PSNR          {mean}{worst}",
        f"SSIM          {report['mean_ssim']:.4f}, worst frame {min(report['ssim']):.4f}",
        f"LPIPS         {lpips}",
        f"latent error  {report['latent_error']:.4f} (‖a − b‖ / ‖b‖)",
        f"side by side  {report['contact']}",
    ]
