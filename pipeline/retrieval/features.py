"""A merged split as arrays: one row an image, integer codes for the buildings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.files import tables
from pipeline.files.lists import find_embedding
from pipeline.files.sidecar import map_columns
from pipeline.log import logger

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
    """The images of one split as columns, mapped from disk and read-only.

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
        """Numbers an embedding has."""
        return int(self.embeddings.shape[1])


def sample_buildings(features: Features, count: int, seed: int) -> Features:
    """Return the images of `count` buildings drawn from `seed`, in memory; all where there are fewer."""
    num_buildings = len(features.building_ids)
    if count >= num_buildings:
        return features
    chosen = np.sort(np.random.default_rng(seed).permutation(num_buildings)[:count])
    rows = np.flatnonzero(np.isin(features.building_codes, chosen))
    logger.info("%d of %d buildings, %d of %d images", count, num_buildings, len(rows), len(features))
    return Features(
        embeddings=features.embeddings[rows],
        building_codes=np.searchsorted(chosen, features.building_codes[rows]).astype(np.int32),
        building_ids=features.building_ids.take(pa.array(chosen)),
        image_ids=features.image_ids.take(pa.array(rows)),
        dataset_ids=features.dataset_ids[rows],
        street_view_ids=features.street_view_ids[rows],
        target_lat=features.target_lat[rows],
        target_lon=features.target_lon[rows],
    )


def load_features(path: Path) -> Features:
    """Map a merged split's columns from its sidecar, which is made first where it is not there (see `map_columns`).

    Raises InputError if the file is missing, damaged or empty, a column is missing, of another type or has nulls,
    or an embedding is not finite or all zero (naming the image).
    """
    file = tables.open_parquet(path)
    tables.check_columns(path, file.schema_arrow, FEATURE_COLUMNS)
    find_embedding(path)
    tables.log_missing_provenance(path)
    if file.metadata.num_rows == 0:
        raise InputError(f"{path}: holds no rows: run stage 3 on more images, or change [data].*_ratio")
    embeddings, ids = map_columns(path, FEATURE_COLUMNS)
    buildings = ids.column("building_id")
    return Features(
        embeddings=embeddings,
        building_codes=buildings.indices.to_numpy(),
        building_ids=buildings.dictionary,
        image_ids=ids.column("streetview_image_id"),
        dataset_ids=ids.column("dataset_id").to_numpy(),
        street_view_ids=ids.column("street_view_id").to_numpy(),
        target_lat=ids.column("target_lat").to_numpy(),
        target_lon=ids.column("target_lon").to_numpy(),
    )
