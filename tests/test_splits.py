"""Which split a building belongs to, against slow re-implementations."""

import hashlib
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import DataSection
from pipeline.errors import InputError
from preprocess_raw_data.merging.splits import (
    SPLITS,
    Buildings,
    assign_splits,
    choose_split,
    draw_unit,
    hash_splits,
    name_cells,
    read_split_file,
)

IDS = [f"{dataset:04d}_{target}" for dataset in range(1, 9) for target in range(250)]
NOWHERE = np.zeros(len(IDS))


def make_buildings(ids=IDS, lat=NOWHERE, lon=NOWHERE):
    return Buildings(pa.array(ids), lat, lon)


def assign(ids=IDS, lat=NOWHERE, lon=NOWHERE, seed=42, named=None, **data):
    found = assign_splits(make_buildings(ids, lat, lon), DataSection(**data), seed, named or {})
    return [SPLITS[split] for split in found]


def split_by_hand(seed, unit, train, val):
    """Read the first 16 hexadecimal digits as a fraction of all there are."""
    digits = hashlib.blake2b(f"{seed}:{unit}".encode(), digest_size=8).hexdigest()
    share = sum(int(digit, 16) * 16.0 ** -(place + 1) for place, digit in enumerate(digits))
    return "train" if share < train else "val" if share < train + val else "test"


@pytest.mark.parametrize("seed", [0, 42, 7])
def test_a_building_goes_where_the_hash_of_seed_and_id_sends_it(seed):
    assert assign(seed=seed) == [split_by_hand(seed, building, 0.7, 0.15) for building in IDS]


def test_nobody_moves_because_of_the_others():
    whole = dict(zip(IDS, assign(), strict=True))
    part = IDS[1::3][::-1]
    assert assign(part, NOWHERE[: len(part)], NOWHERE[: len(part)]) == [whole[building] for building in part]


def test_another_seed_is_another_split():
    assert assign(seed=1) != assign(seed=2)


def test_the_ratios_are_met():
    found = assign(train_ratio=0.5, val_ratio=0.3, test_ratio=0.2)
    for split, ratio in (("train", 0.5), ("val", 0.3), ("test", 0.2)):
        assert abs(found.count(split) / len(found) - ratio) < 4 * math.sqrt(ratio * (1 - ratio) / len(found))


@pytest.mark.parametrize("split", range(3))
def test_a_ratio_of_one_takes_everybody(split):
    ratios = dict(zip(("train_ratio", "val_ratio", "test_ratio"), np.eye(3)[split].tolist(), strict=True))
    assert set(assign(**ratios)) == {SPLITS[split]}


def test_draws_lie_in_the_unit_interval_and_are_spread_evenly():
    draws = np.array([draw_unit(0, building) for building in IDS])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(np.sort(draws) - np.linspace(0, 1, len(draws))).max() < 1.7 / math.sqrt(len(draws))  # Kolmogorov


def cell_by_hand(lat, lon, cell_m):
    """Count the cells from the equator and from Greenwich one by one."""
    height = cell_m / 111_195.0
    row = 0
    while (row + 1) * height <= lat:
        row += 1
    while row * height > lat:
        row -= 1
    width = cell_m / (111_195.0 * math.cos(math.radians(row * height)))
    column = 0
    while (column + 1) * width <= lon:
        column += 1
    while column * width > lon:
        column -= 1
    return f"cell:{row}:{column}"


@pytest.mark.parametrize("cell_m", [5_000.0, 20_000.0])
def test_cells_are_those_that_one_would_count_by_hand(cell_m):
    generator = np.random.default_rng(0)
    lat, lon = generator.uniform(-80, 80, 40), generator.uniform(-30, 30, 40)
    assert list(name_cells(lat, lon, cell_m)) == [cell_by_hand(*place, cell_m) for place in zip(lat, lon, strict=True)]


def test_a_cell_is_as_wide_and_high_as_it_says_and_goes_to_one_split():
    generator = np.random.default_rng(1)
    lat, lon = 52.2 + generator.uniform(0, 0.02, 2000), 0.12 + generator.uniform(0, 0.03, 2000)
    cells = np.array(list(name_cells(lat, lon, 200.0)))
    assert 60 < len(set(cells)) < 200
    splits = np.array(assign(lat=lat, lon=lon, split_cell_m=200.0))
    for cell in set(cells):
        inside = cells == cell
        assert np.ptp(lat[inside]) * 111_195 <= 200.001
        assert np.ptp(lon[inside]) * 111_195 * math.cos(math.radians(52.2)) <= 200.2
        assert set(splits[inside]) == {split_by_hand(42, cell, 0.7, 0.15)}


