"""Decide which split a building belongs to."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import DataSection
from pipeline.errors import InputError, one_line
from pipeline.geography import EARTH_RADIUS_M

SPLITS = ("train", "val", "test")
METRES_PER_DEGREE = math.radians(1) * EARTH_RADIUS_M  # of latitude


def draw_unit(seed: int, unit: str) -> float:
    """Return a number in [0, 1) that depends on the seed and the unit's name alone."""
    digest = hashlib.blake2b(f"{seed}:{unit}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose_split(seed: int, unit: str, data: DataSection) -> int:
    """Return the index into SPLITS that the hash and the ratios give a unit."""
    value = draw_unit(seed, unit)
    if value < data.train_ratio:
        return 0
    return 1 if value < data.train_ratio + data.val_ratio else 2


def name_cells(lat: NDArray[np.float64], lon: NDArray[np.float64], cell_m: float) -> list[str]:
    """Name the square of side `cell_m` metres that holds each position (degrees)."""
    rows = np.floor(lat * METRES_PER_DEGREE / cell_m)
    # The width of a degree is taken at the row's own latitude, so that all cells of a row have the same edges.
    widths = METRES_PER_DEGREE * np.cos(np.radians(rows * cell_m / METRES_PER_DEGREE))
    columns = np.floor(lon * widths / cell_m)
    return [f"cell:{row:.0f}:{column:.0f}" for row, column in zip(rows, columns, strict=True)]


def assign_splits(
    building_ids: Sequence[str],
    mean_lat: NDArray[np.float64],
    mean_lon: NDArray[np.float64],
    data: DataSection,
    seed: int,
    named: dict[str, str],
) -> NDArray[np.int8]:
    """Return each building's index into SPLITS: as `named`, else by the hash of its id or of its cell."""
    units: Iterable[str] = building_ids
    if data.split_cell_m > 0:
        units = name_cells(mean_lat, mean_lon, data.split_cell_m)
    chosen = [
        SPLITS.index(named[building]) if building in named else choose_split(seed, unit, data)
        for building, unit in zip(building_ids, units, strict=True)
    ]
    return np.array(chosen, dtype=np.int8)


def hash_splits(building_ids: Sequence[str], splits: NDArray[np.int8]) -> str:
    """Return a short hash of who is where, the same for the same assignment in any order."""
    lines = sorted(f"{building}\t{SPLITS[split]}\n" for building, split in zip(building_ids, splits, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def read_split_file(path: Path) -> dict[str, str]:
    """Return building_id -> split from a parquet or CSV with these two columns.

    Raises InputError if it cannot be read, lacks a column, names an unknown split or one building twice differently.
    """
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, columns=["building_id", "split"])
        else:
            types = pa.csv.ConvertOptions(column_types={"building_id": pa.string(), "split": pa.string()})
            table = pa.csv.read_csv(path, convert_options=types)
        pairs = list(zip(table["building_id"].to_pylist(), table["split"].to_pylist(), strict=True))
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path}: cannot be read as a split file ({one_line(error)}): it needs the columns building_id and split"
        ) from None
    named: dict[str, str] = {}
    for building, split in pairs:
        if split not in SPLITS:
            raise InputError(f"{path}: building {building} has split {split!r}: it must be one of {', '.join(SPLITS)}")
        if named.setdefault(str(building), split) != split:
            raise InputError(f"{path}: building {building} is in {named[str(building)]} and in {split}: remove one")
    return named
