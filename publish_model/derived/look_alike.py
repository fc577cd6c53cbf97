"""Group buildings that look alike: k-means over the means of their images."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import take_rows
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.retrieval.geography import mean_positions
from pipeline.retrieval.group_scores import measure_groups
from publish_model.derived.embedding_groups import keys_of
from publish_model.derived.image_groups import Embeddings, Rows, average_groups, number_by_size

# Starts of k-means: the best is taken, and the others tell how far chance decides.
SEEDS = (0, 1, 2, 3)
COUNT_COLUMN = "num_images"


def average_ids(
    columns: pa.Table, embeddings: Embeddings, positions: NDArray[np.float64] | None
) -> tuple[pa.Table, Embeddings, NDArray[np.float64] | None, Rows]:
    """Return the ids with their numbers of images, their normalised means and positions, and their first rows.

    Images without an id are left out. A mean without a direction gives way to the first image.
    """
    numbers: dict[object, int] = {}
    keys = [key for (key,) in keys_of(columns, [ID_COLUMN])]
    rows = np.array([row for row, key in enumerate(keys) if key is not None], np.int64)
    codes = np.array([numbers.setdefault(keys[row], len(numbers)) for row in rows], np.int64)
    firsts = rows[np.unique(codes, return_index=True)[1]]
    (means,) = average_groups(embeddings[rows], groups=codes)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    means = np.where(lengths > 1e-6, means / np.maximum(lengths, 1e-6), embeddings[firsts])
    ids = take_rows(columns[ID_COLUMN].combine_chunks(), firsts)
    table = pa.Table.from_arrays([ids, pa.array(np.bincount(codes))], names=[ID_COLUMN, COUNT_COLUMN])
    if positions is not None:
        positions = np.stack(mean_positions(codes, positions[rows, 0], positions[rows, 1], len(numbers)), axis=1)
    return table, means.astype(np.float32), positions, firsts


def find_types(means: Embeddings, num_groups: int) -> tuple[Rows, float]:
    """Return the group of each row (B,), 0 the largest, and the adjusted Rand score between starts: 1 is stable.

    Rows that are equal share a group, so there may be fewer.
    """
    from sklearn.cluster import KMeans

    num_groups = min(num_groups, len(np.unique(means.round(5), axis=0)))
    fits = [KMeans(num_groups, n_init=1, random_state=seed).fit(means) for seed in SEEDS]
    best = min(fits, key=lambda fit: fit.inertia_)
    scores = [measure_groups(fit.labels_, best.labels_)["adjusted_rand"] for fit in fits if fit is not best]
    return number_by_size(best.labels_.astype(np.int64)), float(np.mean(scores))
