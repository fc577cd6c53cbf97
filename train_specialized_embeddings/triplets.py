"""What triplets are drawn from: the images of each building, and each image's visual neighbours by band."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import tables
from pipeline.errors import InputError
from pipeline.features import Features
from pipeline.log import logger

NUM_BANDS = 7  # 0 is the hardest, 6 the easiest
# Rows of the difficulty table decoded at a time: 65,536 rows of 150 neighbours are about 200 MB of text.
_BATCH_ROWS = 65_536

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Grouping:
    """The images of each building, as rows in one array cut by `starts`."""

    codes: NDArray[np.int32]  # (N,) building of each image
    order: Rows  # (N,) images by building
    starts: Rows  # (B + 1,)
    place: Rows  # (N,) where an image stands among its building's

    @property
    def sizes(self) -> Rows:
        """Images of each building, (B,)."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Neighbors:
    """Training buildings that look like each training image, by band.

    The band `b` of image `i` is `codes[starts[i] + ends[i, b - 1] : starts[i] + ends[i, b]]`, where ends[i, -1] is 0.
    """

    codes: NDArray[np.int32]  # (M,) buildings
    starts: Rows  # (N,)
    ends: NDArray[np.int32]  # (N, NUM_BANDS)


def group_by_building(building_codes: NDArray[np.int32]) -> Grouping:
    """List the images of each building; codes count from 0 without a gap."""
    order = np.argsort(building_codes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(building_codes))]).astype(np.int64)
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - starts[building_codes[order]]
    return Grouping(building_codes, order, starts, place)


def load_neighbors(path: Path, features: Features) -> Neighbors:
    """Read stage 5's table for the images of `features`, without a Python object per row.

    Neighbours outside these buildings, and an image's own building, are left out; images that the table misses have
    none. Raises InputError if the file is missing, damaged or of another shape, names an image twice, or none of ours.
    """
    keys = _read_keys(path)
    rows = pc.fill_null(pc.index_in(keys, value_set=features.image_ids), -1).to_numpy().astype(np.int64)
    known = rows[rows >= 0]
    if len(known) == 0:
        raise InputError(f"{path}: names none of the training images: run stages 4 and 5 on the same tars")
    if len(np.unique(known)) < len(known):
        raise InputError(f"{path}: names an image twice: make it again with stage 5")
    starts = np.zeros(len(features), np.int64)
    ends = np.zeros((len(features), NUM_BANDS), np.int32)
    parts: list[NDArray[np.int32]] = []
    filled = 0
    for batch_rows, batch in _read_batches(path, rows):
        codes, batch_ends = _gather_batch(path, batch, batch_rows, features)
        starts[batch_rows] = filled + np.concatenate([[0], np.cumsum(batch_ends[:, -1])[:-1]])
        ends[batch_rows] = batch_ends
        parts.append(codes)
        filled += len(codes)
    _log_coverage(path, len(features) - len(known), ends)
    return Neighbors(np.concatenate(parts), starts, ends)


def _read_keys(path: Path) -> pa.Array:
    """Check the columns and return the images' ids."""
    file = tables.open_parquet(path)
    schema = file.schema_arrow
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
    tables.log_missing_provenance(path)
    with tables.reading(path):
        return file.read(columns=["target_coord_hash"]).column(0).combine_chunks().cast(pa.string())


def _read_batches(path: Path, rows: Rows) -> Iterator[tuple[Rows, pa.RecordBatch]]:
    """Yield the table's rows that are training images, with their places in `features`."""
    first = 0
    columns = ["neighbor_building_ids", "neighbor_bands"]
    with tables.reading(path):
        for batch in tables.open_parquet(path).iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            batch_rows = rows[first : first + batch.num_rows]
            first += batch.num_rows
            yield batch_rows[batch_rows >= 0], batch.filter(pa.array(batch_rows >= 0))


def _gather_batch(
    path: Path, batch: pa.RecordBatch, rows: Rows, features: Features
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the batch's usable neighbours by image and band, and where each image's bands end, (n, NUM_BANDS)."""
    ids, bands_column = batch.column("neighbor_building_ids"), batch.column("neighbor_bands")
    lengths = pc.fill_null(pc.list_value_length(ids), 0).to_numpy(zero_copy_only=False)
    if not np.array_equal(lengths, pc.fill_null(pc.list_value_length(bands_column), 0).to_numpy(zero_copy_only=False)):
        raise InputError(f"{path}: neighbor_building_ids and neighbor_bands differ in length: run stage 5 again")
    found = pc.index_in(ids.flatten().cast(pa.string()), value_set=features.building_ids)
    codes = pc.fill_null(found, -1).to_numpy(zero_copy_only=False)
    bands = pc.fill_null(bands_column.flatten(), -1).to_numpy(zero_copy_only=False)
    if len(bands) and (bands.min() < 0 or bands.max() >= NUM_BANDS):
        raise InputError(f"{path}: neighbor_bands must be 0 ... {NUM_BANDS - 1}: run stage 5 again")
    owners = np.repeat(np.arange(len(rows)), lengths)
    usable = (codes >= 0) & (codes != features.building_codes[rows][owners])
    cells = owners[usable] * NUM_BANDS + bands[usable]
    codes = codes[usable]
    if (np.diff(cells) < 0).any():  # stage 5 writes them so that this is not needed
        order = np.argsort(cells, kind="stable")
        cells, codes = cells[order], codes[order]
    counts = np.bincount(cells, minlength=len(rows) * NUM_BANDS).reshape(len(rows), NUM_BANDS)
    return codes.astype(np.int32, copy=False), counts.cumsum(axis=1).astype(np.int32)


def _log_coverage(path: Path, num_missed: int, ends: NDArray[np.int32]) -> None:
    without = int((ends[:, -1] == 0).sum())
    logger.info(
        "%s: %d training images, %d of them not in the table, %d without a usable neighbour (their negatives are "
        "random), %.1f usable neighbours an image",
        path.name, len(ends), num_missed, without, ends[:, -1].mean(),
    )  # fmt: skip
