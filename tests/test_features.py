"""A merged split read into arrays: order, types, and every way in which it can be wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.files.tables import make_provenance, read_batches, write_parquet
from pipeline.retrieval import features
from pipeline.retrieval.features import check_one_run, load_features

BUILDINGS = ["0001_9", "0001_9", "0001_2", "0002_9", "0002_9", "0001_2"]


def make_table(num_rows: int = 6, width: int = 4, kind: pa.DataType | None = None) -> pa.Table:
    """Return a split of six images whose buildings are not in alphabetical order."""
    values = np.arange(1, num_rows * width + 1, dtype=np.float32) / 8
    kind = kind or pa.float32()
    return pa.table(
        {
            "dataset_id": pa.array([int(name[:4]) for name in BUILDINGS][:num_rows], pa.int64()),
            "street_view_id": pa.array(range(10, 10 + num_rows), pa.int64()),
            "target_lat": pa.array(np.linspace(52.1, 52.2, num_rows)),
            "target_lon": pa.array(np.linspace(0.1, 0.2, num_rows)),
            "building_id": pa.array(BUILDINGS[:num_rows]),
            "streetview_image_id": pa.array([f"0001_{number}" for number in range(num_rows)]),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values).cast(kind), width),
        }
    )


def write(tmp_path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, tmp_path / "train.parquet", **options)
    return tmp_path / "train.parquet"


@pytest.mark.parametrize("batch_numbers", [1, 8, 2**24])
@pytest.mark.parametrize("row_group_size", [2, 100])
def test_columns_come_as_arrays_whatever_the_batches(
    tmp_path: Path, batch_numbers: int, row_group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_BATCH_NUMBERS", batch_numbers)
    table = make_table()
    found = load_features(write(tmp_path, table, row_group_size=row_group_size))
    np.testing.assert_array_equal(found.embeddings, np.arange(1, 25, dtype=np.float32).reshape(6, 4) / 8)
    assert found.embeddings.dtype == np.float32
    assert found.building_ids.to_pylist() == ["0001_9", "0001_2", "0002_9"]
    assert found.building_codes.tolist() == [0, 0, 1, 2, 2, 1]
    assert found.building_codes.dtype == np.int32
    assert found.image_ids.to_pylist() == table["streetview_image_id"].to_pylist()
    for name, column in (("dataset_id", found.dataset_ids), ("street_view_id", found.street_view_ids)):
        assert column.tolist() == table[name].to_pylist()
        assert column.dtype == np.int64
    assert found.target_lat.tolist() == table["target_lat"].to_pylist()
    assert found.target_lon.tolist() == table["target_lon"].to_pylist()
    assert (len(found), found.width) == (6, 4)


def test_float16_embeddings_stay_half_as_large(tmp_path: Path) -> None:
    found = load_features(write(tmp_path, make_table(kind=pa.float16())))
    assert found.embeddings.dtype == np.float16
    np.testing.assert_array_equal(found.embeddings, np.arange(1, 25, dtype=np.float32).reshape(6, 4) / 8)


def test_large_strings_do_as_well_as_strings(tmp_path: Path) -> None:
    table = make_table()
    index = table.schema.get_field_index("building_id")
    table = table.set_column(index, "building_id", table["building_id"].cast(pa.large_string()))
    found = load_features(write(tmp_path, table))
    assert found.building_ids.type == pa.string()
    assert found.building_codes.tolist() == [0, 0, 1, 2, 2, 1]


def test_a_file_without_provenance_is_taken_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "spatial_building_embeddings"):
        load_features(write(tmp_path, make_table()))
    assert "carries no provenance" in caplog.text


def test_splits_of_two_runs_of_stage_3_do_not_go_together(tmp_path: Path) -> None:
    paths = [tmp_path / "train.parquet", tmp_path / "val.parquet"]
    made_by = make_provenance("merge_and_split", [{"name": "a", "footer": "1"}], {"seed": 1})
    for path, rows in zip(paths, (4, 6), strict=True):
        write_parquet(path, make_table(rows), made_by | {"rows": rows})
    check_one_run(*paths)
    for changes, difference in (
        ({"settings": {"seed": 2}}, "seed was 1 and is now 2"),
        ({"inputs": [{"name": "a", "footer": "2"}]}, "input a has changed"),
    ):
        write_parquet(paths[1], make_table(), made_by | changes)
        with pytest.raises(InputError, match=rf"val\.parquet: not of the same run as train\.parquet \({difference}\)"):
            check_one_run(*paths)
    pq.write_table(make_table(), paths[1])
    check_one_run(*paths)  # it may be anybody's


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_bad_embedding_is_refused_naming_the_image(tmp_path: Path, bad: float) -> None:
    values = np.ones((6, 4), np.float32)
    values[3, :] = bad if bad == 0 else [1, bad, 1, 1]
    table = make_table().drop_columns(["embedding"])
    table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 4))
    with pytest.raises(InputError, match=r"train.parquet: the embedding of image 0001_3 is not finite or all zero"):
        load_features(write(tmp_path, table))


def test_a_bad_row_far_behind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_BATCH_NUMBERS", 4 * 2)
    values = np.ones((6, 4), np.float32)
    values[5] = 0
    table = make_table().drop_columns(["embedding"])
    table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 4))
    with pytest.raises(InputError, match="the embedding of image 0001_5 is not finite or all zero .row 5"):
        load_features(write(tmp_path, table, row_group_size=3))


def test_an_empty_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no rows: run stage 3 on more images, or change \[data\]"):
        load_features(write(tmp_path, make_table().slice(0, 0)))


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ("building_id", "column building_id has empty values"),
        ("street_view_id", "column street_view_id has empty values"),
        ("embedding", "column embedding: row 1 is empty"),
    ],
)
def test_a_null_is_refused_naming_the_column(tmp_path: Path, column: str, problem: str) -> None:
    table = make_table()
    mask = pa.array([False, True, False, False, False, False])
    values = pa.array([None if hide else value for value, hide in zip(table[column].to_pylist(), mask.to_pylist(),
                                                                      strict=True)], table[column].type)  # fmt: skip
    table = table.set_column(table.schema.get_field_index(column), column, values)
    with pytest.raises(InputError, match=problem):
        load_features(write(tmp_path, table))


def test_a_missing_column_and_a_wrong_type_are_named_together(tmp_path: Path) -> None:
    table = make_table().drop_columns(["target_lat"])
    index = table.schema.get_field_index("street_view_id")
    table = table.set_column(index, "street_view_id", table["street_view_id"].cast(pa.string()))
    with pytest.raises(InputError, match="street_view_id is string, expected int64, column target_lat is missing"):
        load_features(write(tmp_path, table))


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float64())])
def test_lists_of_one_length_do_as_well_as_those_of_a_fixed_one(tmp_path: Path, kind: pa.DataType) -> None:
    table = make_table()
    expected = load_features(write(tmp_path, table)).embeddings.copy()
    listed = pa.array(table["embedding"].to_pylist(), kind)
    table = table.set_column(table.schema.get_field_index("embedding"), "embedding", listed)
    found = load_features(write(tmp_path, table)).embeddings
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_a_row_of_another_length_is_refused_naming_it(tmp_path: Path) -> None:
    table = make_table()
    rows = table["embedding"].to_pylist()
    rows[3] = rows[3][:3]
    table = table.set_column(table.schema.get_field_index("embedding"), "embedding", pa.array(rows))
    with pytest.raises(InputError, match=r"train.parquet: column embedding: row 3 is empty or has not 4 numbers"):
        load_features(write(tmp_path, table))


def test_a_missing_file_and_one_damaged_behind_its_footer_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train.parquet: no such file"):
        load_features(tmp_path / "train.parquet")
    path = write(tmp_path, make_table(), compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(InputError, match="train.parquet: damaged"):
        load_features(path)


def make_long_table(count: int, width: int) -> pa.Table:
    values = np.random.default_rng(0).normal(size=count * width).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), width)
    return pa.table({"embedding": column, "target_lat": np.linspace(52, 53, count), "target_lon": np.zeros(count)})


@pytest.mark.parametrize("row_group_size", [1, 9, 100])
def test_batches_come_in_order_whatever_the_row_groups(tmp_path: Path, row_group_size: int) -> None:
    table = make_long_table(40, 8)
    batches = list(read_batches(write(tmp_path, table, row_group_size=row_group_size), ["embedding", "target_lat"], 4))
    assert max(len(batch) for batch in batches) <= 4
    assert {tuple(batch.schema.names) for batch in batches} == {("embedding", "target_lat")}
    found = np.concatenate([batch.column(0).flatten().to_numpy() for batch in batches])
    np.testing.assert_array_equal(found, table["embedding"].combine_chunks().flatten().to_numpy())


def test_reading_batches_keeps_no_row_group_behind(tmp_path: Path) -> None:
    path = write(tmp_path, make_long_table(6000, 256), row_group_size=100)
    held = []
    before = pa.total_allocated_bytes()
    for batch in read_batches(path, ["embedding"], 100):
        assert len(batch)
        held.append(pa.total_allocated_bytes() - before)
    assert max(held) < 10 * 100 * 256 * 4
