"""What a takedown says of values outside the ids' own column, and of its list."""

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


def test_an_id_that_a_list_repeats_takes_no_more_memory(tmp_path):
    pq.write_table(pa.table({"OSMID": ["way/1"] * 9 + ["way/2"]}), tmp_path / "list.parquet")
    assert read_id_list(tmp_path / "list.parquet", pa.string()) == {"way/1": {"way/1"}, "way/2": {"way/2"}}
