"""Exact search over the embeddings of a dataset, block by block, in bounded memory."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Embeddings = NDArray[np.float32]


def find_nearest(
    queries: Embeddings, blocks: Iterable[tuple[int, Embeddings]], num_nearest: int
) -> tuple[Embeddings, NDArray[np.int64]]:
    """Return the similarities and rows (Q, k) of the nearest of all blocks to each of (Q, D) queries, nearest first.

    A block is the number of its first row and (N, D) embeddings. Equal ones come in order of their rows. Where there
    are fewer than `num_nearest` rows, k is their number.
    """
    similarities = np.empty((len(queries), 0), dtype=np.float32)
    rows = np.empty((len(queries), 0), dtype=np.int64)
    for first, block in blocks:
        own = np.broadcast_to(np.arange(first, first + len(block)), (len(queries), len(block)))
        similarities = np.concatenate([similarities, queries @ block.T], axis=1)
        rows = np.concatenate([rows, own], axis=1)
        best = np.argpartition(similarities, -min(num_nearest, rows.shape[1]), axis=1)[:, -num_nearest:]
        similarities = np.take_along_axis(similarities, best, axis=1)
        rows = np.take_along_axis(rows, best, axis=1)
    order = np.lexsort((rows, -similarities), axis=1)
    return np.take_along_axis(similarities, order, axis=1), np.take_along_axis(rows, order, axis=1)
