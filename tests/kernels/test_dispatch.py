import inspect

import pytest
import torch

from semvid.kernels import dispatch, reference
from semvid.kernels.dispatch import Ops, missing, select

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", list(dispatch.MODULES))
def test_every_backend_has_every_op_with_the_references_signature(backend: str, device: torch.device) -> None:
    ops = select(backend, device)
    assert ops.name == backend
    for op in Ops._fields[1:]:
        found = inspect.signature(getattr(ops, op))
        assert found == inspect.signature(getattr(reference, op)), op


def test_auto_takes_the_reference_on_a_cpu() -> None:
    assert select("auto", CPU).name == "reference"


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu() -> None:
    assert select("auto", torch.device("cuda")).name == "triton"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'; accepted: auto, reference, triton"):
        select("cuda", CPU)


def test_triton_without_a_gpu_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    assert missing("triton", CPU) == "it needs an NVIDIA GPU, not cpu"
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run here: it needs an NVIDIA GPU"):
        select("triton", CPU)


def test_triton_that_is_not_installed_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(missing("triton", CPU))
    assert select("auto", CPU).name == "reference"


def test_an_old_gpu_is_refused_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or newer, this GPU has 7.5" in str(missing("triton", torch.device("cuda")))
