"""Choose where models run."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.errors import PipelineError
from pipeline.log import logger

# What the driver makes for the first GPU, on Linux.
NVIDIA_DEVICE = Path("/dev/nvidia0")


def choose_device(wanted: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` stands for on this machine.

    Raises PipelineError if `cuda` is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise PipelineError("device cuda: this machine has no usable GPU: set [infrastructure].device to auto or cpu")
    if wanted == "cpu" and available:
        logger.warning("a GPU is present but not used: the device is set to cpu")
    if not available and NVIDIA_DEVICE.exists():
        logger.warning("a GPU is present but not used: torch %s cannot use it; see nvidia-smi", torch.__version__)
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def place(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Bring a model to a device.

    Raises PipelineError where the memory does not hold it.
    """
    try:
        return model.to(device)
    except torch.cuda.OutOfMemoryError:
        size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
        raise PipelineError(
            f"the GPU cannot hold the model of {size:.1f} GB: end what else runs on it (nvidia-smi), take a larger "
            'one, or set [embedding_model].dtype to "bfloat16"'
        ) from None


def is_convolutional(model: torch.nn.Module) -> bool:
    """Whether a model convolves beyond its first layer, in which a ViT cuts out its patches."""
    return sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) > 1


def forbid_tf32() -> None:
    """Have a GPU compute float32 as float32: TF32 is torch's default for convolutions, and an environment variable
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) makes it that for products too. It would miss the contract's cosine."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next layer instead of giving each back to the kernel.

    A forward pass on CPU frees and takes megabytes at every layer; fetching them anew, page by page, was seen to take
    five sixths of the time (23 against 142 img/s, EfficientNet-Lite0 on two cores). Elsewhere than on glibc: nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, malloc.h
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX: those of other threads than the main one give memory back all the same


def describe_device(device: torch.device) -> str:
    """Name the device for a log line."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep matrix products of float32 from being computed in TF32 or bfloat16, whatever the environment has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
