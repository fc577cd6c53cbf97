"""Distances on the Earth."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

EARTH_RADIUS_M = 6_371_008.8  # IUGG mean radius


def distances_m(lat_a: Any, lon_a: Any, lat_b: Any, lon_b: Any) -> NDArray[np.float64]:
    """Return the great-circle distances in metres of points given in degrees (haversine formula)."""
    lat_a, lon_a, lat_b, lon_b = (np.radians(value) for value in (lat_a, lon_a, lat_b, lon_b))
    chord = np.sin((lat_b - lat_a) / 2) ** 2 + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
    return np.asarray(2 * EARTH_RADIUS_M * np.arcsin(np.sqrt(np.clip(chord, 0.0, 1.0))))


def earth_centred_m(lat: Any, lon: Any) -> NDArray[np.float64]:
    """Return points given in degrees as (N, 3) metres from the Earth's centre.

    A straight line between two of them is as long as their great-circle distance within a millionth up to 30 km, over
    the poles and the antimeridian alike.
    """
    lat, lon = np.radians(lat), np.radians(lon)
    unit = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)
    return np.asarray(EARTH_RADIUS_M * unit)


def is_position(lat: Any, lon: Any) -> NDArray[np.bool_]:
    """Return which points in degrees are on Earth: no NaN, nor latitudes beyond 90; longitudes may go up to 360."""
    return np.asarray((np.abs(lat) <= 90) & (np.abs(lon) <= 360))


def mean_positions(
    codes: NDArray[Any], lat: NDArray[np.float64], lon: NDArray[np.float64], num_groups: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean latitude and longitude (B,) in degrees of each group's points (N,), NaN for a group without any.

    Points that are no position do not count. A group on both sides of the antimeridian has its mean near there; a mean
    of 180 degrees is -180, the same meridian.
    """
    is_known = is_position(lat, lon)
    codes, lat, lon = codes[is_known], lat[is_known], lon[is_known]
    west, east = np.full(num_groups, np.inf), np.full(num_groups, -np.inf)
    np.minimum.at(west, codes, lon)
    np.maximum.at(east, codes, lon)
    # All other groups keep the plain mean, to the last bit: a building must not change its cell.
    lon = np.where((east - west > 180)[codes] & (lon < west[codes] + 180), lon + 360, lon)
    with np.errstate(invalid="ignore"):
        mean_lat, mean_lon = (np.bincount(codes, values, num_groups) / np.bincount(codes, minlength=num_groups)
                              for values in (lat, lon))  # fmt: skip
    return mean_lat, np.where(mean_lon >= 180, mean_lon - 360, mean_lon)
