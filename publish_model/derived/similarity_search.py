"""Exact search over the embeddings of a dataset, block by block, in bounded memory."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError

Embeddings = NDArray[np.float32]


def import_faiss() -> Any:
    """Return faiss.

    Raises PipelineError where it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise PipelineError(
            "faiss: not installed, and the search needs it: pip install faiss-cpu (the project's extra `faiss`)"
        ) from None
    return faiss


def find_nearest(
    queries: Embeddings, blocks: Iterable[tuple[int, Embeddings]], num_nearest: int
) -> tuple[Embeddings, NDArray[np.int64]]:
    """Return the similarities and rows (Q, k) of the nearest of all blocks to each of (Q, D) queries, nearest first.

    A block is the number of its first row and (N, D) embeddings. Equal ones come in order of their rows. Where there
    are fewer than `num_nearest` rows, k is their number.
    """
    faiss = import_faiss()
    similarities = np.empty((len(queries), 0), dtype=np.float32)
    rows = np.empty((len(queries), 0), dtype=np.int64)
    for first, block in blocks:
        if not len(block):
            continue
        index = faiss.IndexFlatIP(block.shape[1])
        index.add(block)
        found, places = index.search(queries, min(num_nearest, len(block)))
        similarities = np.concatenate([similarities, found], axis=1)
        rows = np.concatenate([rows, places + first], axis=1)
        order = np.lexsort((rows, -similarities), axis=1)[:, :num_nearest]
        similarities = np.take_along_axis(similarities, order, axis=1)
        rows = np.take_along_axis(rows, order, axis=1)
    return similarities, rows
