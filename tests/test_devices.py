"""A GPU's memory: what is said where it runs out, and what is tried first.

torch's own answers are put in its place: no GPU is needed.
"""

import pytest
import torch

from pipeline.errors import DeviceMemoryError, PipelineError
from pipeline.inference import devices
from pipeline.inference.devices import (
    choose_device,
    halve_until_it_fits,
    needing_memory,
)


def test_a_process_hands_out_its_own_gpu_by_number(monkeypatch):
    """A thread begins on GPU 0, so "cuda" alone would be that one there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


def test_memory_that_runs_out_is_one_line_with_its_remedy():
    with pytest.raises(DeviceMemoryError) as caught, needing_memory("a table", "or take a smaller one"):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert str(caught.value) == (
        "the GPU cannot hold a table: end what else runs on it (nvidia-smi), or take a smaller one"
    )
    with pytest.raises(ZeroDivisionError), needing_memory("", ""):
        print(1 / 0)


def test_the_size_is_halved_until_it_fits_but_no_further_than_the_least():
    tried = []

    def compute(size):
        tried.append(size)
        if size > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return f"by {size}"

    fits = 30
    assert halve_until_it_fits(compute, 100, 10, "it") == (25, "by 25")
    assert tried == [100, 50, 25]
    fits, tried = 3, []
    with pytest.raises(torch.cuda.OutOfMemoryError):
        halve_until_it_fits(compute, 100, 10, "it")
    assert tried == [100, 50, 25, 12, 6]


@pytest.mark.parametrize(
    ("required", "has_driver", "fails"),
    [("1", False, True), ("auto", True, True), ("auto", False, False), ("0", True, False)],
)
def test_a_job_that_needs_a_gpu_does_not_go_on_without(monkeypatch, tmp_path, required, has_driver, fails):
    """A driver that torch cannot use must not turn a night of H100 into one of CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "NVIDIA_DEVICE", tmp_path if has_driver else tmp_path / "none")
    monkeypatch.setenv("REQUIRE_GPU", required)
    assert choose_device("cpu").type == "cpu"
    if fails:
        with pytest.raises(PipelineError, match="no usable GPU: .* or REQUIRE_GPU to 0"):
            choose_device("auto")
    else:
        assert choose_device("auto").type == "cpu"
