"""The neighbours of each training image by band, against a loop over the table's rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.retrieval.features import Features
from train_specialized_embeddings.sampling import neighbor_table
from train_specialized_embeddings.sampling.neighbor_table import NUM_BANDS, Neighbors, load_neighbors


def make_features(building_names: list[str]) -> Features:
    codes = pa.array(building_names).dictionary_encode()
    count = len(building_names)
    return Features(
        embeddings=np.ones((count, 2), np.float32),
        building_codes=codes.indices.to_numpy().astype(np.int32),
        building_ids=codes.dictionary,
        image_ids=pa.array([f"0001_{number}" for number in range(count)]),
        dataset_ids=np.ones(count, np.int64),
        street_view_ids=np.arange(count, dtype=np.int64),
        target_lat=np.zeros(count),
        target_lon=np.zeros(count),
    )


FEATURES = make_features(["a", "a", "b", "c", "c", "c"])
# Out of order, one image of another split, neighbours of other splits (x, y), an own building (a), bands unsorted.
TABLE = {
    "target_coord_hash": ["0001_3", "0009_9", "0001_0", "0001_5", "0001_2"],
    "neighbor_building_ids": [["b", "x", "a", "b", "a"], ["a", "b"], ["a", "b", "y", "c", "b"], [], ["c", "a", "c"]],
    "neighbor_bands": [[0, 0, 1, 6, 6], [0, 1], [0, 1, 2, 3, 4], [], [6, 0, 3]],
}


def write(folder: Path, table: dict[str, Any], **options: Any) -> Path:
    types = {"neighbor_building_ids": pa.list_(pa.string()), "neighbor_bands": pa.list_(pa.int32())}
    columns = {name: pa.array(values, types.get(name)) for name, values in table.items()}
    pq.write_table(pa.table(columns), folder / "difficulty.parquet", **options)
    return folder / "difficulty.parquet"


def list_bands(neighbors: Neighbors, row: int) -> list[list[str]]:
    """Return the building ids of each band of one image."""
    starts = [0, *neighbors.ends[row]]
    first = neighbors.starts[row]
    return [
        FEATURES.building_ids.take(pa.array(neighbors.codes[first + a : first + b])).to_pylist()
        for a, b in zip(starts[:-1], starts[1:], strict=True)
    ]


def bands_by_loop(row: int) -> list[list[str]]:
    own = FEATURES.building_ids[int(FEATURES.building_codes[row])].as_py()
    bands: list[list[str]] = [[] for _ in range(NUM_BANDS)]
    for key, names, numbers in zip(*TABLE.values(), strict=True):
        if key == FEATURES.image_ids[row].as_py():
            for name, number in zip(names, numbers, strict=True):
                if name in {"a", "b", "c"} and name != own:
                    bands[number].append(name)
    return bands


@pytest.mark.parametrize("batch_rows", [1, 2, 100])
@pytest.mark.parametrize("row_group_size", [2, 100])
def test_neighbours_equal_a_loop_whatever_the_batches(
    tmp_path: Path, batch_rows: int, row_group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_table, "_BATCH_ROWS", batch_rows)
    neighbors = load_neighbors(write(tmp_path, TABLE, row_group_size=row_group_size), FEATURES)
    for row in range(len(FEATURES)):
        assert list_bands(neighbors, row) == bands_by_loop(row)
    assert neighbors.codes.dtype == np.int32


def test_what_the_table_misses_is_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "spatial_building_embeddings"):
        load_neighbors(write(tmp_path, TABLE), FEATURES)
    assert "6 training images, 2 of them not in the table, 3 without a usable neighbour" in caplog.text
    assert "carries no provenance" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"  # half of them: another table, it seems


def test_large_lists_and_null_lists_are_read_too(tmp_path: Path) -> None:
    names = TABLE["neighbor_building_ids"][:3] + [None] + TABLE["neighbor_building_ids"][4:]
    bands = TABLE["neighbor_bands"][:3] + [None] + TABLE["neighbor_bands"][4:]
    table = pa.table(
        {
            "target_coord_hash": TABLE["target_coord_hash"],
            "neighbor_building_ids": pa.array(names, pa.large_list(pa.large_string())),
            "neighbor_bands": pa.array(bands, pa.large_list(pa.int32())),
        }
    )
    pq.write_table(table, tmp_path / "difficulty.parquet")
    neighbors = load_neighbors(tmp_path / "difficulty.parquet", FEATURES)
    assert [list_bands(neighbors, row) for row in range(6)] == [bands_by_loop(row) for row in range(6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_coord_hash": ["x", "y", "z", "u", "v"]}, "names none of the training images: run stages 4 and 5"),
        ({"target_coord_hash": ["0001_3"] * 5}, "names an image twice"),
        ({"neighbor_bands": [[0] * 4, [0, 1], [0] * 5, [], [0] * 3]}, "differ in length"),
        ({"neighbor_bands": [[7] * 5, [0, 1], [0] * 5, [], [0] * 3]}, "neighbor_bands must be 0 ... 6"),
        ({"neighbor_bands": [[-1] * 5, [0, 1], [0] * 5, [], [0] * 3]}, "neighbor_bands must be 0 ... 6"),
        ({"neighbor_bands": ["a"] * 5}, "column neighbor_bands is string, expected list"),
        ({"neighbor_building_ids": [[1], [1], [1], [1], [1]]}, "column neighbor_building_ids is list<.*int64>"),
        ({"target_coord_hash": [1, 2, 3, 4, 5]}, "column target_coord_hash is int64, expected string"),
    ],
)
def test_a_table_of_another_shape_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = TABLE | change
    types = {"neighbor_building_ids": pa.list_(pa.string()), "neighbor_bands": pa.list_(pa.int32())}
    columns = {name: pa.array(values, None if name in change else types.get(name)) for name, values in content.items()}
    pq.write_table(pa.table(columns), tmp_path / "difficulty.parquet")
    with pytest.raises(InputError, match=f"difficulty.parquet: .*{message}"):
        load_neighbors(tmp_path / "difficulty.parquet", FEATURES)


def test_missing_columns_and_a_missing_file_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"target_coord_hash": TABLE["target_coord_hash"]})
    with pytest.raises(InputError, match="column neighbor_building_ids is missing"):
        load_neighbors(path, FEATURES)
    with pytest.raises(InputError, match="gone.parquet: no such file"):
        load_neighbors(tmp_path / "gone.parquet", FEATURES)