def test_a_named_building_goes_where_it_is_named_whatever_the_unit():
    named = {building: SPLITS[number % 3] for number, building in enumerate(IDS[::5])}
    for data in ({}, {"split_cell_m": 100.0}):
        free, held = assign(**data), assign(named=named, **data)
        for building, before, after in zip(IDS, free, held, strict=True):
            assert after == named.get(building, before)


def test_the_hash_of_a_split_depends_on_who_is_where_and_not_on_the_order():
    splits = np.array([0, 1, 2, 0], dtype=np.int8)
    ids = pa.array(["d", "a", "c", "b"])
    lines = "a\tval\nb\ttrain\nc\ttest\nd\ttrain\n"
    assert hash_splits(ids, splits) == hashlib.sha256(lines.encode()).hexdigest()[:32]
    assert hash_splits(ids, splits) == hash_splits(ids[::-1], splits[::-1])
    assert hash_splits(ids, splits) != hash_splits(ids, np.array([0, 1, 2, 1], dtype=np.int8))


def test_the_choice_at_the_borders_is_half_open(monkeypatch):
    data = DataSection(train_ratio=0.5, val_ratio=0.25, test_ratio=0.25)
    for value, split in ((0.0, 0), (0.4999, 0), (0.5, 1), (0.7499, 1), (0.75, 2), (0.9999, 2)):
        monkeypatch.setattr("preprocess_raw_data.merging.splits.draw_unit", lambda *_, value=value: value)
        assert choose_split(0, "x", data) == split


NAMED = {"0001_1": "train", "0001_2": "val", "0001_10": "test"}


@pytest.mark.parametrize("kind", ["parquet", "csv", "large"])
def test_a_split_file_is_read_from_parquet_and_csv(tmp_path, kind):
    path = tmp_path / ("s.csv" if kind == "csv" else "s.parquet")
    if kind == "csv":
        rows = [f"{split},{building},x" for building, split in NAMED.items()]
        path.write_text("\n".join(["split,building_id,more", *rows, ""]))
    else:
        string = pa.large_string() if kind == "large" else pa.string()
        columns = {"building_id": pa.array(NAMED, string), "split": pa.array(NAMED.values(), string)}
        pq.write_table(pa.table(columns), path)
    assert read_split_file(path) == NAMED


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read .No such file"),
        ("", "no column building_id: a split file needs the columns building_id and split"),
        ("building_id,other\na,b\n", "no column split: a split file needs"),
        ("building_id,split\na,holdout\n", "building a has split 'holdout': it must be one of train, val, test"),
        ("building_id,split\na,\n", "row 1 has no split: give it one, or remove the row"),
        ("building_id,split\na,val\n \t,val\n", "row 2 has no building_id: give it one, or remove the row"),
        ("building_id,split\na,train\na,val\n", "building a is in train and in val: remove one"),
    ],
)
def test_a_split_file_that_is_wrong_is_named(tmp_path, content, complaint):
    path = tmp_path / "s.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=complaint) as caught:
        read_split_file(path)
    assert str(path) in str(caught.value)


def test_a_damaged_parquet_or_one_without_the_columns_is_named(tmp_path):
    path = tmp_path / "s.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a readable parquet file"):
        read_split_file(path)
    pq.write_table(pa.table({"building_id": ["a"]}), path)
    with pytest.raises(InputError, match="no column split: a split file needs"):
        read_split_file(path)


def test_a_building_named_twice_alike_is_no_contradiction(tmp_path):
    (tmp_path / "s.csv").write_text("building_id,split\na,val\na,val\n")
    assert read_split_file(tmp_path / "s.csv") == {"a": "val"}


def test_a_byte_order_mark_before_a_split_file_is_passed_over(tmp_path):
    (tmp_path / "s.csv").write_text("building_id,split\na,val\n", encoding="utf-8-sig")
    assert read_split_file(tmp_path / "s.csv") == {"a": "val"}


def test_a_folder_of_old_splits_is_a_split_file(tmp_path):
    named = {"0001_1": "train", "0001_2": "train", "0001_3": "val", "0002_1": "test"}
    for split in SPLITS:  # as the reference implementation may leave them: without composite ids, rows repeat
        names = [name.split("_") for name, place in named.items() if place == split] * 2
        numbers = {"dataset_id": [int(name[0]) for name in names], "target_id": [int(name[1]) for name in names]}
        pq.write_table(pa.table(numbers), tmp_path / f"{split}.parquet")
    assert read_split_file(tmp_path) == named
    pq.write_table(pa.table({"dataset_id": [1], "target_id": [1]}), tmp_path / "test.parquet")
    with pytest.raises(InputError, match="building 0001_1 is in train and in test: remove one"):
        read_split_file(tmp_path)
    (tmp_path / "val.parquet").unlink()
    with pytest.raises(InputError, match="val.parquet: no such file"):
        read_split_file(tmp_path)
