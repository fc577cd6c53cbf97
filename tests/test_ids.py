"""Names of buildings, images and tars, and shards."""

from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.ids import (
    Shard,
    dataset_name,
    join_id,
    parse_dataset_id,
    parse_dataset_name,
)


def test_ids_are_padded_to_four_digits_and_grow_beyond():
    assert join_id(7, 123456) == "0007_123456"
    assert join_id(12345, 1) == "12345_1"


@pytest.mark.parametrize(
    ("name", "expected"), [("0001.tar", 1), ("0000.tar", 0), ("9999.tar", 9999), ("12345.tar", 12345)]
)
def test_a_tars_name_gives_its_dataset(name, expected):
    assert parse_dataset_id(Path("some/where") / name) == expected


@pytest.mark.parametrize(
    "name", ["1.tar", "00001.tar", "x.tar", "0001.tar.gz", "0001.TAR", "-001.tar", "٠٠٠١.tar", "0001"]
)
def test_another_name_is_refused_with_what_to_do(name):
    with pytest.raises(InputError, match=r"must be named NNNN\.tar after its dataset id: rename"):
        parse_dataset_id(Path(name))


def test_shards_together_take_every_unit_once():
    units = list(range(11))
    for count in (1, 2, 3, 20):
        taken = [Shard(index, count).take(units) for index in range(count)]
        assert sorted(unit for part in taken for unit in part) == units
        assert max(map(len, taken)) - min(map(len, taken)) <= 1


@pytest.mark.parametrize("dataset_id", [0, 7, 9999, 12345])
def test_a_datasets_name_is_read_back(dataset_id):
    assert parse_dataset_name(dataset_name(dataset_id)) == dataset_id
    assert parse_dataset_name(f"{dataset_name(dataset_id)}_embeddings") is None
