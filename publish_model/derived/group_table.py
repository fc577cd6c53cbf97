"""The table of groups: a row for each image with its group, its likeness to the group's medoid, and its position."""

import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import take_rows
from publish_model.derived.geometry import GEO_KEY, GEOMETRY_COLUMN, VERSION
from publish_model.derived.image_groups import Embeddings, Rows, multiply_rows, sum_groups

CLUSTER_COLUMN, ROW_COLUMN = "cluster", "row"
MADE_COLUMNS = (CLUSTER_COLUMN, "similarity", "is_medoid", ROW_COLUMN, GEOMETRY_COLUMN)
# These make a parquet with such a column of points a GeoParquet.
_POINTS = {GEOMETRY_COLUMN: {"encoding": "WKB", "geometry_types": ["Point"]}}
POINTS_METADATA = {
    GEO_KEY: json.dumps({"version": VERSION, "primary_column": GEOMETRY_COLUMN, "columns": _POINTS}).encode()
}
_WKB_POINT = struct.Struct("<BIdd")


def find_medoids(embeddings: Embeddings, groups: Rows) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return each row's cosine to its group's medoid (N,), and which rows are medoids.

    A medoid is the image most similar to all of its group as a mean, of equal ones the first.
    """
    rows = np.arange(len(groups))
    to_sum = multiply_rows(embeddings, rows, sum_groups(embeddings, None, groups).embeddings, groups)
    ranked = np.lexsort((-to_sum, groups))
    medoids = ranked[np.flatnonzero(np.diff(groups[ranked], prepend=-1))]
    is_medoid = np.zeros(len(groups), dtype=bool)
    is_medoid[medoids] = True
    return np.minimum(multiply_rows(embeddings, rows, embeddings[medoids], groups), np.float32(1)), is_medoid


def make_group_table(
    columns: pa.Table,
    embeddings: Embeddings,
    groups: Rows,
    positions: NDArray[np.float64] | None = None,
    rows: Rows | None = None,
) -> pa.Table:
    """Return the columns of images (N,) with what was found, sorted by group and then by likeness to the medoid.

    `rows` are the images' rows of the dataset, if they are not all of them.
    """
    similarity, is_medoid = find_medoids(embeddings, groups)
    order = np.lexsort((np.arange(len(groups)), -similarity, ~is_medoid, groups))
    taken = [take_rows(column.combine_chunks(), order) for column in columns.columns]
    table = pa.Table.from_arrays(taken, schema=columns.schema)
    made: list[NDArray[Any]] = [groups, similarity, is_medoid, np.arange(len(groups)) if rows is None else rows]
    for name, values in zip(MADE_COLUMNS, made, strict=False):
        table = table.append_column(name, pa.array(values[order]))
    if positions is None:
        return table
    known = np.asarray(np.isfinite(positions).all(axis=1))
    points = [_WKB_POINT.pack(1, 1, *positions[row, ::-1]) if known[row] else None for row in order]
    return table.append_column(GEOMETRY_COLUMN, pa.array(points, pa.binary()))
