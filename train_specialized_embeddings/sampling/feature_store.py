"""Hold the training features where the steps need them: on the GPU where they fit, else in memory."""

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.inference.devices import measure_free_memory
from pipeline.log import logger

# The features go to the GPU where they leave it this much: a step on 16,384 anchors takes about 4 GiB.
_RESERVED_BYTES = 8 * 2**30


class FeatureStore:
    """The rows (N, D) of an array; on CUDA they are kept there as bfloat16 where they fit."""

    def __init__(self, features: NDArray[np.floating[Any]], device: torch.device) -> None:
        self.device = device
        self._table = torch.from_numpy(features)
        if device.type == "cuda":
            if 2 * features.size + _RESERVED_BYTES <= measure_free_memory():
                with suppress(torch.cuda.OutOfMemoryError):  # other processes take their part meanwhile
                    self._table = self._table.to(device, torch.bfloat16)
            if not self.is_resident:
                logger.info("the features do not fit on the GPU: each batch is copied there")

    @property
    def is_resident(self) -> bool:
        """Whether all rows are on the device."""
        return self._table.device.type == self.device.type

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows (n, D), on the device."""
        return self._table.index_select(0, rows.to(self._table.device)).to(self.device)
