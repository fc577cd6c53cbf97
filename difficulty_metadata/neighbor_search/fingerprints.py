"""Read the fingerprint files of a folder as one table of images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.files.list_columns import ListColumn, find_fingerprint, find_width
from pipeline.files.tables import FINGERPRINT_ID_SCHEMA, read_batches, read_ids, read_provenance

# Fingerprints decoded at a time: 1.5 times as fast as 20 times as many, which leave the cache.
_BLOCK_ROWS = 1_024


@dataclass(frozen=True)
class ImageTable:
    """All images of a folder, in the order of the files and their rows; N of them, of B buildings."""

    fingerprints: list[ListColumn]  # of each file
    width: int  # values of a fingerprint
    image_ids: pa.ChunkedArray  # (N,) string
    building_ids: pa.Array  # (B,) string
    building_codes: np.ndarray  # (N,) int32, places in building_ids
    latitudes: np.ndarray  # (N,) float64, degrees
    longitudes: np.ndarray  # (N,) float64, degrees

    def __len__(self) -> int:
        return len(self.building_codes)


def stream_fingerprints(column: ListColumn) -> Iterator[np.ndarray]:
    """Yield a file's fingerprints in blocks (rows, width) uint8."""
    start = 0
    for batch in read_batches(column.path, [column.name], _BLOCK_ROWS):
        yield column.read(batch.column(0), start)
        start += len(batch)


def read_images(paths: list[Path]) -> ImageTable:
    """Read everything but the fingerprints.

    Raises InputError if a column is missing, of another type, or has empty values, if the fingerprints' widths
    differ, if an image is there twice, or if there is no image at all.
    """
    table = pa.concat_tables(read_ids(paths, FINGERPRINT_ID_SCHEMA, "make the file again with stage 4"))
    for path in paths:
        read_provenance(path, warn=True)
    columns = [find_fingerprint(path) for path in paths]
    width = find_width(columns, "make both with one [fingerprints].image_size")
    if not len(table):
        raise InputError(f"{paths[0].parent}: the fingerprint files hold no image: look into stage 4's rejects")
    buildings = table["building_id"].combine_chunks().dictionary_encode()
    return ImageTable(
        columns, width, table["streetview_image_id"], buildings.dictionary, buildings.indices.to_numpy(),
        table["target_lat"].to_numpy(), table["target_lon"].to_numpy(),
    )  # fmt: skip
