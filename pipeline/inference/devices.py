"""Choose where models run."""

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from pipeline.errors import DeviceMemoryError, PipelineError
from pipeline.log import logger

Result = TypeVar("Result")

# What the driver makes for the first GPU, on Linux.
NVIDIA_DEVICE = Path("/dev/nvidia0")
# What the processes on one GPU divide among them; CUDA takes about half a gigabyte a process besides.
SHARED_MEMORY = 0.9

_own_share = 1.0  # of the GPU's memory, as `share_gpus` has set it


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

    Raises DeviceMemoryError where the memory does not hold it.
    """
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    with needing_memory(
        f"the model of {size:.1f} GB", 'take a larger one, or set [embedding_model].dtype to "bfloat16"'
    ):
        return model.to(device)


# ------------------------------------------------------------------------------------------------ a GPU's memory


@contextmanager
def needing_memory(what: str, remedy: str) -> Iterator[None]:
    """Raise DeviceMemoryError, which says what to do, where the GPU's memory does not hold what the block makes."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise DeviceMemoryError(
            f"the GPU cannot hold {what}: end what else runs on it (nvidia-smi), {remedy}"
        ) from None


def halve_until_it_fits(compute: Callable[[int], Result], size: int, least: int, what: str) -> tuple[int, Result]:
    """Return `compute(size)` and the size, which is halved each time the GPU's memory runs out.

    Raises torch.cuda.OutOfMemoryError where it runs out at `least`.
    """
    while True:
        try:
            return size, compute(size)
        except torch.cuda.OutOfMemoryError:
            if size <= least:
                raise
        size //= 2  # out here: the exception has held what was computed
        torch.cuda.empty_cache()
        logger.warning("%s: the GPU's memory ran out: going on with %d rows at a time", what, size)


def share_gpus(index: int, num_processes: int) -> None:
    """Give process `index` of several on this machine its GPU, in turn, and its share of that one's memory.

    Beyond it the process runs out of memory, and the others do not. Without a GPU nothing is done.
    """
    global _own_share  # noqa: PLW0603 (torch's own limit is the process's too)
    if num_processes == 1 or not torch.cuda.is_available():
        return
    num_gpus = torch.cuda.device_count()
    gpu = index % num_gpus
    _own_share = SHARED_MEMORY / len(range(gpu, num_processes, num_gpus))
    torch.cuda.set_device(gpu)
    torch.cuda.set_per_process_memory_fraction(_own_share)
    logger.info("process %d of %d: GPU %d, %.2f of its memory", index, num_processes, gpu, _own_share)


def measure_free_memory() -> int:
    """Return the bytes of the GPU's memory that this process may still take."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()  # of the current device: torch 2.4 takes no device without a number
    return int(min(free, _own_share * total - torch.cuda.memory_reserved()))


# ------------------------------------------------------------------------------------------------ how it computes


def is_convolutional(model: torch.nn.Module) -> bool:
    """Whether a model convolves beyond its first layer, in which a ViT cuts out its patches."""
    return sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) > 1


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
def full_precision(*, tf32: bool = False) -> Iterator[None]:
    """Have products and convolutions of float32 computed as such, or in TF32, whatever the environment has set.

    TF32 is torch's default for convolutions, and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE makes it that for products too.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
