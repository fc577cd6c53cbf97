"""Group the rows of a dataset by id, and make the mean of each group and its spread."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.embeddings_dataset.columns import plain_values, take_rows
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN, embeddings_of
from pipeline.files.column_types import whole_from_floats

Key = tuple[object, ...]
MEASURED = pa.schema([("num_images", pa.int64()), ("mean_pairwise_similarity", pa.float64())])


def keys_of(table: pa.Table, by: Sequence[str]) -> list[Key]:
    """Return the keys of a table's rows as plain values; NaN, which equals nothing, counts as null.

    Raises InputError where a key is a float that is not a whole number.
    """
    columns = (table.column(name).combine_chunks() for name in by)
    columns = (whole_from_floats(one, name, "--by", quiet=True) for one, name in zip(columns, by, strict=True))
    rows = zip(*map(plain_values, columns), strict=True)
    return [tuple(None if value != value else value for value in row) for row in rows]  # noqa: PLR0124


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
