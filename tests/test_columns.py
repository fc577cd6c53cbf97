"""Columns as other programs write them: read, kept, or refused in one line that names file, column and remedy."""

import datetime
import itertools
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset
from published_models import make_photographs, read_dataset, write_packaged

from pipeline.embeddings_dataset.columns import checksum_tables, filter_rows, hash_ids, plain_values
from pipeline.embeddings_dataset.packaged_input import InputOptions, open_input, read_batches
from pipeline.embeddings_dataset.parts import Outcome, make_content, plan_parts
from pipeline.errors import DamagedError, InputError
from pipeline.files.tables import open_parquet
from publish_model import aggregate_embeddings

IMAGES = [b"x", b"y", b"z"]


def write(path, kept=None, ids=None, **options):
    columns = {"OSMID": ["a", "b", "c"] if ids is None else ids, "image_bytes": IMAGES}
    table = pa.table(columns if kept is None else columns | {"k": kept})
    pq.write_table(table, path, **options)
    return path


def read(path, *keep):
    """Read a packaged parquet as stage 8 does, and return what it keeps of rows 0 and 2."""
    source = open_input(InputOptions(input=path, keep_columns=keep))
    (table,) = read_batches(source, 0)
    outcome = Outcome(np.array([0, 2]), np.zeros((2, 1), np.float32), [0, 0], [])
    return make_content(source, plan_parts(source)[0], table, outcome).embedded.drop_columns("embedding")


def not_utf8():
    """Three strings of which the second and third are Latin-1."""
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], np.int32))
    return pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xe9\xff")])


@pytest.mark.parametrize("nested", [False, True])
def test_text_that_is_not_utf8_is_one_line_with_file_and_column_where_it_is_used(tmp_path, nested):
    values = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), not_utf8()) if nested else not_utf8()
    path = write(tmp_path / "in.parquet", kept=values)
    with pytest.raises(InputError) as caught:
        read(path, "k")
    assert f"{path}: column k: text that is not UTF-8" in str(caught.value)
    assert "write it in UTF-8, or as binary" in str(caught.value)
    assert read(path).column_names == ["OSMID"]  # not used: no harm


def test_ids_that_are_not_utf8_are_one_line(tmp_path):
    with pytest.raises(InputError, match="in.parquet: column OSMID: text that is not UTF-8"):
        read(write(tmp_path / "in.parquet", ids=not_utf8()))


def test_a_column_name_that_is_not_utf8_is_one_line(tmp_path):
    path = write(tmp_path / "in.parquet", kept=[1, 2, 3], store_schema=False)
    table = pq.read_table(path).rename_columns(["OSMID", "image_bytes", "kolumn"])
    pq.write_table(table, path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"kolumn", b"k\xe9lumn"))
    with pytest.raises(InputError, match=r"in.parquet: not a readable parquet file \('utf-8' codec"):
        read(path)


def test_a_type_that_arrow_does_not_know_is_one_line(tmp_path):
    polars = pytest.importorskip("polars")
    path = tmp_path / "in.parquet"
    wide = polars.Series([1, 2, 3], dtype=polars.Int128)
    polars.DataFrame({"OSMID": ["a", "b", "c"], "image_bytes": IMAGES, "k": wide}).write_parquet(path)
    with pytest.raises(InputError, match=r"in.parquet: cannot be read \(.*\): put that right"):
        read(path)


