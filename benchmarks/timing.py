"""What the benchmarks time with, and what they say of the machine."""

import datetime
import os
import platform
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline.cli import installed_version
from pipeline.config import count_cores

Result = TypeVar("Result")

ROUNDS = 2
_PACKAGES = ("torch", "triton", "torchvision", "transformers", "numpy", "pyarrow", "pillow")


def time_call(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes, with what it leaves a GPU to compute."""
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def run_steady(call: Callable[[], Result], rounds: int = ROUNDS) -> tuple[float, Result]:
    """Return the least seconds of a call's rounds, behind one that is not timed, and what the last one returned."""
    found, seconds = [call()], []
    for _ in range(rounds):
        found.clear()
        seconds.append(time_call(lambda: found.append(call())))
    return min(seconds), found[0]


def time_steady(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the least seconds of a call's rounds, behind one that is not timed."""
    return run_steady(call, rounds)[0]


def least(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least seconds of each call; they take turns, so that what else the machine does meets all of them."""
    seconds: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name] = min(seconds.get(name, np.inf), time_call(call))
    return seconds


def wait() -> None:
    """Wait for what a GPU still computes, if there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure_product(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Return the operations/s of a large square matrix product: what the device does at best in practice."""
    a = torch.rand((side, side), device=device).to(dtype)
    return 2 * side**3 / time_steady(lambda: a @ a, rounds=8)


def describe_machine() -> dict[str, Any]:
    """Say what the figures were measured on, and when."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": platform.machine(),
        "cores": count_cores(),
        "load_at_start": os.getloadavg()[0],
        "versions": {name: installed_version(name) for name in _PACKAGES},
    }
