import importlib
import inspect

import pytest
import torch
import triton

from semvid.kernels import dispatch, reference
from semvid.kernels.dispatch import Ops, lacks, missing, select

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("backend", list(dispatch.MODULES))
def test_every_backend_has_every_op_with_the_references_signature(backend: str, device: torch.device) -> None:
    reason = missing(backend, device)
    if reason is not None:
        pytest.skip(reason)
    ops = select(backend, device)
    assert ops.name == backend
    for op in Ops._fields[1:]:
        found = inspect.signature(getattr(ops, op))
        assert found == inspect.signature(getattr(reference, op)), op


def test_auto_takes_the_reference_on_a_cpu() -> None:
    assert select("auto", CPU).name == "reference"


@pytest.mark.gpu
def test_auto_takes_hopper_or_triton_on_a_gpu() -> None:
    assert select("auto", CUDA).name == ("hopper" if torch.cuda.get_device_capability()[0] == 9 else "triton")


@pytest.mark.parametrize(("capability", "name"), [((8, 0), "triton"), ((9, 0), "hopper"), ((10, 0), "triton")])
def test_auto_takes_hopper_on_capability_9_only(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability)
    assert select("auto", CUDA).name == name


def test_hopper_takes_from_triton_what_it_has_no_kernel_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    hopper, generic = select("hopper", CUDA), select("triton", CUDA)
    own = {op for op in Ops._fields[1:] if getattr(hopper, op) is not getattr(generic, op)}
    assert own == {"assign", "attention"}
    assert lacks("hopper") is None
    for op in Ops._fields[1:]:
        assert inspect.signature(getattr(hopper, op)) == inspect.signature(getattr(reference, op)), op


def test_a_triton_that_is_too_new_for_hopper_attention_takes_the_generic_one_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    hopper, generic = select("auto", CUDA), select("triton", CUDA)
    assert hopper.name == "hopper"
    assert {op for op in Ops._fields[1:] if getattr(hopper, op) is not getattr(generic, op)} == {"assign"}
    assert lacks("hopper") == (
        "attention by triton: its own needs a triton older than 3.8, found 3.8.0 (pip install 'triton<3.8')"
    )
    assert lacks("triton") is None
    assert lacks("reference") is None


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'; accepted: auto, reference, triton, hopper"):
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
    pretend(monkeypatch, (7, 5))
    assert "8.0 or newer, this GPU has 7.5" in str(missing("triton", CUDA))


def test_hopper_without_a_hopper_gpu_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing("hopper", CPU) == "it needs a Hopper GPU (compute capability 9.0), not cpu"
    with pytest.raises(ValueError, match="backend is 'hopper', which cannot run here: it needs a Hopper GPU"):
        select("hopper", CPU)
    pretend(monkeypatch, (12, 0))
    assert missing("hopper", CUDA) == "it needs a Hopper GPU (compute capability 9.0), this GPU has 12.0"


@pytest.mark.parametrize("version", ["3.5.1", "2.3.0+git1"])
def test_hopper_with_an_old_triton_is_refused_with_the_command(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(triton, "__version__", version)
    reason = f"it needs triton 3.6 or newer, found {version} (pip install 'triton>=3.6')"
    assert missing("hopper", CUDA) == reason
    assert select("auto", CUDA).name == "triton"


def test_hopper_without_gluon_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gluon(name: str) -> object:
        if name == "semvid.kernels.hopper_attention":
            raise ImportError("No module named 'triton.experimental.gluon'")
        return found(name)

    found = importlib.import_module
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(dispatch.importlib, "import_module", without_gluon)
    reason = f"triton {triton.__version__} lacks the Gluon that it needs: No module named 'triton.experimental.gluon'"
    assert missing("hopper", CUDA) == reason
    assert select("auto", CUDA).name == "triton"


def test_hopper_without_triton_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(missing("hopper", CPU))
