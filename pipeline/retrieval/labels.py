"""Read which building each image shows, and which pairs of buildings count as neither right nor wrong."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import InputError, one_line
from pipeline.files.column_types import whole_from_floats
from pipeline.files.text_tables import null_blanks, read_id_table
from pipeline.log import logger

# The column that names an image, in the order of preference: stage 8's, then that of the merged splits.
ID_COLUMNS = ("OSMID", "streetview_image_id")
LABEL_COLUMN = "building_id"
PAIR_COLUMNS = ("building_id_a", "building_id_b")


def to_text(place: Path, column: pa.Array | pa.ChunkedArray) -> pa.StringArray | pa.ChunkedArray:
    """Return ids of any scalar type as text, so that equal numbers match whatever their width.

    Raises InputError if they cannot be text.
    """
    column = whole_from_floats(column, "of ids", place)
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{place}: ids of type {column.type} cannot be compared ({one_line(error)[:100]})") from None


def label_rows(ids: pa.StringArray, labels_path: Path | None) -> pa.StringArray:
    """Return the building of each id (N,), null without one or with a blank one; without labels the id itself.

    Raises InputError if the labels are damaged, lack a column, give an id two buildings, or name none of the ids.
    """
    if labels_path is None:
        return ids
    table = read_id_table(labels_path, [ID_COLUMNS, LABEL_COLUMN], "labels say which building each image shows")
    name = table.column_names[0]
    if num_holes := table[name].null_count:
        logger.warning("%s: %d rows without an id are passed over", labels_path, num_holes)
    columns = {"id": to_text(labels_path, table[name]), "building": to_text(labels_path, table[LABEL_COLUMN])}
    columns["building"] = null_blanks(columns["building"])
    pairs = pa.table(columns).drop_null().group_by(["id", "building"]).aggregate([]).combine_chunks()
    if pairs.num_rows != len(pairs["id"].unique()):
        twice = next(entry["values"] for entry in pairs["id"].value_counts().to_pylist() if entry["counts"] > 1)
        raise InputError(f"{labels_path}: {name} {twice} has two buildings: give each image one")
    places = pc.index_in(ids, value_set=pairs["id"].combine_chunks())
    if places.null_count == len(ids):
        raise InputError(f"{labels_path}: names none of the images: give their labels")
    return pairs["building"].combine_chunks().take(places)


def read_ignore_pairs(path: Path | None) -> pa.Table | None:
    """Read the two id columns of a CSV or parquet as text; None if there is no path."""
    if path is None:
        return None
    remedy = f"--ignore-pairs takes a CSV with the columns {' and '.join(PAIR_COLUMNS)}"
    return read_id_table(path, PAIR_COLUMNS, remedy).cast(pa.schema([(name, pa.string()) for name in PAIR_COLUMNS]))


def resolve_pairs(pairs: pa.Table | None, building_ids: pa.StringArray) -> NDArray[np.int64]:
    """Return the pairs (M, 2) of two different buildings of the split, each once, as codes into `building_ids` (B,)."""
    if pairs is None:
        return np.empty((0, 2), np.int64)
    columns = [pairs.column(name).combine_chunks() for name in PAIR_COLUMNS]
    a, b = (
        pc.fill_null(pc.index_in(ids, value_set=building_ids), -1).to_numpy(zero_copy_only=False).astype(np.int64)
        for ids in columns
    )
    inside = (a >= 0) & (b >= 0) & (a != b)
    keys = np.unique(np.minimum(a, b)[inside] * len(building_ids) + np.maximum(a, b)[inside])
    log = logger.info if ((a >= 0) | (b >= 0)).any() else logger.warning  # written in another way, it seems
    log("ignore pairs: %d read, %d of them between buildings of the split", pairs.num_rows, len(keys))
    return np.stack(np.divmod(keys, len(building_ids)), axis=1)
