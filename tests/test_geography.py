import math

import numpy as np
import pytest

from pipeline.retrieval.geography import distances_m, mean_positions


def metres_by_hand(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The spherical law of cosines, another formula than haversine's."""
    (lat_a, lon_a), (lat_b, lon_b) = ((math.radians(lat), math.radians(lon)) for lat, lon in (a, b))
    cosine = math.sin(lat_a) * math.sin(lat_b) + math.cos(lat_a) * math.cos(lat_b) * math.cos(lon_a - lon_b)
    return 6_371_008.8 * math.acos(max(-1.0, min(1.0, cosine)))


def test_metres_between_places_agree_with_the_law_of_cosines() -> None:
    places = [(48.8566, 2.3522), (51.5074, -0.1278), (-33.8688, 151.2093), (0.0, 179.9), (0.0, -179.9), (90.0, 0.0)]
    for a in places:
        for b in places:
            assert float(distances_m(*a, *b)) == pytest.approx(metres_by_hand(a, b), rel=1e-6, abs=1.0)


def test_the_mean_of_places_on_both_sides_of_the_antimeridian_lies_between_them() -> None:
    codes = np.array([0, 0, 1, 1, 2, 2, 2, 3, 3])
    lon = np.array([179.9998, -179.9996, -180.0, 180.0, 10.0, 11.0, 13.0, 359.0, 3.0])
    lat = np.linspace(-4, 4, 9)
    mean_lat, mean_lon = mean_positions(codes, lat, lon, 4)
    assert mean_lat.tolist() == [lat[codes == group].mean() for group in range(4)]
    assert mean_lon == pytest.approx([-179.9999, -180.0, 34 / 3, 1.0], abs=1e-9)


def test_means_away_from_the_antimeridian_are_the_plain_ones_to_the_last_bit() -> None:
    generator = np.random.default_rng(0)
    codes = np.arange(2_000) % 300
    centre = generator.uniform(-170, 170, 300)
    lat, lon = generator.uniform(-90, 90, 2_000), centre[codes] + generator.uniform(-9, 9, 2_000)
    for found, values in zip(mean_positions(codes, lat, lon, 300), (lat, lon), strict=True):
        assert (found == np.bincount(codes, values) / np.bincount(codes)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_places_that_are_not_finite_do_not_count(bad: float) -> None:
    codes = np.array([0, 0, 1, 2])
    mean_lat, mean_lon = mean_positions(codes, np.array([5.0, 1.0, bad, 1.0]), np.array([bad, 2.0, 3.0, 4.0]), 4)
    assert np.array_equal(mean_lat, [1.0, np.nan, 1.0, np.nan], equal_nan=True)
    assert np.array_equal(mean_lon, [2.0, np.nan, 4.0, np.nan], equal_nan=True)
