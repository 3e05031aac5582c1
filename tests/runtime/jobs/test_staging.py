"""Tensors copied beside the GPU's work arrive whole, whatever their dtype and shape."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from semvid.runtime.jobs.staging import Staging


def test_tensors_on_the_cpu_are_taken_as_they_are() -> None:
    x, y = torch.arange(6).view(2, 3), torch.ones(2)
    found = Staging().copied({"x": x, "turned": x.T, "y": y.requires_grad_()}).wait()
    assert found["x"].data_ptr() == x.data_ptr()
    assert torch.equal(found["turned"], x.T)
    assert found["turned"].is_contiguous()
    assert not found["y"].requires_grad


@pytest.mark.gpu
def test_what_a_gpu_has_arrives_and_later_work_does_not_change_it() -> None:
    staging = Staging()
    for size in (5, 1000, 7):
        x = torch.arange(size, device="cuda", dtype=torch.float32)
        given = {
            "fp32": x,
            "labels": x.to(torch.uint16),
            "bits": (x % 2).bool(),
            "strided": x.expand(3, size).T,
            "empty": x[:0],
            "host": torch.tensor([1, 2]),
        }
        expected = {name: part.cpu().clone() for name, part in given.items()}
        # The copies wait for this, and what follows does not wait for them.
        torch.cuda._sleep(50_000_000)
        x.add_(0)
        staged = staging.copied(given)
        other = torch.full((1 << 20,), 7.0, device="cuda")
        # As the writer does, in a thread of its own.
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(staged.wait).result()
        assert list(found) == list(given)
        for name, part in found.items():
            assert part.device.type == "cpu"
            assert part.dtype == expected[name].dtype
            assert torch.equal(part, expected[name]), name
        assert float(other.sum()) == 7.0 * (1 << 20)