FAR = 10_000_000  # days: the year 29349
KEPT = {
    "far dates": (pa.array([[FAR], [1], None], pa.list_(pa.date32())), [FAR]),
    "far times": (pa.array([[10**18], [1], None], pa.list_(pa.timestamp("us"))), [10**18]),
    "nanoseconds": (pa.array([[10**18 + 1], [1], None], pa.list_(pa.timestamp("ns"))), [10**18 + 1]),
    "an unknown time zone": (
        pa.array([{"t": 5}, {"t": 2}, None], pa.struct([("t", pa.int64())])).cast(
            pa.struct([("t", pa.timestamp("us", "Mars/Olympus"))])
        ),
        {"t": 5},
    ),
    "nanoseconds in a map": (
        pa.array([[("a", 10**18 + 1)], [], None], pa.map_(pa.string(), pa.timestamp("ns"))),
        [("a", 10**18 + 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_nested_times_that_python_cannot_hold_are_kept_as_they_are(tmp_path, kind):
    values, first = KEPT[kind]
    kept = read(write(tmp_path / "in.parquet", kept=values), "k")
    assert kept["k"].type == values.type
    assert plain_values(kept["k"].combine_chunks()) == [first, None]
    pq.write_table(kept, tmp_path / "part.parquet")
    assert checksum_tables(pq.read_table(tmp_path / "part.parquet")) == checksum_tables(kept)


def test_the_times_of_spark_are_kept_also_inside_lists(tmp_path):
    """Spark writes INT96, which Arrow reads as nanoseconds, and names a list's element in its own way."""
    moment = datetime.datetime(2020, 1, 1)
    path = write(
        tmp_path / "in.parquet", kept=pa.array([[moment], [], [moment]]), use_deprecated_int96_timestamps=True,
        store_schema=False, use_compliant_nested_type=False,
    )  # fmt: skip
    assert plain_values(read(path, "k")["k"].combine_chunks()) == [[1577836800 * 10**9]] * 2


def test_times_are_numbers_wherever_they_stand():
    day = datetime.date(2020, 1, 1)
    assert plain_values(pa.array([day, None])) == [18262, None]
    assert plain_values(pa.array([[day], None], pa.list_(pa.date32()))) == [[18262], None]
    assert hash_ids(plain_values(pa.array(["a"]))) == hash_ids(["a"])


@pytest.mark.parametrize("kind", [pa.string_view(), pa.list_(pa.string_view()), pa.struct([("x", pa.string_view())])])
def test_rows_of_views_are_filtered(kind):
    values = {pa.string_view(): ["a", "b", None, "d"]}.get(kind)
    if values is None:
        values = [["a"], [], None, ["d"]] if pa.types.is_list(kind) else [{"x": "a"}, {"x": None}, None, {"x": "d"}]
    table = pa.table({"k": pa.chunked_array([pa.array(values[:3], kind), pa.array(values[3:], kind)])})
    left = filter_rows(table, np.array([True, False, True, True]))
    assert left["k"].to_pylist() == [values[0], values[2], values[3]]
    assert left.schema == table.schema
    assert filter_rows(table, np.zeros(4, dtype=bool)).num_rows == 0


def test_groups_of_lists_are_refused(run_main, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array([7, 7]), unit_rows(0, 2), k=pa.array([[1, 2], None]))
    outcome = run_main(aggregate_embeddings.main, output, "--by", "OSMID,k")
    assert (outcome.code, "--by k: a column of lists or structs" in outcome.stderr) == (2, True)


def test_groups_by_the_embedding_are_refused(run_main, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array([1]), unit_rows(0, 1))
    assert run_main(aggregate_embeddings.main, output, "--by", "OSMID,embedding").code == 2


def test_only_content_is_called_damaged(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(DamagedError, match="not a readable parquet file"):
        open_parquet(path)
    with pytest.raises(InputError, match="a folder or a pipe, not a parquet file") as caught:
        open_parquet(tmp_path)
    assert not isinstance(caught.value, DamagedError)


ONE = {"text": "1", "int": 1, "bytes": b"1", "decimal": Decimal("1.00")}


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(ONE, 2)))
def test_a_deleted_id_does_not_come_back_in_another_type(delete, embed, tmp_path, before, after):
    for kind in (before, after):
        other = {"text": "01", "int": 10, "bytes": b"01", "decimal": Decimal("1.01")}[kind]
        source = write_packaged(tmp_path / "in.parquet", make_photographs(4), OSMID=[ONE[kind], other, None, other])
        assert embed(source, tmp_path / "out", "--overwrite").code == 0
        if kind is before:
            assert delete(tmp_path / "out", "1").code == 0
        assert read_dataset(tmp_path / "out")["OSMID"].to_pylist() == [other, None, other]
