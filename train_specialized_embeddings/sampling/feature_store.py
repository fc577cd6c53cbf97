"""The training features where the steps need them: resident on the GPU, or gathered from disk ahead of use."""

import mmap
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.inference.devices import measure_free_memory
from pipeline.log import logger
from pipeline.threads import prefetch

# The features go to the GPU where they leave it this much: 16,384 triplets of 4,096 numbers take about 4 GiB a step.
_RESERVED_BYTES = 8 * 2**30
# Rows copied to the GPU at a time: 2^27 numbers are 512 MiB of float32.
_BLOCK_NUMBERS = 2**27
# Batches gathered ahead of the one that is computed, and threads that gather one: reads of single rows wait for the
# disk, so that many have to be under way at once.
_AHEAD, _THREADS = 2, 32
# A thread's share of a batch is at least this many rows.
_MIN_ROWS = 512

Gathered = tuple[torch.Tensor, torch.Tensor]


class FeatureStore:
    """The rows (N, D) of a read-only array, which may be larger than memory, on their way to the device.

    On CUDA they are kept there, float32 as bfloat16, where they fit or `resident` says so.
    """

    def __init__(
        self, embeddings: NDArray[np.floating[Any]], device: torch.device, *, resident: bool | None = None
    ) -> None:
        self.device, self._rows = device, embeddings
        self._table: torch.Tensor | None = None
        if device.type == "cuda":
            fits = 2 * embeddings.size + _RESERVED_BYTES <= measure_free_memory()
            if fits if resident is None else resident:
                with suppress(torch.cuda.OutOfMemoryError):  # other processes take their part meanwhile
                    self._table = self._upload()
            if self._table is None:
                logger.info("the features do not fit on the GPU: they are gathered batch by batch")
        if self._table is None and isinstance(embeddings.base, mmap.mmap):
            # Rows are scattered: reading ahead around each would only fill the memory with others.
            embeddings.base.madvise(mmap.MADV_RANDOM)

    @property
    def is_resident(self) -> bool:
        """Whether all rows are on the GPU."""
        return self._table is not None

    def stream(self, batches: Sequence[torch.Tensor]) -> Iterator[Gathered]:
        """Yield for each batch of row numbers (n,) features (u, D) and where each row is among them (n,).

        Rows are gathered once a batch and in the file's order, while the batches before are being computed.
        """
        if self._table is not None:
            for rows in batches:
                yield self._table.index_select(0, rows), torch.arange(len(rows), device=self.device)
            return
        wanted = [rows.cpu().numpy() for rows in batches]
        with (
            ThreadPoolExecutor(_THREADS) as readers,
            closing(prefetch((self._gather(rows, readers) for rows in wanted), _AHEAD)) as gathered,
        ):
            for features, places in gathered:
                yield features.to(self.device, non_blocking=True), places.to(self.device, non_blocking=True)

    def _gather(self, rows: NDArray[np.int64], readers: ThreadPoolExecutor) -> Gathered:
        """Read the rows by several threads into memory that the GPU can copy from while it computes."""
        wanted, places = np.unique(rows, return_inverse=True)
        is_cuda = self.device.type == "cuda"
        kind = torch.float16 if self._rows.dtype == np.float16 else torch.float32
        out = torch.empty((len(wanted), self._rows.shape[1]), dtype=kind, pin_memory=is_cuda)
        target = out.numpy()
        step = max(_MIN_ROWS, -(-len(wanted) // _THREADS))

        def read(first: int) -> None:
            part = slice(first, first + step)
            # Any other mode than `raise` writes to `out` without a copy in between.
            np.take(self._rows, wanted[part], axis=0, out=target[part], mode="clip")

        list(readers.map(read, range(0, len(wanted), step)))
        inverse = torch.from_numpy(places.reshape(-1))
        return out, inverse.pin_memory() if is_cuda else inverse

    def _upload(self) -> torch.Tensor:
        count, width = self._rows.shape
        kind = torch.float16 if self._rows.dtype == np.float16 else torch.bfloat16
        table = torch.empty((count, width), dtype=kind, device=self.device)
        step = max(1, _BLOCK_NUMBERS // width)
        for first in range(0, count, step):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
                block = torch.from_numpy(self._rows[first : first + step])
            table[first : first + step] = block.to(self.device)
        return table
