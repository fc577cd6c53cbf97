"""Exclude images that are too near on the ground to count as neighbours."""

import numpy as np

from pipeline.errors import InputError
from pipeline.retrieval.geography import distances_m


class Exclusion:
    """Tells which images' targets stand nearer than `within_m` to an anchor's."""

    def __init__(self, latitudes: np.ndarray, longitudes: np.ndarray, within_m: float) -> None:
        """Take the target positions of all rows, in degrees (N,). Raises InputError where one is not finite."""
        if not (np.isfinite(latitudes).all() and np.isfinite(longitudes).all()):
            raise InputError(
                "target_lat, target_lon: not finite for some images, which [difficulty].exclude_within_m needs: "
                "correct the fingerprint files, or set it to 0"
            )
        self._latitudes = latitudes
        self._longitudes = longitudes
        self._within_m = within_m

    def is_near(self, anchors: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return whether rows `others` (A, m) are too near to the rows `anchors` (A,)."""
        own = self._latitudes[anchors][:, None], self._longitudes[anchors][:, None]
        is_near: np.ndarray = distances_m(*own, self._latitudes[others], self._longitudes[others]) < self._within_m
        return is_near
