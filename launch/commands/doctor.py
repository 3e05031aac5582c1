"""`semvid doctor`: what this machine can run, what is missing, and the command that brings it."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from semvid.launch import machine


def examine() -> dict[str, Any]:
    """Returns devices, versions, which kernels can run here, and what is missing with the command that brings it."""
    import torch

    from semvid.kernels.dispatch import BACKENDS, lacks, missing, select
    from semvid.parallel import xdit
    from semvid.runtime.device import resolve_device
    from semvid.runtime.jobs.video import encoder

    device = resolve_device("auto")
    kernels = {name: missing(name, device) or _yes(lacks(name)) for name in BACKENDS if name != "auto"}
    return {
        "devices": _devices(),
        "cpu_cores": machine.usable_cores(),
        "torch_cuda": torch.version.cuda,
        "versions": machine.versions(),
        "commit": machine.commit(),
        "kernels": kernels,
        "auto": select("auto", device).name,
        "encoder": encoder(),
        "xfuser": xdit.missing() or "yes",
        "missing": _missing(),
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """Returns the findings as text."""
    devices = found["devices"] or [f"no NVIDIA GPU that PyTorch can use; the CPU, {found['cpu_cores']} cores"]
    text = [f"device    {device}" for device in devices]
    text += [f"version   {name} {version or 'missing'}" for name, version in found["versions"].items()]
    text.append(f"cuda      PyTorch is built for {found['torch_cuda'] or 'the CPU alone'}")
    text += [f"kernels   {name}: {state}" for name, state in found["kernels"].items()]
    text.append(f"auto      takes {found['auto']}")
    text.append(f"video     {found['encoder']}")
    text.append(f"xfuser    {found['xfuser']}")
    return text + [f"missing   {what}: {command}" for what, command in found["missing"].items()]


def _yes(but: str | None) -> str:
    return "yes" if but is None else f"yes, {but}"


def _devices() -> list[str]:
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
    return found


def _missing() -> dict[str, str]:
    """Returns what could be installed to do more, and how."""
    found = {}
    if not importlib.util.find_spec("av"):
        found["PyAV (H.264 video)"] = "pip install av"
    if not importlib.util.find_spec("triton"):
        found["Triton (GPU kernels)"] = "pip install triton"
    if not importlib.util.find_spec("lpips"):
        found["LPIPS (in `semvid compare`)"] = "pip install lpips; AlexNet's weights go into torch.hub's folder"
    return found
