"""Read the ids and positions of the images of many files."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.files.tables import read_columns


def read_ids(paths: list[Path], fields: Iterable[pa.Field], remedy: str) -> list[pa.Table]:
    """Return some columns of each file, `streetview_image_id` among them.

    Raises InputError as `read_columns` does, or if an image is there twice, naming one and its files.
    """
    tables = [read_columns(path, fields, remedy) for path in paths]
    ids = pa.chunked_array([chunk for table in tables for chunk in table["streetview_image_id"].chunks], pa.string())
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        holders = zip(paths, tables, strict=True)
        names = [path.name for path, table in holders if pc.is_in(repeated, table["streetview_image_id"]).as_py()]
        raise InputError(
            f"{paths[0].parent}: image {repeated} is there more than once, in {', '.join(names)}: remove one"
        )
    return tables
