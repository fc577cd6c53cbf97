"""Leakage between training and test split: buildings near by."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.log import logger
from pipeline.retrieval.geography import earth_centred_m
from preprocess_raw_data.merging.splits import SPLITS, Buildings

RADII_M = (10, 25, 50)


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
        logger.warning("%d buildings have no finite target_lat, target_lon: they have no cell, and none counts as near",
                       num_unknown)  # fmt: skip
    counts = ", ".join(f"{radius} m {count} ({100 * count / max(1, num_test):.1f} %)" for radius, count in near.items())
    logger.info("leakage: of %d test buildings have a training building within %s; [data].split_cell_m lowers it",
                num_test, counts)  # fmt: skip
    return {
        "test_buildings": num_test,
        "test_buildings_with_train_within_m": {str(radius): count for radius, count in near.items()},
        "buildings_without_position": num_unknown,
    }
