"""Turn this project's artefacts into those that the reference implementation leaves: pandas' types, no provenance."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files.tables import CAMERA_COLUMNS, PLACE_COLUMNS

NEWER_COLUMNS = {name for name, _ in CAMERA_COLUMNS + PLACE_COLUMNS}
LIST_TYPES = {"embedding": pa.list_(pa.float64()), "fingerprint": pa.list_(pa.int64())}


def age(path: Path, *, without: tuple[str, ...] = (), prefix: str = "") -> Path:
    """Rewrite an intermediate, embeddings, fingerprints or a split in place; `prefix` comes before the image paths."""
    table = pq.read_table(path).replace_schema_metadata(None)
    table = table.drop_columns([name for name in table.column_names if name in NEWER_COLUMNS or name in without])
    for place, name in enumerate(table.column_names):
        column = table[name]
        if name in LIST_TYPES:
            column = pa.array(column.to_pylist(), LIST_TYPES[name])
        elif name == "image_path":
            column = pa.array([prefix + text for text in column.to_pylist()])
        table = table.set_column(place, name, column)
    pq.write_table(table, path)
    return path
