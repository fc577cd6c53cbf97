"""Means of the images of an id, their spread, and groups of ids that look alike by k-means over them."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import plain_values, take_rows
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN, embeddings_of
from pipeline.files.column_types import whole_from_floats
from pipeline.retrieval.geography import mean_positions
from pipeline.retrieval.group_scores import measure_groups
from publish_model.derived.image_groups import Embeddings, Rows, average_groups, number_by_size

Key = tuple[object, ...]
# Starts of k-means: the best is taken, and the others tell how far chance decides.
SEEDS = (0, 1, 2, 3)
COUNT_COLUMN = "num_images"
MEASURED = pa.schema([(COUNT_COLUMN, pa.int64()), ("mean_pairwise_similarity", pa.float64())])


def with_whole_keys(table: pa.Table, by: Sequence[str]) -> pa.Table:
    """Return a table whose keys that are floats are int64, NaN null; raise InputError where one is not whole."""
    for place in map(table.column_names.index, by):
        keys = whole_from_floats(table.column(place), table.column_names[place], "--by", quiet=True)
        table = table.set_column(place, table.schema.field(place).with_type(keys.type), keys)
    return table


def average_rows(table: pa.Table, keys: Sequence[Key], by: Sequence[str]) -> pa.Table:
    """Return a row for each key in order of its first one: `by`, num_images, mean_pairwise_similarity and embedding.

    For n unit vectors of sum s the mean over pairs is (|s|^2 - n) / (n (n - 1)); it is null for one image. The
    embedding is the L2-normalised mean; one of length zero has no direction, and is null.
    """
    numbers: dict[Key, int] = {}
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    counts = np.diff(np.append(starts, len(order)))  # (G,)
    embeddings = embeddings_of(table)[order]  # (N, D)
    squares = np.add.reduceat(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64), starts)
    sums = np.add.reduceat(embeddings, starts, dtype=np.float64)  # (G, D)
    lengths = np.sqrt(np.einsum("gd,gd->g", sums, sums))
    similarity = (lengths**2 - squares) / np.maximum(counts * (counts - 1.0), 1)
    has_direction = lengths > 1e-6 * counts
    means = (sums / np.where(has_direction, lengths, 1)[:, None]).astype(np.float32)
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(means.ravel(), pa.float32()), means.shape[1], mask=pa.array(~has_direction)
    )
    columns = [take_rows(table.column(name).combine_chunks(), order[starts]) for name in by]
    schema = pa.schema([*(table.schema.field(name) for name in by), *MEASURED, table.schema.field(EMBEDDING_COLUMN)])
    measured = [pa.array(counts), pa.array(similarity, mask=counts < 2)]
    return pa.Table.from_arrays([*columns, *measured, values], schema=schema)


def average_ids(
    columns: pa.Table, embeddings: Embeddings, positions: NDArray[np.float64] | None
) -> tuple[pa.Table, Embeddings, NDArray[np.float64] | None, Rows]:
    """Return the ids with their numbers of images, their normalised means and positions, and their first rows.

    Images without an id are left out. A mean without a direction gives way to the first image.
    """
    numbers: dict[object, int] = {}
    keys = plain_values(columns[ID_COLUMN])
    rows = np.array([row for row, key in enumerate(keys) if key is not None], np.int64)
    codes = np.array([numbers.setdefault(keys[row], len(numbers)) for row in rows], np.int64)
    firsts = rows[np.unique(codes, return_index=True)[1]]
    (means,) = average_groups(embeddings[rows], groups=codes)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    means = np.where(lengths > 1e-6, means / np.maximum(lengths, 1e-6), embeddings[firsts])
    table = pa.table(
        {ID_COLUMN: take_rows(columns[ID_COLUMN].combine_chunks(), firsts), COUNT_COLUMN: np.bincount(codes)}
    )
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
    others = (measure_groups(fit.labels_, best.labels_)["adjusted_rand"] for fit in fits if fit is not best)
    return number_by_size(best.labels_.astype(np.int64)), float(np.mean(list(others)))
