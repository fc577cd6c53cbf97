"""Capture the forward and backward pass of a training step as graphs of a GPU, so that it does not wait for the host.

A step on few hundred images takes a GPU less time than the host takes to launch its operators one by one. A graph is
one launch; its shapes are the same each time, so that batches are padded, and what is added counts for nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.errors import one_line
from pipeline.inference.devices import COMPILE_ERRORS
from pipeline.log import logger
from train_specialized_embeddings.sampling.band_sampler import Batch, Places

# Losses whose operators' shapes do not depend on values. A loss with parameters might look at the padding.
FIXED_SHAPES = ("multi_similarity", "supcon")
# Larger batches keep a GPU busy without graphs; the anchors of these are compared in one tile.
SMALLEST_BATCH, LARGEST_BATCH = 16, 1024
# Compiling takes about a minute.
LEAST_STEPS = 20_000
# torch runs a graph once to warm up, then captures it, then replays it.
TRIALS = 3


class Judged(NamedTuple):
    """The outcome of a batch: the loss to descend, the sum of the anchors' losses, and its negatives by band."""

    loss: torch.Tensor
    loss_sum: torch.Tensor  # float64, without a gradient
    counts: torch.Tensor  # (2, bands) float64: the negatives found, and the active ones


class StepGraph:
    """Pads batches of at most `batch_size` anchors to one shape, and runs `judge` on them by compiled code."""

    def __init__(self, judge: Callable[..., Judged], batch_size: int, **options: Any) -> None:
        """Take torch.compile's `options`; `judge` is called with features and a padded batch."""
        self.num_anchors, self._num_groups = batch_size, batch_size // 2  # a group has two images or more
        torch.compiler.reset()  # torch keeps the code of eight runs, with their graphs' memory, and refuses a ninth
        self.judge, self.works = torch.compile(judge, dynamic=False, fullgraph=True, **options), False

    def pad(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the batches of a draw padded, by one copy to the device."""
        num_rows = self.num_anchors + self._num_groups
        lines = np.full((len(batches), num_rows + self._num_groups), -1)  # where from; -1 is padding
        row = group = 0
        for line, batch in zip(lines, batches, strict=True):
            negatives = len(batch.firsts)
            end = row + len(batch.places.rows)
            line[: end - negatives - row] = np.arange(row, end - negatives)
            line[self.num_anchors :][:negatives] = np.arange(end - negatives, end)
            line[num_rows:][:negatives] = np.arange(group, group + negatives)
            row, group = end, group + negatives
        source = torch.from_numpy(lines).to(batches[0].found.device)
        is_real, (own, groups) = source >= 0, source.clamp_min(0).split([num_rows, self._num_groups], dim=1)
        places = [torch.cat(values)[own] for values in zip(*(batch.places for batch in batches), strict=True)]
        firsts, bands, found = (
            torch.cat([getattr(batch, name) for batch in batches])[groups] for name in ("firsts", "bands", "found")
        )
        found &= is_real[:, num_rows:]
        columns = (Places(*each) for each in zip(*places, strict=True))
        return [Batch(*each) for each in zip(columns, firsts, bands, found, is_real[:, :num_rows], strict=True)]

    def try_out(self, features: torch.Tensor, batch: Batch, weights: Sequence[torch.Tensor]) -> None:
        """Run it forward and backward to see if it `works`; only the gradients of `weights` are lost. Log why not."""
        try:
            with torch.random.fork_rng([features.device] if features.is_cuda else []):
                for _ in range(TRIALS):
                    torch.compiler.cudagraph_mark_step_begin()
                    self.judge(features, batch).loss.backward()
                    for weight in weights:  # a gradient lies in the graph's memory, where the next run writes over it
                        weight.grad = None
            self.works = True
        except torch.cuda.OutOfMemoryError:
            raise
        except COMPILE_ERRORS as error:
            logger.warning("steps are not captured as graphs, which is slower: %s", one_line(error)[:200])


def may_capture(device: torch.device, loss: str, batch_size: int, num_steps: int) -> bool:
    """Tell whether a run is on a GPU, of small batches and long enough for its steps to be captured."""
    is_small = SMALLEST_BATCH <= batch_size <= LARGEST_BATCH
    return device.type == "cuda" and loss in FIXED_SHAPES and is_small and num_steps >= LEAST_STEPS
