"""Decide which split a building belongs to, and measure what the test split sees of the training split."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import DataSection
from pipeline.errors import InputError
from pipeline.files.tables import read_columns
from pipeline.files.text_tables import read_id_table
from pipeline.log import logger
from pipeline.retrieval.features import check_split_names
from pipeline.retrieval.geography import EARTH_RADIUS_M, earth_centred_m

SPLITS = ("train", "val", "test")
_ID = pa.field("building_id", pa.string())
RADII_M = (10, 25, 50)  # of leakage
METRES_PER_DEGREE = math.radians(1) * EARTH_RADIUS_M  # of latitude


@dataclass(frozen=True)
class Buildings:
    ids: pa.StringArray  # (B,)
    mean_lat: NDArray[np.float64]  # (B,) degrees, the mean over the building's images, NaN without a position
    mean_lon: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)


def draw_unit(seed: int, unit: str) -> float:
    """Return a number in [0, 1) that depends on the seed and the unit's name alone."""
    digest = hashlib.blake2b(f"{seed}:{unit}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose_split(seed: int, unit: str, data: DataSection) -> int:
    """Return the index into SPLITS that the hash and the ratios give a unit."""
    value = draw_unit(seed, unit)
    return int(value >= data.train_ratio) + int(value >= data.train_ratio + data.val_ratio)


def name_cells(lat: NDArray[np.float64], lon: NDArray[np.float64], cell_m: float) -> Iterator[str]:
    """Name the square of side `cell_m` metres that holds each position (degrees)."""
    rows = np.floor(lat * METRES_PER_DEGREE / cell_m)
    # A degree's width at the row's latitude, so that all cells of a row have the same edges.
    widths = METRES_PER_DEGREE * np.cos(np.radians(rows * cell_m / METRES_PER_DEGREE))
    for row, column in zip(rows, np.floor(lon * widths / cell_m), strict=True):
        yield f"cell:{row:.0f}:{column:.0f}"


def assign_splits(buildings: Buildings, data: DataSection, seed: int, named: Mapping[str, str]) -> NDArray[np.int8]:
    """Return each building's index into SPLITS: as `named`, else by the hash of its unit.

    A unit goes to one split as a whole: the building, or its cell if cells are asked for and it has a position.
    """
    units = buildings.ids.to_pylist()
    if data.split_cell_m:
        cells = name_cells(buildings.mean_lat, buildings.mean_lon, data.split_cell_m)
        is_known = np.isfinite(buildings.mean_lat)
        units = [cell if known else building for cell, building, known in zip(cells, units, is_known, strict=True)]
    chosen = np.fromiter((choose_split(seed, unit, data) for unit in units), np.int8, len(buildings))
    if named:
        splits = np.array([SPLITS.index(split) for split in named.values()], np.int8)
        places = pc.index_in(buildings.ids, pa.array(named, pa.string()))
        chosen[np.asarray(places.is_valid())] = splits[places.drop_null().to_numpy()]
    return chosen


def hash_splits(building_ids: pa.StringArray, splits: NDArray[np.int8]) -> str:
    """Return a short hash of the assignment, independent of its order."""
    order = pc.array_sort_indices(building_ids)
    digest = hashlib.sha256()
    for building, split in zip(building_ids.take(order).to_pylist(), splits[order.to_numpy()], strict=True):
        digest.update(f"{building}\t{SPLITS[split]}\n".encode())
    return digest.hexdigest()[:32]


def measure_leakage(buildings: Buildings, splits: NDArray[np.int8]) -> dict[str, Any]:
    """Count the test buildings, and those with a training building within each of RADII_M; log it too."""
    is_known = np.isfinite(buildings.mean_lat)
    num_test, num_unknown = int((splits == SPLITS.index("test")).sum()), int((~is_known & (splits >= 0)).sum())
    train, test = (np.flatnonzero((splits == SPLITS.index(name)) & is_known) for name in ("train", "test"))
    near = dict.fromkeys(RADII_M, 0)
    if len(train) and len(test):
        from scipy.spatial import cKDTree  # scikit-learn's takes seconds to import

        points = earth_centred_m(buildings.mean_lat, buildings.mean_lon)
        distances, _ = cKDTree(points[train]).query(points[test], distance_upper_bound=1.01 * max(RADII_M))
        near = {radius: int((distances <= radius).sum()) for radius in RADII_M}
    if num_unknown:
        logger.warning("%d buildings have no position (target_lat, target_lon), hence no cell, and count as near none",
                       num_unknown)  # fmt: skip
    counts = ", ".join(f"{radius} m {count} ({100 * count / max(1, num_test):.1f} %)" for radius, count in near.items())
    logger.info("leakage: of %d test buildings have a training building within %s; [data].split_cell_m lowers it",
                num_test, counts)  # fmt: skip
    return {
        "test_buildings": num_test,
        "test_buildings_with_train_within_m": {str(radius): count for radius, count in near.items()},
        "buildings_without_position": num_unknown,
    }


def read_split_file(path: Path) -> dict[str, str]:
    """Return building_id -> split from a parquet or CSV with these two columns, or from a folder of merged splits.

    Raises InputError if it cannot be read, lacks a column or a value, names an unknown split or one building twice
    differently.
    """
    pairs: Iterable[tuple[str, str]]
    if path.is_dir():
        check_split_names(path / f"{split}.parquet" for split in SPLITS)
        remedy = "give the folder that stage 3, or the old program, wrote"
        columns = {split: read_columns(path / f"{split}.parquet", [_ID], remedy)[_ID.name] for split in SPLITS}
        pairs = [(building, split) for split, ids in columns.items() for building in ids.unique().to_pylist()]
    else:
        table = read_id_table(path, ["building_id", "split"], "a split file needs the columns building_id and split")
        pairs = zip(*(column.cast(pa.string()).to_pylist() for column in table.columns), strict=True)
    named: dict[str, str] = {}
    for number, (building, split) in enumerate(pairs, 1):
        if building is None or split is None:
            missing = "building_id" if building is None else "split"
            raise InputError(f"{path}: row {number} has no {missing}: give it one, or remove the row")
        if split not in SPLITS:
            raise InputError(f"{path}: building {building} has split {split!r}: it must be one of {', '.join(SPLITS)}")
        if named.setdefault(building, split) != split:
            raise InputError(f"{path}: building {building} is in {named[building]} and in {split}: remove one")
    return named
