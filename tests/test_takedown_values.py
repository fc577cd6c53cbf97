"""What a takedown says of values outside the ids' own column, and of its list."""

import base64

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset
from published_models import read_dataset

from publish_model.new_data.id_lists import read_id_list


@pytest.mark.parametrize(
    "values",
    [
        ["x", "x", "b", "x"],
        pa.array(["b", "x", "x", "b"]).dictionary_encode(),
        [["x"], ["x"], [], ["x", "b"]],
        [{"near": [b"x"]}, None, {"near": None}, {"near": [b"b"]}],
        [{"b": 1}, {"b": 2}, None, None],
    ],
)
def test_a_kept_column_that_names_a_deleted_id_is_named(delete, tmp_path, values):
    output = write_dataset(
        tmp_path / "out", pa.array(["a", "b", "c", "d"]), unit_rows(0, 4), year=[1, 2, 3, 4], of=values
    )
    outcome = delete(output, "b")
    assert outcome.code == 1
    assert "rows that stay name deleted ids in the kept columns 'of': embed" in outcome.stderr.splitlines()[-1]
    assert read_dataset(output)["OSMID"].to_pylist() == ["a", "c", "d"]
    assert delete(write_dataset(tmp_path / "new", pa.array(["c"]), unit_rows(0, 1), of=["x"]), "c").code == 0


def test_a_kept_number_that_equals_a_deleted_id_may_do_so_by_chance(delete, tmp_path):
    columns = {"count": [7, 2, 3], "mean": [None, 1.0, 7.0], "inner": [[{"x": 7}], [], []], "flag": [True, True, False]}
    output = write_dataset(tmp_path / "out", pa.array([1, 8, 7]), unit_rows(0, 3), **columns)
    outcome = delete(output, "7", "1")
    assert outcome.code == 0
    assert "numbers in the kept columns 'mean' equal deleted ids, maybe by chance" in outcome.stderr
    output = write_dataset(tmp_path / "new", pa.array([1, 8, 7]), unit_rows(0, 3), **columns)
    assert "in the kept columns 'count', 'inner' equal" in delete(output, "7").stderr.replace("'mean', ", "")


def test_a_kept_column_that_is_called_as_a_deleted_id_is_named(delete, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array([1, 2]), unit_rows(0, 2), **{"2": [0.5, 0.5]})
    outcome = delete(output, "2")
    assert (outcome.code, "name deleted ids in the kept columns '2': embed" in outcome.stderr) == (1, True)


@pytest.mark.parametrize(
    "kind", [pa.struct, lambda fields: pa.list_(fields[0]), lambda fields: pa.list_view(fields[0])]
)
def test_notes_of_others_inside_a_nested_column_go_with_the_ids(delete, tmp_path, kind):
    output = write_dataset(tmp_path / "out", pa.array(["way/1", "b"]), unit_rows(0, 2), of=[None, None])
    path = output / "parts" / "rg00000_rb00000.parquet"
    table = pq.read_table(path)
    noted = pa.array([None, None], kind([pa.field("x", pa.string(), metadata={"seen": "way/1"})]))
    pq.write_table(table.set_column(2, "of", noted), path)
    assert b"way/1" in base64.b64decode(pq.read_metadata(path).metadata[b"ARROW:schema"])
    assert delete(output, "b").code == 0
    assert b"way/1" not in base64.b64decode(pq.read_metadata(path).metadata[b"ARROW:schema"])
    assert read_dataset(output)["of"].type == noted.type


def test_an_id_that_a_list_repeats_takes_no_more_memory(tmp_path):
    pq.write_table(pa.table({"OSMID": ["way/1"] * 9 + ["way/2"]}), tmp_path / "list.parquet")
    assert read_id_list(tmp_path / "list.parquet").to_pylist() == ["way/1", "way/2"]
