"""Columns of every type that means the same are read as one, within one folder too."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_files import make_rows, write

from pipeline.errors import InputError
from pipeline.files import column_types, tables
from preprocess_raw_data import merge_and_split

SPLITS = ("train", "val", "test")
FIELDS = [pa.field("id", pa.int64()), pa.field("name", pa.string()), pa.field("lat", pa.float64())]


@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
@pytest.mark.parametrize("whole", [pa.uint8(), pa.int32(), pa.int64(), pa.uint64(), pa.float64(), pa.float32()])
@pytest.mark.parametrize("position", [pa.float32(), pa.float64(), pa.float16()])
def test_every_type_that_means_the_same_is_read_as_one(tmp_path, text, whole, position):
    types = {"id": whole, "name": text, "lat": position, "other": text}
    values = {"id": [1, 200], "name": ["é", "b"], "lat": [0.5, -0.25], "other": [None, "x"]}
    pq.write_table(pa.table({name: pa.array(values[name], pa.string() if kind == text else kind).cast(kind)
                             for name, kind in types.items()}), tmp_path / "a.parquet")  # fmt: skip
    table = tables.read_columns(tmp_path / "a.parquet", FIELDS, "make it again", with_others=True)
    assert table.schema == pa.schema([*FIELDS, pa.field("other", pa.string())])
    assert table.to_pydict() == values


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (pa.array([1.0, 2.5]), "column id holds ids as floats, such as 2.5, in which two ids may have become one"),
        (pa.array([1.0, 2.0**53]), "column id holds ids as floats, such as 9007199254740992.0, in which"),
        (pa.array([2.0**24], pa.float32()), "column id holds ids as floats, such as 16777216.0, in which"),
        (pa.array([2.0**53]).dictionary_encode(), "column id holds ids as floats, such as 9007199254740992.0, in"),
        (pa.array([1.0, float("inf")]), "column id holds ids as floats, such as inf, in which"),
        (pa.array([1, 2**64 - 1], pa.uint64()), "column id holds uint64 where int64 is expected"),
        (pa.array([1.0, None]), "column id has empty values: make it again"),
        (pa.array([1.0, float("nan")]), "column id has empty values: make it again"),
    ],
)
def test_whole_numbers_that_may_not_be_whole_are_refused(tmp_path, values, complaint):
    pq.write_table(pa.table({"id": values}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=re.escape(complaint)):
        tables.read_columns(tmp_path / "a.parquet", FIELDS[:1], "make it again")


def test_a_dataset_has_the_number_that_is_the_whole_name_of_its_tar():
    names = ["0012.tar", "raw/0012.tar", "raw\\0012.tar", "city0012.tar", "0012.tar.gz", "00 12.tar"]
    table = column_types.fill_composite_ids(pa.table({"tar_file": names, "target_id": [7] * 6, "patch_id": [1] * 6}))
    assert table["dataset_id"].to_pylist() == [12, 12, 12, None, None, None]
    assert table["building_id"].to_pylist() == ["0012_7", "0012_7", "0012_7", None, None, None]


def widen(table, text, whole, real, *, is_fixed):
    """Return a stage 2 table as another program may write it."""
    kinds = {pa.string(): text, pa.int64(): whole, pa.float64(): pa.float32()}
    embedding = pa.array(table["embedding"].to_pylist(), pa.list_(real, *([8] if is_fixed else [])))
    schema = pa.schema([field.with_type(kinds[field.type]) for field in table.schema if field.name != "embedding"])
    return table.drop_columns(["embedding"]).cast(schema).append_column("embedding", embedding)


@pytest.fixture
def stage(tmp_path, write_config, run_main):
    """Run stage 3 on tmp_path/embeddings."""
    config = write_config(tmp_path)
    return lambda: run_main(merge_and_split.main, "--config", config)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1)])
def test_files_whose_types_mean_the_same_go_together(tmp_path, stage, order):
    plain, pandas, halves = (make_rows(number, [3] * 8) for number in order)
    dictionary = pa.dictionary(pa.int32(), pa.string())
    write(tmp_path, order[0], plain)
    write(tmp_path, order[1], widen(pandas, pa.large_string(), pa.float64(), pa.float64(), is_fixed=False))
    write(tmp_path, order[2], widen(halves, dictionary, pa.int32(), pa.float16(), is_fixed=True))
    assert stage().code == 0
    merged = pa.concat_tables([pq.read_table(tmp_path / "merged" / f"{split}.parquet") for split in SPLITS])
    assert merged.schema.field("embedding").type == pa.list_(pa.float32(), 8)
    dropped = ["image_path", "tar_file", "heading", "target_lat", "target_lon", "embedding"]
    wanted = pa.concat_tables([plain, pandas, halves]).drop_columns(dropped).sort_by("streetview_image_id")
    assert merged.drop_columns(dropped[2:]).sort_by("streetview_image_id").equals(wanted)
