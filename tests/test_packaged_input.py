"""Reading packaged images."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_models import write_packaged

from pipeline.embeddings_dataset.columns import plain_values, take_rows
from pipeline.embeddings_dataset.packaged_input import InputOptions, PackagedInput, open_input, read_batches
from pipeline.errors import InputError


def write(path, num_rows, row_group_size, batch_rows):
    images = [bytes([row % 256]) * 10 for row in range(num_rows)]
    pq.write_table(pa.table({"OSMID": range(num_rows), "image_bytes": images}), path, row_group_size=row_group_size)
    return open_input(InputOptions(input=path, read_batch_size=batch_rows))


@pytest.mark.parametrize("batch_rows", [1, 3, 4, 5, 100])
def test_batches_cover_each_row_group_in_order(tmp_path, batch_rows):
    source = write(tmp_path / "in.parquet", 17, 5, batch_rows)
    assert source.row_group_rows == (5, 5, 5, 2)
    seen = []
    for row_group, num_rows in enumerate(source.row_group_rows):
        sizes = []
        for table in read_batches(source, row_group):
            sizes.append(table.num_rows)
            seen += table["OSMID"].to_pylist()
        assert sizes == [min(batch_rows, num_rows - start) for start in range(0, num_rows, batch_rows)]
    assert seen == list(range(17))


def test_batches_that_arrow_cuts_short_are_put_together(tmp_path, monkeypatch):
    """Arrow ends a batch early where 2 GiB of bytes are full; here at random."""
    source = write(tmp_path / "in.parquet", 23, 23, 5)
    plain = pq.ParquetFile.iter_batches

    def cut(self, *arguments, **options):
        for batch in plain(self, *arguments, **options):
            yield batch.slice(0, 2)
            yield batch.slice(2)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", cut)
    tables = list(read_batches(source, 0))
    assert [table.num_rows for table in tables] == [5, 5, 5, 5, 3]
    assert [value for table in tables for value in table["OSMID"].to_pylist()] == list(range(23))


def test_a_row_group_larger_than_memory_is_read_piece_by_piece(tmp_path):
    image = 20_000
    schema = pa.schema([("OSMID", pa.int64()), ("image_bytes", pa.binary())])
    generator = np.random.default_rng(0)
    images = pa.array([generator.bytes(image) for _ in range(3000)])
    pq.write_table(
        pa.table({"OSMID": range(3000), "image_bytes": images}, schema=schema), tmp_path / "in.parquet",
        use_dictionary=False, compression="none", write_batch_size=16,  # or a page would hold 1,024 images
    )  # fmt: skip
    del images
    source = open_input(InputOptions(input=tmp_path / "in.parquet", read_batch_size=50))
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        for table in read_batches(source, 0):
            del table
    finally:
        pa.set_memory_pool(before)
    assert source.size > 50_000_000
    assert pool.max_memory() < 12_000_000  # a batch is 1 MB, a page and the buffer as much again


def test_null_counts_as_valid_and_false_does_not():
    table = pa.table({"is_valid": pa.chunked_array([[True, None], [False]])})
    source = SimpleNamespace(options=SimpleNamespace(filter_valid=True))
    assert PackagedInput.wanted_rows(source, table).tolist() == [0, 1]
    assert PackagedInput.wanted_rows(source, pa.table({"is_valid": pa.nulls(2)})).tolist() == [0, 1]
    assert PackagedInput.wanted_rows(source, pa.table({"OSMID": [1, 2]})).tolist() == [0, 1]


def test_a_column_that_is_is_valid_in_another_case_is_named(tmp_path, caplog):
    for names, is_named in ((["Is_Valid"], True), (["is_valid"], False), (["Is_Valid", "is_valid"], False)):
        caplog.clear()
        write_packaged(tmp_path / "in.parquet", [b"x"], **dict.fromkeys(names, [False]))
        open_input(InputOptions(input=tmp_path / "in.parquet"))
        assert (f"column {names[0]} is not read" in caplog.text) is is_named


def test_string_views_are_taken_too():
    if not hasattr(pa, "string_view"):
        pytest.skip("this pyarrow has no string_view")
    column = pa.array(["a", None, "c"], pa.string_view())
    taken = take_rows(column, np.array([2, 1]))
    assert taken.type == column.type
    assert taken.to_pylist() == ["c", None]
    assert take_rows(column, np.array([], dtype=np.int64)).to_pylist() == []


def test_plain_values_are_equal_where_the_ids_are():
    nanoseconds = pa.array([1577836800000000001, None], pa.timestamp("ns"))
    assert plain_values(nanoseconds) == [1577836800000000001, None]
    assert plain_values(pa.array(["a", "b", "a"]).dictionary_encode()) == ["a", "b", "a"]
    assert plain_values(pa.array([3], pa.date32())) == [3]


def test_a_small_file_whose_dictionary_unfolds_beyond_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.embeddings_dataset.packaged_input.BATCH_BYTES", 1_000_000)
    ids = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array(["A" * 100_000]))
    pq.write_table(pa.table({"OSMID": ids, "image_bytes": [b"x"] * 200}), tmp_path / "ids.parquet")

    with pytest.raises(InputError, match=r"ids\.parquet: 200 rows take 20\d+ bytes, though the file is small"):
        next(read_batches(open_input(InputOptions(input=tmp_path / "ids.parquet")), 0))


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("floats_first", [False, True])
def test_whole_numbers_are_one_column_with_those_that_pandas_made_floats(tmp_path, floats_first, encoded):
    floats = pa.array([3.0, None, float("nan")], pa.float64())
    columns = [pa.array([1, 2**60], pa.int64()), floats.dictionary_encode() if encoded else floats]
    for name, ids in zip("ba" if floats_first else "ab", columns, strict=True):
        table = pa.table({"OSMID": ids, "image_bytes": pa.array([b"x"] * len(ids))})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    source = open_input(InputOptions(input=tmp_path))
    found = [table["OSMID"] for group in range(2) for table in read_batches(source, group)]
    assert {ids.type for ids in found} == {pa.int64()}
    expected = [[1, 2**60], [3, None, None]]
    assert [ids.to_pylist() for ids in found] == (expected[::-1] if floats_first else expected)
