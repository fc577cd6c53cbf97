"""Read stage 5's table: the visual neighbours of each training image by band."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import count_cores
from pipeline.errors import InputError
from pipeline.files import tables
from pipeline.log import logger
from pipeline.retrieval.features import Features
from pipeline.threads import map_in_order

NUM_BANDS = 7  # 0 is the hardest, 6 the easiest
# Rows that a thread works on at a time: with 150 neighbours about 300 MB. Fewer would spend their time on building
# Arrow's hash table of the buildings, which is made for each call.
_BATCH_ROWS = 32_768

Rows = NDArray[np.int64]
# Rows of `features`, their usable neighbours by image and band, and the end of each image's bands.
Gathered = tuple[Rows, NDArray[np.int32], NDArray[np.int32]]


@dataclass(frozen=True)
class Neighbors:
    """The training buildings that look like each training image, by band.

    The band `b` of image `i` is `codes[starts[i] + ends[i, b - 1] : starts[i] + ends[i, b]]`, where ends[i, -1] is 0.
    """

    codes: NDArray[np.int32]  # (M,) buildings
    starts: Rows  # (N,)
    ends: NDArray[np.int32]  # (N, NUM_BANDS)


def load_neighbors(path: Path, features: Features) -> Neighbors:
    """Read the table for the images of `features`, without a Python object per row.

    Leaves out neighbours outside these buildings, and an image's own building; images that the table misses have none.
    Raises InputError if the file is missing, damaged or of another shape, names an image twice, or none of ours.
    """
    file = tables.open_parquet(path)
    _check_columns(path, file.schema_arrow)
    tables.read_provenance(path, warn=True)
    with tables.reading(path):
        keys = file.read(columns=["target_coord_hash"]).column(0).combine_chunks().cast(pa.string())
    rows = pc.fill_null(pc.index_in(keys, value_set=features.image_ids), -1).to_numpy().astype(np.int64)
    known = rows[rows >= 0]
    if len(known) == 0:
        raise InputError(f"{path}: names none of the training images: run stages 4 and 5 on the same tars")
    if len(np.unique(known)) < len(known):
        raise InputError(f"{path}: names an image twice: make it again with stage 5")
    starts = np.zeros(len(features), np.int64)
    ends = np.zeros((len(features), NUM_BANDS), np.int32)
    codes = np.empty(_count_neighbors(file.metadata), np.int32)  # memory that is not written to is not taken
    filled = 0
    for batch_rows, batch_codes, batch_ends in _gather_groups(path, file.metadata, rows, features):
        starts[batch_rows] = filled + np.concatenate([[0], np.cumsum(batch_ends[:, -1])[:-1]])
        ends[batch_rows] = batch_ends
        codes[filled : filled + len(batch_codes)] = batch_codes
        filled += len(batch_codes)
    logger.info(
        "%s: %d training images, %d of them not in the table, %d without a usable neighbour (their negatives are "
        "random), %.1f usable neighbours an image",
        path.name, len(ends), len(features) - len(known), int((ends[:, -1] == 0).sum()), ends[:, -1].mean(),
    )  # fmt: skip
    return Neighbors(codes[:filled], starts, ends)


def _check_columns(path: Path, schema: pa.Schema) -> None:
    tables.check_columns(path, schema, [pa.field("target_coord_hash", pa.string())])
    for name, is_right in (
        ("neighbor_building_ids", lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind)),
        ("neighbor_bands", pa.types.is_integer),
    ):
        kind = schema.field(name).type if name in schema.names else None
        if not (kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind))):
            raise InputError(f"{path}: column {name} is {kind or 'missing'}, expected a list: run stage 5 again")
        if not is_right(kind.value_type):
            raise InputError(f"{path}: column {name} is {kind}: run stage 5 again")


def _count_neighbors(metadata: pq.FileMetaData) -> int:
    """Return the number of values in the table's lists, or a few more, by its footer."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(column.num_values for column in columns if column.path_in_schema.startswith("neighbor_building_ids."))


def _gather_groups(path: Path, metadata: pq.FileMetaData, rows: Rows, features: Features) -> Iterator[Gathered]:
    """Yield the table's batches in order, while threads work on the following row groups."""
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    groups = enumerate(np.split(rows, np.cumsum(sizes)[:-1]))
    num_threads = count_cores()
    for gathered in map_in_order(
        lambda group: _gather_group(path, *group, features), groups, num_threads, num_threads + 1
    ):
        yield from gathered


def _gather_group(path: Path, number: int, rows: Rows, features: Features) -> list[Gathered]:
    """Read a row group; `rows` are its rows' places in `features`, -1 for images of other splits."""
    columns = ["neighbor_building_ids", "neighbor_bands"]
    gathered, first = [], 0
    with tables.reading(path):
        for batch in tables.open_parquet(path).iter_batches(_BATCH_ROWS, [number], columns, use_threads=False):
            batch_rows = rows[first : first + batch.num_rows]
            first += batch.num_rows
            known = batch_rows >= 0
            gathered.append(_gather_batch(path, batch.filter(pa.array(known)), batch_rows[known], features))
    return gathered


def _gather_batch(path: Path, batch: pa.RecordBatch, rows: Rows, features: Features) -> Gathered:
    ids, bands_column = batch.column("neighbor_building_ids"), batch.column("neighbor_bands")
    lengths = pc.fill_null(pc.list_value_length(ids), 0).to_numpy(zero_copy_only=False)
    if not np.array_equal(lengths, pc.fill_null(pc.list_value_length(bands_column), 0).to_numpy(zero_copy_only=False)):
        raise InputError(f"{path}: neighbor_building_ids and neighbor_bands differ in length: run stage 5 again")
    found = pc.index_in(ids.flatten().cast(pa.string()), value_set=features.building_ids)
    codes = pc.fill_null(found, -1).to_numpy(zero_copy_only=False)
    bands = pc.fill_null(bands_column.flatten(), -1).to_numpy(zero_copy_only=False)
    if len(bands) and (bands.min() < 0 or bands.max() >= NUM_BANDS):
        raise InputError(f"{path}: neighbor_bands must be 0 ... {NUM_BANDS - 1}: run stage 5 again")
    usable = (codes >= 0) & (codes != np.repeat(features.building_codes[rows], lengths))
    cells = np.repeat(np.arange(len(rows), dtype=np.int32) * NUM_BANDS, lengths)[usable] + bands[usable]
    codes = codes[usable]
    if (cells[1:] < cells[:-1]).any():  # stage 5 writes them in order
        order = np.argsort(cells, kind="stable")
        cells, codes = cells[order], codes[order]
    counts = np.bincount(cells, minlength=len(rows) * NUM_BANDS).reshape(len(rows), NUM_BANDS)
    return rows, codes.astype(np.int32, copy=False), counts.cumsum(axis=1).astype(np.int32)
