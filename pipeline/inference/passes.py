"""The passes of a model: their inputs and outputs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


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
