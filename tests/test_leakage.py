"""What the test split can see of the training split, against loops over all pairs."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import DataSection
from pipeline.retrieval.geography import distances_m
from preprocess_raw_data.merging.splits import RADII_M, Buildings, assign_splits, measure_leakage

METRES_PER_DEGREE = 111_195.0


def make_buildings(lat, lon):
    ids = pa.array([f"0001_{number}" for number in range(len(lat))])
    return Buildings(ids, np.asarray(lat, float), np.asarray(lon, float))


def count_near(buildings, splits):
    counts = measure_leakage(buildings, splits)["test_buildings_with_train_within_m"]
    return {int(radius): count for radius, count in counts.items()}


def near_by_hand(buildings, splits, radius):
    count = 0
    for one in np.flatnonzero(splits == 2):
        away = [
            distances_m(buildings.mean_lat[one], buildings.mean_lon[one], buildings.mean_lat[other],
                        buildings.mean_lon[other])
            for other in np.flatnonzero(splits == 0)
        ]  # fmt: skip
        count += any(distance <= radius for distance in away)
    return count


@pytest.mark.parametrize("place", [(52.2, 0.1), (-33.0, 179.9999), (89.9995, 20.0), (-89.9999, -180.0)])
def test_near_buildings_are_counted_as_by_hand_also_at_the_antimeridian_and_the_poles(place):
    generator = np.random.default_rng(4)
    lat = place[0] + generator.normal(0, 60, 120) / METRES_PER_DEGREE
    lon = place[1] + generator.normal(0, 60, 120) / (METRES_PER_DEGREE * np.cos(np.radians(place[0])))
    lat, lon = np.clip(lat, -90, 90), (lon + 180) % 360 - 180
    buildings = make_buildings(lat, lon)
    splits = generator.integers(-1, 3, 120).astype(np.int8)
    found = count_near(buildings, splits)
    assert found == {radius: near_by_hand(buildings, splits, radius) for radius in RADII_M}
    assert 0 < found[10] < found[50]


@pytest.mark.parametrize("missing", [0, 2])
def test_without_training_or_test_buildings_nothing_is_near(missing):
    buildings = make_buildings([52.0, 52.0], [0.0, 0.0])
    splits = np.array([2 - missing, 1], np.int8)
    assert count_near(buildings, splits) == {10: 0, 25: 0, 50: 0}


def test_cells_lower_the_leakage_and_the_log_tells_it(caplog):
    generator = np.random.default_rng(0)
    count = 400
    lat = 52.2 + generator.uniform(0, 600, count) / METRES_PER_DEGREE
    lon = 0.1 + generator.uniform(0, 600, count) / (METRES_PER_DEGREE * 0.613)
    buildings = make_buildings(lat, lon)
    splits = [assign_splits(buildings, DataSection(split_cell_m=cell_m), 1, {}) for cell_m in (0.0, 200.0)]
    with caplog.at_level("INFO", "spatial_building_embeddings"):
        near = [count_near(buildings, split)[25] for split in splits]
    assert near[0] > 2 * near[1]
    assert "leakage: of" in caplog.text
    assert f"25 m {near[0]} (" in caplog.text
