import math

import pytest

from pipeline.retrieval.geography import distances_m


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
