"""Lists of one length in any Arrow type: found, read as this project keeps them, or refused by row."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.files.list_columns import find_embedding, find_fingerprint
from pipeline.files.tables import read_batches


def write(folder: Path, kind: pa.DataType, rows: list[Any], name: str = "embedding") -> Path:
    pq.write_table(pa.table({name: pa.array(rows, kind)}), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (pa.list_(pa.float32(), 3), "f4"), (pa.list_(pa.float16(), 3), "f2"), (pa.list_(pa.float64(), 3), "f4"),
        (pa.list_(pa.float32()), "f4"), (pa.list_(pa.float64()), "f4"), (pa.large_list(pa.float64()), "f4"),
    ],
)  # fmt: skip
def test_an_embedding_is_read_as_float32_or_float16(tmp_path: Path, kind: pa.DataType, dtype: str) -> None:
    path = write(tmp_path, kind, [np.array([1, 0.5, -2], "f2"), np.array([4, 5, 6], "f2")])
    column = find_embedding(path)
    assert (column.width, column.dtype) == (3, np.dtype(dtype))
    (batch,) = read_batches(path, ["embedding"], 10)
    found = column.read(batch.column(0), 0)
    assert found.dtype == dtype
    assert found.tolist() == [[1, 0.5, -2], [4, 5, 6]]


def test_a_column_without_rows_has_a_width_only_if_its_type_says_so(tmp_path: Path) -> None:
    assert find_embedding(write(tmp_path, pa.list_(pa.float32(), 3), [])).width == 3
    assert find_embedding(write(tmp_path, pa.list_(pa.float64()), [])).width is None


@pytest.mark.parametrize("kind", [pa.float32(), pa.list_(pa.int64()), pa.list_(pa.string()), pa.list_(pa.float32(), 0)])
def test_an_embedding_of_another_type_is_refused(tmp_path: Path, kind: pa.DataType) -> None:
    with pytest.raises(InputError, match="not lists of one length of floats: make the file again with stage 2"):
        find_embedding(write(tmp_path, kind, []))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a.parquet: column embedding is missing"):
        find_embedding(write(tmp_path, pa.float32(), [], name="other"))


@pytest.mark.parametrize("first", [None, []])
def test_a_first_row_that_is_empty_is_refused(tmp_path: Path, first: list[float] | None) -> None:
    with pytest.raises(InputError, match="column embedding: row 0 is empty"):
        find_embedding(write(tmp_path, pa.list_(pa.float32()), [first, [1.0]]))


def test_a_fingerprint_is_read_as_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, pa.list_(pa.int64()), [[0, 255], [7, 8]], name="fingerprint")
    column = find_fingerprint(path)
    (batch,) = read_batches(path, ["fingerprint"], 10)
    assert column.read(batch.column(0), 0).tolist() == [[0, 255], [7, 8]]
    assert column.arrow_type == pa.list_(pa.uint8(), 2)


def test_memory_does_not_grow_with_the_rows_of_a_list_of_doubles(tmp_path: Path) -> None:
    width, num_rows = 512, 60_000  # 245 MB in one row group, as other writers leave it
    path = tmp_path / "a.parquet"
    values = np.random.default_rng(0).normal(size=width * 100)
    kind = pa.schema([("embedding", pa.list_(pa.float64()))])
    with pq.ParquetWriter(path, kind, use_dictionary=False) as writer:
        offsets = np.arange(num_rows + 1, dtype=np.int32) * width
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.tile(values, num_rows // 100)))
        writer.write_table(pa.table([column], kind), row_group_size=num_rows)
    del column, offsets
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    found, largest = find_embedding(path), 0
    for batch in read_batches(path, ["embedding"], 1024):
        rows = found.read(batch.column(0), 0)
        largest = max(largest, pa.total_allocated_bytes() - before + rows.nbytes)
    assert largest < 60e6
