"""A merged split as arrays: one row an image, integer codes for the buildings."""

from collections import deque
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import count_cores
from pipeline.errors import InputError, StaleOutputError
from pipeline.files import tables
from pipeline.files.list_columns import ListColumn, find_embedding
from pipeline.threads import map_in_order

# Numbers decoded at a time: 16 MiB of float32, which is 1,024 rows of a 7B backbone.
_BATCH_NUMBERS = 2**22
# Pieces of consecutive row groups that a core decodes: each opens the file, some of them even out the work.
_PIECES_A_CORE = 4
FEATURE_COLUMNS = [
    pa.field("streetview_image_id", pa.string()),
    pa.field("building_id", pa.string()),
    pa.field("dataset_id", pa.int64()),
    pa.field("street_view_id", pa.int64()),
    pa.field("target_lat", pa.float64()),
    pa.field("target_lon", pa.float64()),
]


@dataclass(frozen=True)
class Features:
    """The images of one split as columns.

    `building_codes` count the buildings from 0 in order of first appearance and index `building_ids`.
    """

    embeddings: NDArray[Any]  # (N, D) float32, or float16 where the parquet has that; not normalised
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
        return int(self.embeddings.shape[1])

    @property
    def panorama_codes(self) -> NDArray[np.int64]:
        """One code per panorama, (N,): a street_view_id is unique only within its dataset."""
        views, codes = np.unique(self.street_view_ids, return_inverse=True)
        return np.unique(self.dataset_ids, return_inverse=True)[1] * len(views) + codes


def sample_buildings(features: Features, count: int, seed: int) -> Features:
    """Return the images of `count` buildings drawn from `seed`, in memory; all where there are fewer."""
    num_buildings = len(features.building_ids)
    if count >= num_buildings:
        return features
    return take_buildings(features, np.random.default_rng(seed).permutation(num_buildings)[:count])


def take_buildings(features: Features, codes: NDArray[Any]) -> Features:
    """Return the images of the buildings of these codes, which are numbered anew in the order of their codes."""
    chosen = np.sort(codes)
    rows = np.flatnonzero(np.isin(features.building_codes, chosen))
    columns = ("embeddings", "dataset_ids", "street_view_ids", "target_lat", "target_lon")
    return Features(
        building_codes=np.searchsorted(chosen, features.building_codes[rows]).astype(np.int32),
        building_ids=features.building_ids.take(pa.array(chosen)),
        image_ids=features.image_ids.take(pa.array(rows)),
        **{name: getattr(features, name)[rows] for name in columns},
    )


def load_features(path: Path) -> Features:
    """Read a merged split into memory.

    Raises InputError if the file is missing, damaged or empty, a column is missing, of another type or has nulls,
    or an embedding is not finite or all zero (naming the image).
    """
    tables.read_provenance(path, warn=True)
    table = tables.read_columns(path, FEATURE_COLUMNS, "make the file again with stage 3")
    column = find_embedding(path)
    if table.num_rows == 0:
        raise InputError(f"{path}: holds no rows: run stage 3 on more images, or change [data].*_ratio")
    image_ids, building_ids = (
        pa.concat_arrays(table[name].cast(pa.string()).chunks) for name in ("streetview_image_id", "building_id")
    )
    buildings = building_ids.dictionary_encode()
    return Features(
        embeddings=_read_embeddings(column, image_ids),
        building_codes=buildings.indices.to_numpy(),
        building_ids=buildings.dictionary,
        image_ids=image_ids,
        dataset_ids=table["dataset_id"].to_numpy(),
        street_view_ids=table["street_view_id"].to_numpy(),
        target_lat=table["target_lat"].to_numpy(),
        target_lon=table["target_lon"].to_numpy(),
    )


def check_split_names(paths: Iterable[Path]) -> None:
    """Raise StaleOutputError if a merged split lies under another one's name; without provenance it may be any."""
    for path in paths:
        split = (tables.read_provenance(path) or {}).get("split", path.stem) if path.is_file() else path.stem
        if split != path.stem:
            raise StaleOutputError(f"{path}: holds the split {split}: rename it, or run stage 3 with --overwrite")


def check_one_run(first: Path, second: Path) -> None:
    """Raise InputError if two splits come from different runs of stage 3; one without provenance may be anybody's."""
    check_split_names((first, second))
    both = [tables.read_provenance(path) for path in (first, second)]
    difference = tables.describe_difference(both[0], both[1]) if both[0] and both[1] else None
    if difference:
        raise InputError(f"{second}: not of the same run as {first.name} ({difference}): run stage 3 again")


def _read_embeddings(column: ListColumn, image_ids: pa.StringArray) -> NDArray[Any]:
    """Return the embeddings (N, D) in their stored type; a thread a core decodes row groups."""
    width = column.width or 0
    embeddings = np.empty((len(image_ids), width), column.dtype)
    with tables.open_parquet(column.path) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]

    def read(groups: list[int]) -> None:
        start = sum(sizes[: groups[0]])
        for batch in tables.read_batches(column.path, [column.name], max(1, _BATCH_NUMBERS // max(1, width)), groups):
            block = column.read(batch.column(0), start, check_finite=False)
            largest = np.maximum(block.max(axis=1), -block.min(axis=1))  # NaN where a number is that
            is_bad = ~np.isfinite(largest) | (largest == 0)
            if is_bad.any():
                row = start + int(np.argmax(is_bad))
                raise InputError(
                    f"{column.path}: the embedding of image {image_ids[row]} is not finite or all zero (row {row}, "
                    f"{int(is_bad.sum())} such rows near it): "
                    "run stage 2 again, with another [embedding_model].dtype if it comes back"
                )
            embeddings[start : start + len(block)] = block
            start += len(block)

    pieces = np.array_split(np.arange(len(sizes)), min(len(sizes), _PIECES_A_CORE * count_cores()))
    with closing(map_in_order(read, [piece.tolist() for piece in pieces], count_cores())) as done:
        deque(done, maxlen=0)
    return embeddings
