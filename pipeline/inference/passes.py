"""The passes of a model: their inputs and outputs, and how many images a pass takes."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

BATCH_SIZES = tuple(2**exponent for exponent in range(3, 11))
# A pass twice as large has to be faster by this share to be worth its memory.
LEAST_GAIN = 0.03


@dataclass(frozen=True)
class Staged:
    """Inputs of a pass on their way to the device, (n, 3, h, w) for each size, and the event of their arrival."""

    batches: list[torch.Tensor]
    arrived: torch.cuda.Event | None = None


@dataclass
class Launched:
    """A pass under way: its outputs by part, (n, D) each, and the events around each part on the GPU."""

    parts: list[torch.Tensor]
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]]

    def result(self) -> NDArray[np.float32]:
        """Wait for the embeddings, (N, D) float32."""
        if self.events:
            self.events[-1][1].synchronize()
        return torch.cat(self.parts).numpy()

    def gpu_seconds(self) -> float:
        """Return the seconds for which the GPU computed; call `result` first."""
        return float(sum(start.elapsed_time(end) for start, end in self.events)) / 1000.0


def find_batch_size(measure: Callable[[int], float], sizes: tuple[int, ...] = BATCH_SIZES) -> tuple[int, float]:
    """Return the size beyond which larger passes are hardly faster, and its images/s.

    `measure` returns the images/s of a size or raises torch.cuda.OutOfMemoryError. If no size fits, the smallest is
    returned, with rate 0.
    """
    best, best_rate = sizes[0], 0.0
    for size in sizes:
        try:
            rate = measure(size)
        except torch.cuda.OutOfMemoryError:
            break
        if rate < (1 + LEAST_GAIN) * best_rate:
            break
        best, best_rate = size, rate
    return best, best_rate


def stack_by_size(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Stack neighbours of one size and device."""
    groups = itertools.groupby(inputs, key=lambda tensor: (tensor.shape, tensor.device))
    return [torch.stack(list(group)) for _, group in groups]


def fetch(pooled: torch.Tensor) -> torch.Tensor:
    """Copy to the host; from a GPU into pinned memory, without waiting."""
    if pooled.device.type != "cuda":
        return pooled
    host = torch.empty(pooled.shape, dtype=pooled.dtype, pin_memory=True)
    return host.copy_(pooled, non_blocking=True)


def record_time() -> torch.cuda.Event:
    """Return an event that records when the GPU reaches it."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
