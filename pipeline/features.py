"""Read a merged split into arrays: one row an image, integer codes for the buildings."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import tables
from pipeline.errors import InputError

FEATURE_COLUMNS = [
    pa.field("streetview_image_id", pa.string()),
    pa.field("building_id", pa.string()),
    pa.field("dataset_id", pa.int64()),
    pa.field("street_view_id", pa.int64()),
    pa.field("target_lat", pa.float64()),
    pa.field("target_lon", pa.float64()),
]
# Numbers decoded at a time: 64 MiB of float32, which is 4,096 rows of a 7B backbone.
_BATCH_NUMBERS = 2**24


@dataclass(frozen=True)
class Features:
    """The images of one split as columns.

    `building_codes` count the buildings from 0 in order of first appearance and index `building_ids`.
    """

    embeddings: NDArray[np.float32]  # (N, D), not normalised
    building_codes: NDArray[np.int32]  # (N,)
    building_ids: pa.StringArray  # (B,)
    image_ids: pa.StringArray  # (N,)
    dataset_ids: NDArray[np.int64]  # (N,)
    street_view_ids: NDArray[np.int64]  # (N,)
    target_lat: NDArray[np.float64]  # (N,) degrees
    target_lon: NDArray[np.float64]  # (N,) degrees

    def __len__(self) -> int:
        return len(self.building_codes)

    @property
    def width(self) -> int:
        """Numbers an embedding has."""
        return int(self.embeddings.shape[1])


def load_features(path: Path) -> Features:
    """Read a merged split by record batches into one array, without a Python object per row.

    Raises InputError if the file is missing, damaged or empty, a column is missing, of another type or has nulls,
    or an embedding is not finite or all zero (naming the image).
    """
    file = tables.open_parquet(path)
    schema = file.schema_arrow
    tables.check_columns(path, schema, FEATURE_COLUMNS)
    width = tables.embedding_width(path, schema)
    tables.log_missing_provenance(path)
    num_rows = file.metadata.num_rows
    if num_rows == 0:
        raise InputError(f"{path}: holds no rows: run stage 3 on more images, or change [data].*_ratio")
    embeddings = np.empty((num_rows, width), dtype=np.float32)
    columns: dict[str, list[pa.Array]] = {field.name: [] for field in FEATURE_COLUMNS}
    start = 0
    for batch in _read_batches(path, file, width):
        _check_nulls(path, batch)
        block = embeddings[start : start + batch.num_rows]
        block[:] = batch.column("embedding").flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        _check_block(path, block, batch.column("streetview_image_id"))
        for name, chunks in columns.items():
            chunks.append(batch.column(name))
        start += batch.num_rows
    return _gather(embeddings, columns)


def _read_batches(path: Path, file: pq.ParquetFile, width: int) -> Iterator[pa.RecordBatch]:
    names = [field.name for field in FEATURE_COLUMNS] + ["embedding"]
    batches = file.iter_batches(batch_size=max(1, _BATCH_NUMBERS // max(1, width)), columns=names)
    with tables.reading(path):
        yield from batches


def _check_nulls(path: Path, batch: pa.RecordBatch) -> None:
    """A null would shift every later row of a flattened list, and has no code."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count or (name == "embedding" and column.flatten().null_count):
            raise InputError(f"{path}: column {name} has nulls: make the file again with stage 3")


def _check_block(path: Path, block: NDArray[np.float32], image_ids: pa.Array) -> None:
    bad = ~np.isfinite(block).all(axis=1) | ~block.any(axis=1)
    if bad.any():
        name = image_ids[int(np.flatnonzero(bad)[0])].as_py()
        raise InputError(
            f"{path}: the embedding of image {name} is not finite or all zero ({int(bad.sum())} such rows near it): "
            "run stage 2 again, with another [embedding_model].dtype if it comes back"
        )


def _gather(embeddings: NDArray[np.float32], columns: dict[str, list[pa.Array]]) -> Features:
    whole: dict[str, Any] = {name: pa.chunked_array(chunks).combine_chunks() for name, chunks in columns.items()}
    buildings = pc.dictionary_encode(whole["building_id"].cast(pa.string()))
    return Features(
        embeddings=embeddings,
        building_codes=buildings.indices.to_numpy(zero_copy_only=False).astype(np.int32, copy=False),
        building_ids=buildings.dictionary,
        image_ids=whole["streetview_image_id"].cast(pa.string()),
        dataset_ids=whole["dataset_id"].to_numpy(zero_copy_only=False),
        street_view_ids=whole["street_view_id"].to_numpy(zero_copy_only=False),
        target_lat=whole["target_lat"].to_numpy(zero_copy_only=False),
        target_lon=whole["target_lon"].to_numpy(zero_copy_only=False),
    )
