"""The table of groups: a row for each image with its group, its likeness to the group's medoid, and its position."""

import json

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import take_rows
from publish_model.derived.geometry import GEO_KEY, GEOMETRY_COLUMN, VERSION
from publish_model.derived.image_groups import Embeddings, Rows, average_groups, multiply_rows

CLUSTER_COLUMN, ROW_COLUMN = "cluster", "row"
MADE_COLUMNS = (CLUSTER_COLUMN, "similarity", "is_medoid", ROW_COLUMN, GEOMETRY_COLUMN)
# These make a parquet with such a column of points a GeoParquet.
_POINTS = {GEOMETRY_COLUMN: {"encoding": "WKB", "geometry_types": ["Point"]}}
POINTS_METADATA = {
    GEO_KEY: json.dumps({"version": VERSION, "primary_column": GEOMETRY_COLUMN, "columns": _POINTS}).encode()
}


def make_table(
    columns: pa.Table, embeddings: Embeddings, groups: Rows, positions: NDArray[np.float64] | None, rows: Rows
) -> pa.Table:
    """Return the columns of images (N,) with what was found, sorted by group and then by cosine to the medoid.

    A medoid is the image most similar to all of its group as a mean, of equal ones the first. `rows` (N,) are the
    images' rows of the dataset.
    """
    numbers = np.arange(len(groups))
    to_mean = multiply_rows(embeddings, numbers, average_groups(embeddings, groups=groups)[0], groups)
    ranked = np.lexsort((-to_mean, groups))
    medoids = ranked[np.flatnonzero(np.diff(groups[ranked], prepend=-1))]  # (G,)
    is_medoid = medoids[groups] == numbers
    similarity = np.minimum(multiply_rows(embeddings, numbers, embeddings[medoids], groups), np.float32(1))
    order = np.lexsort((numbers, -similarity, ~is_medoid, groups))
    taken = [take_rows(column.combine_chunks(), order) for column in columns.columns]
    table = pa.Table.from_arrays(taken, schema=columns.schema)
    for name, values in zip(MADE_COLUMNS, (groups, similarity, is_medoid, rows), strict=False):
        table = table.append_column(name, pa.array(values[order]))
    if positions is None:
        return table
    points = shapely.to_wkb(shapely.points(positions[order, ::-1]), byte_order=1)
    unknown = np.isnan(positions[order]).any(axis=1)
    return table.append_column(GEOMETRY_COLUMN, pa.array(points, pa.binary(), mask=unknown))
