"""Read stage 5's table: the visual neighbours of each training image by band."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import count_cores
from pipeline.errors import InputError
from pipeline.files import column_types, tables
from pipeline.log import logger
from pipeline.retrieval.features import Features
from pipeline.threads import map_in_order

NUM_BANDS = 7  # 0 is the hardest, 6 the easiest
# Rows that a thread works on at a time: with 150 neighbours about 300 MB. Arrow makes its hash table of the buildings
# for each call, so that fewer rows would take longer.
_BATCH_ROWS = 32_768

_SCHEMA = pa.schema({
    "target_coord_hash": pa.string(),
    "neighbor_building_ids": pa.list_(pa.string()),
    "neighbor_bands": pa.list_(pa.int64()),
})  # fmt: skip

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


def load_neighbors(path: Path | None, features: Features) -> Neighbors:
    """Read the table for the images of `features`, without a Python object per row; without a table they have none.

    Leaves out neighbours outside these buildings, and an image's own building; images that the table misses have none.
    Raises InputError if the file is missing, damaged or of another shape, names an image twice, or none of ours.
    """
    starts, ends = np.zeros(len(features), np.int64), np.zeros((len(features), NUM_BANDS), np.int32)
    if path is None:
        logger.warning("[paths].difficulty_metadata_path is not set: negatives are random")
        return Neighbors(np.empty(0, np.int32), starts, ends)
    tables.read_provenance(path, warn=True)
    with tables.open_parquet(path) as file, tables.reading(path):
        column_types.check_columns(path, file.schema_arrow, _SCHEMA)
        keys = file.read(columns=["target_coord_hash"]).column(0).combine_chunks().cast(pa.string())
    places = pc.fill_null(pc.index_in(keys, value_set=features.image_ids), -1).to_numpy().astype(np.int64)
    known = places[places >= 0]
    if len(known) == 0:
        raise InputError(f"{path}: names none of the training images: run stages 4 and 5 on the same tars")
    if len(np.unique(known)) < len(known):
        raise InputError(f"{path}: names an image twice: make it again with stage 5")

    def pair_batches() -> Iterator[tuple[pa.RecordBatch, Rows]]:
        first = 0
        for batch in tables.read_batches(path, ["neighbor_building_ids", "neighbor_bands"], _BATCH_ROWS):
            yield batch, places[first : first + batch.num_rows]
            first += batch.num_rows

    num_threads = count_cores()
    gathered = map_in_order(lambda pair: _gather(path, *pair, features), pair_batches(), num_threads, num_threads + 1)
    rows, codes, row_ends = (np.concatenate(parts) for parts in zip(*gathered, strict=True))
    starts[rows] = np.cumsum(row_ends[:, -1], dtype=np.int64) - row_ends[:, -1]
    ends[rows] = row_ends
    alone = ends[:, -1] == 0
    log = logger.info if alone.mean() < 0.5 else logger.warning  # half a table, or another one, it seems
    log("%s: %d training images, %d of them not in the table, %d without a usable neighbour (their negatives are "
        "random), %.1f usable neighbours an image",
        path.name, len(ends), len(features) - len(known), alone.sum(), ends[:, -1].mean())  # fmt: skip
    return Neighbors(codes, starts, ends)


def _gather(path: Path, batch: pa.RecordBatch, rows: Rows, features: Features) -> Gathered:
    """Return the neighbours of a batch; `rows` are its rows' places in `features`, -1 for images of other splits."""
    batch, rows = batch.filter(pa.array(rows >= 0)), rows[rows >= 0]
    ids, bands_column = batch.columns
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
