"""What a takedown says of values outside the ids' own column and of files of others, its list, and its hashes."""

import base64
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset
from published_models import read_dataset

from pipeline.embeddings_dataset import deletions
from pipeline.embeddings_dataset.columns import hash_ids
from publish_model import aggregate_embeddings, verify_embeddings
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


def test_each_dataset_has_hashes_of_its_own(delete, tmp_path):
    """A table of the hashes of all ids that can be counted through fits no dataset."""
    contents = []
    for name in ("one", "two"):
        output = write_dataset(tmp_path / name, pa.array([1, 2, 3]), unit_rows(0, 3))
        assert delete(output, "2", "3").code == 0
        contents.append(json.loads((output / "_deleted" / "id_hashes.json").read_text()))
    assert {len(one["salt"]) for one in contents} == {32}
    assert contents[0]["salt"] != contents[1]["salt"]
    first, second = (np.frombuffer(base64.b64decode(one["id_hashes"]), "<u8").tolist() for one in contents)
    assert set(first).isdisjoint(second)
    assert set(first).isdisjoint(hash_ids([1, 2, 3]))
    salted = hash_ids([2, 3], bytes.fromhex(contents[0]["salt"]))
    assert first == sorted(salted)
    order = deletions.read_order(tmp_path / "one")
    assert order.find([1, 2, 3, "3", b"2", None]).tolist() == [False, True, True, True, True, False]


def test_what_was_set_aside_goes_and_what_is_not_ours_stays(delete, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array(["way/1", "way/2"]), unit_rows(0, 2))
    aside, foreign = output / "_removed" / "1" / "parts", output / "_removed" / "mine" / "parts"
    for folder in (aside, foreign):
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"OSMID": ["way/1"]}), folder / "rg00000_rb00001.parquet")
    mine = output / "_aggregated" / "by_city.parquet"
    shutil.copytree(foreign, mine.parent)
    (mine.parent / "rg00000_rb00001.parquet").rename(mine)
    for _ in range(2):
        outcome = delete(output, "way/1")
        assert outcome.code == 1
        assert [path.name for path in (output / "_removed").iterdir()] == ["mine"]
        for path in (foreign / "rg00000_rb00001.parquet", mine):
            assert f"{path}: not written by this project: it stays" in outcome.stderr
            assert path.exists()
        assert "the ids are gone but for 2 files or datasets that are not its own" in outcome.stderr.splitlines()[-1]
    (foreign / "rg00000_rb00001.parquet").unlink()
    mine.unlink()
    assert delete(output, "way/1").code == 0


def test_a_dataset_may_be_the_current_folder(delete, run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(write_dataset(tmp_path / "out", pa.array(["a", "b"]), unit_rows(0, 2)))
    assert run_main(aggregate_embeddings.main, ".").code == 0
    assert run_main(verify_embeddings.main, ".", "--repair").code == 0
    assert delete(".", "a").code == 0
    assert read_dataset(tmp_path / "out")["OSMID"].to_pylist() == ["b"]
