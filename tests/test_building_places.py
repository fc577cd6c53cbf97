"""Where stage 3 takes a building to be: its cell, at the antimeridian, and without a position."""

import numpy as np
import pyarrow as pa
import pytest
from embedding_files import SIZES, make_rows, place_of, read_splits, stage_3, write

from pipeline.config import DataSection
from pipeline.files import tables
from preprocess_raw_data.merging.splits import SPLITS, choose_split, name_cells


@pytest.fixture
def stage(tmp_path, write_config, run_main):
    return stage_3(run_main, write_config(tmp_path))


def test_cells_hold_neighbours_together_by_their_mean_position(tmp_path, stage):
    for dataset in (1, 2, 3):
        write(tmp_path, dataset, make_rows(dataset, SIZES, mixed=dataset == 2))
    assert stage("data.split_cell_m=150").code == 0
    rows = [row for table in read_splits(tmp_path).values() for row in table.to_pylist()]
    places = {}
    for row in rows:
        places.setdefault(row["building_id"], []).append((row["target_lat"], row["target_lon"]))
    splits = {}
    for building, split in place_of(tmp_path).items():
        mean = np.mean(places[building], axis=0)
        (cell,) = name_cells(mean[:1], mean[1:], 150.0)
        splits.setdefault(cell, set()).add(split)
        assert SPLITS[choose_split(42, cell, DataSection())] == split
    assert len(places) > len(splits) > 20
    assert all(len(found) == 1 for found in splits.values())


def test_buildings_without_a_position_are_counted_and_split_by_their_ids(tmp_path, stage):
    table = make_rows(1, [2] * 40)
    lat = table["target_lat"].to_numpy().copy()
    lat[:20], lat[20:28], lat[28:30] = np.nan, np.inf, 139.7  # the last ones: longitudes
    lat[30] = -np.inf  # of a pair whose other image has one
    write(tmp_path, 1, table.set_column(4, "target_lat", pa.array(lat)))
    outcome = stage("data.split_cell_m=1000")
    assert outcome.code == 0, outcome.stderr
    found = place_of(tmp_path)
    assert len(found) == 40
    expected = {f"0001_{number}": SPLITS[choose_split(42, f"0001_{number}", DataSection())] for number in range(1, 16)}
    assert {building: found[building] for building in expected} == expected
    assert "15 buildings have no position (target_lat, target_lon)" in outcome.stderr
    leakage = tables.read_provenance(tmp_path / "merged" / "train.parquet")["leakage"]
    assert leakage["buildings_without_position"] == 15


def test_a_building_on_both_sides_of_the_antimeridian_has_its_cell_there(tmp_path, stage):
    table = make_rows(1, [2] * 30)
    west = np.tile([179.99999, -179.99999], 30)
    write(tmp_path, 1, table.set_column(5, "target_lon", pa.array(west)))
    assert stage("data.split_cell_m=200").code == 0
    places = [(lat, -180.0) for lat in table["target_lat"].to_numpy().reshape(30, 2).mean(axis=1)]
    cells = name_cells(*(np.array(values) for values in zip(*places, strict=True)), 200.0)
    expected = [SPLITS[choose_split(42, cell, DataSection())] for cell in cells]
    found = place_of(tmp_path)
    assert [found[f"0001_{number}"] for number in range(1, 31)] == expected


def test_buildings_at_one_spot_go_together_on_whichever_side_of_the_antimeridian(tmp_path, stage):
    table = make_rows(1, [2] * 40)
    lat, lon = np.repeat(10 + 0.01 * np.arange(20), 4), np.tile([180.0, 180.0, -180.0, -180.0], 20)
    table = table.set_column(4, "target_lat", pa.array(lat)).set_column(5, "target_lon", pa.array(lon))
    write(tmp_path, 1, table)
    assert stage("data.split_cell_m=100").code == 0
    found = place_of(tmp_path)
    for number in range(1, 41, 2):
        assert found[f"0001_{number}"] == found[f"0001_{number + 1}"]
    assert len(set(found.values())) == 3
