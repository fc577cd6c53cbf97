"""Choose the device that models run on, share its memory, and set how it computes."""

import ctypes
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.errors import DeviceMemoryError, PipelineError, Result
from pipeline.log import logger

# The driver makes this file for the first GPU, on Linux.
NVIDIA_DEVICE = Path("/dev/nvidia0")
# Raised by a failing or missing compiler; torch's own exceptions are RuntimeErrors.
COMPILE_ERRORS = (RuntimeError, ImportError, OSError, AssertionError, subprocess.SubprocessError)
# torch compiles a layer's code for so many kinds of layer, and runs any more of them uncompiled (recompile_limit).
MOST_KINDS = 8


def choose_device(wanted: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` stands for on this machine.

    A GPU has its number: without it, a new thread would take the first one.
    Raises PipelineError if `cuda` is asked for and there is none. As slurm/settings.sh says, $REQUIRE_GPU makes `auto`
    ask for it.
    """
    available, has_driver = torch.cuda.is_available(), NVIDIA_DEVICE.exists()
    if wanted == "auto" and os.environ.get("REQUIRE_GPU") in ("1", "auto" if has_driver else "1"):
        wanted = "cuda"
    if wanted == "cuda" and not available:
        raise PipelineError(
            "device cuda: this machine has no usable GPU: set [infrastructure].device to auto or cpu, or REQUIRE_GPU "
            "to 0"
        )
    if available and wanted != "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    if available or has_driver:
        why = "the device is set to cpu" if available else f"torch {torch.__version__} cannot use it; see nvidia-smi"
        logger.warning("a GPU is present but not used: %s", why)
    return torch.device("cpu")


# ------------------------------------------------------------------------------------------------ a GPU's memory


@contextmanager
def needing_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error of the GPU into a DeviceMemoryError that says what to do."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise DeviceMemoryError(
            f"the GPU cannot hold {what}: end what else runs on it (nvidia-smi), {remedy}"
        ) from None


def halve_until_it_fits(compute: Callable[[int], Result], size: int, least: int, what: str) -> tuple[int, Result]:
    """Return the size and `compute(size)`, halving the size each time the GPU's memory runs out, down to `least`."""
    while True:
        try:
            return size, compute(size)
        except torch.cuda.OutOfMemoryError:
            if size <= least:
                raise
        size //= 2  # outside the handler, where the exception no longer holds the tensors
        torch.cuda.empty_cache()
        logger.warning("%s: the GPU's memory ran out: going on with %d rows at a time", what, size)


# ------------------------------------------------------------------------------------------------ how it computes


def is_convolutional(model: torch.nn.Module) -> bool:
    """Whether a model convolves beyond its first layer, where even a ViT does."""
    return sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) > 1


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks for the next layer; with other C libraries do nothing.

    A forward pass on a CPU frees and takes megabytes at every layer. Getting them anew from the kernel took five sixths
    of the time (23 instead of 142 img/s, EfficientNet-Lite0 on two cores).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, malloc.h
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX: other threads' arenas would still give memory back


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


@contextmanager
def full_precision(*, tf32: bool = False) -> Iterator[None]:
    """Compute products and convolutions of float32 in float32, or in TF32, whatever the environment says.

    TF32 is torch's default for convolutions, and by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE for products too.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def compile_blocks(model: torch.nn.Module) -> int:
    """Mark a model's blocks to be compiled at their first call, and return their number.

    Blocks of one structure share the compiled code. A model whose blocks transformers does not name, or that are of
    more than MOST_KINDS structures, is compiled as a whole.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not 0 < len({str(block) for block in blocks}) <= MOST_KINDS:
        blocks = [model]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


def uncompile(model: torch.nn.Module) -> None:
    for module in model.modules():
        module._compiled_call_impl = None
