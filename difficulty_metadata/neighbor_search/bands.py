"""Difficulty bands: a neighbour's distance divided by its anchor's local scale, cut at percentiles."""

import numpy as np

from pipeline.log import logger

EDGE_PERCENTILES = (5, 10, 20, 40, 60, 85)


def distance_ratios(distances: np.ndarray, k0: int) -> np.ndarray:
    """Return distance / local scale as (A, k) float64, padded with inf as `distances` (A, k), ascending, are.

    The local scale is the distance to neighbour number `k0`, or to the last one. Where it is 0, a distance of 0 has the
    ratio 0, any other inf.
    """
    places = np.isfinite(distances).sum(axis=1, keepdims=True).clip(1, k0) - 1
    scales = np.take_along_axis(distances, places, axis=1).astype(np.float64)  # (A, 1)
    ratios = np.full(distances.shape, np.inf)
    np.divide(distances, scales, out=ratios, where=np.isfinite(distances) & (scales > 0), dtype=np.float64)
    ratios[(scales == 0) & (distances == 0)] = 0.0
    return ratios


def calibration_ratios(distances: np.ndarray, k0: int) -> np.ndarray:
    """Return, flat, the ratios that count for the percentiles: those of anchors with a local scale above 0."""
    ratios = distance_ratios(distances, k0)
    counted = ratios[(ratios == 1).any(axis=1)]  # the distance that is the scale has the ratio 1
    return np.asarray(counted[np.isfinite(counted)])


def compute_band_edges(ratios: np.ndarray) -> list[float]:
    """Return the six band edges: percentiles of the ratios, by linear interpolation. `ratios` is reordered.

    Without any ratio the edges are 1: a duplicate is then in the hardest band, all else in the easiest.
    """
    if not len(ratios):
        logger.warning("no image of the sample has a neighbour and a local scale above 0: all band edges are set to 1")
        return [1.0] * len(EDGE_PERCENTILES)
    return [float(edge) for edge in np.percentile(ratios, EDGE_PERCENTILES, method="linear", overwrite_input=True)]


def assign_bands(ratios: np.ndarray, edges: list[float]) -> np.ndarray:
    """Return how many edges are <= each ratio, as int32: 0 is the hardest band, 6 the easiest."""
    return np.searchsorted(np.asarray(edges), ratios, side="right").astype(np.int32)
