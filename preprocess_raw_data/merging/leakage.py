"""Leakage between training and test split: near buildings and shared panoramas."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.log import logger
from pipeline.retrieval.geography import earth_centred_m
from preprocess_raw_data.merging.embedding_inventory import Inventory
from preprocess_raw_data.merging.splits import SPLITS, Buildings

RADII_M = (10, 25, 50)

Splits = NDArray[np.int8]


def measure_leakage(inventory: Inventory, splits: Splits) -> dict[str, Any]:
    """Count the test buildings with a training building near by, and the panoramas and datasets of several splits."""
    split_of_row = splits[np.concatenate(inventory.codes)]
    panoramas, shared = count_shared(inventory.panoramas, split_of_row)
    _, datasets = np.unique(inventory.buildings.dataset_ids, return_inverse=True)
    within = count_near(inventory.buildings, splits)
    return {
        "test_buildings": int((splits == SPLITS.index("test")).sum()),
        "test_buildings_with_train_within_m": {str(radius): count for radius, count in within.items()},
        "buildings_without_position": int((np.isnan(inventory.buildings.mean_lat) & (splits >= 0)).sum()),
        "panoramas": panoramas,
        "panoramas_in_several_splits": shared,
        "datasets_in_several_splits": count_shared(datasets.reshape(-1), splits)[1],
    }


def count_near(buildings: Buildings, splits: Splits) -> dict[int, int]:
    """Return, for each of RADII_M, how many test buildings have a training building that near."""
    is_known = np.isfinite(buildings.mean_lat)
    train, test = (np.flatnonzero((splits == SPLITS.index(name)) & is_known) for name in ("train", "test"))
    if not (len(train) and len(test)):
        return dict.fromkeys(RADII_M, 0)
    from scipy.spatial import cKDTree  # scikit-learn's takes seconds to import

    points = earth_centred_m(buildings.mean_lat, buildings.mean_lon)
    distances, _ = cKDTree(points[train]).query(points[test], distance_upper_bound=1.01 * max(RADII_M))
    return {radius: int((distances <= radius).sum()) for radius in RADII_M}


def count_shared(groups: NDArray[Any], splits: Splits) -> tuple[int, int]:
    """Return how many groups have a member in any split, and how many have members in several."""
    splits_of_group = np.zeros(int(groups.max(initial=-1)) + 1, np.int8)
    for split in range(len(SPLITS)):
        splits_of_group += np.bincount(groups[splits == split], minlength=len(splits_of_group)) > 0
    return int((splits_of_group > 0).sum()), int((splits_of_group > 1).sum())


def log_leakage(counts: dict[str, Any]) -> None:
    """Log how many test buildings have training buildings near by, and how many panoramas are in several splits."""
    total, panoramas = max(1, counts["test_buildings"]), max(1, counts["panoramas"])
    near = ", ".join(
        f"{radius} m {count} ({100 * count / total:.1f} %)"
        for radius, count in counts["test_buildings_with_train_within_m"].items()
    )
    if counts["buildings_without_position"]:
        logger.warning("%d buildings have no finite target_lat, target_lon: they have no cell, and none counts as near",
                       counts["buildings_without_position"])  # fmt: skip
    shared = counts["panoramas_in_several_splits"]
    logger.info(
        "leakage: of %d test buildings have a training building within %s; of %d panoramas %d (%.1f %%) are in several "
        "splits; [data].split_cell_m lowers it",
        counts["test_buildings"], near, counts["panoramas"], shared, 100 * shared / panoramas,
    )  # fmt: skip
