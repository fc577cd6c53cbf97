"""Taking ids out of a dataset: gone everywhere, for good, whenever it is killed."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset
from published_models import list_parts, make_photographs, read_bytes, read_dataset, write_packaged
from stage8_fixtures import read_state

from publish_model import delete_ids, verify_embeddings
from publish_model.dataset import parts


@pytest.fixture
def delete(run_main, tmp_path):
    def run(output, *ids):
        (tmp_path / "ids.txt").write_text("".join(f"{one}\n" for one in ids))
        return run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.txt")

    return run


@pytest.fixture
def dataset(embed, tmp_path):
    """A dataset of 20 photographs of 10 ids; way/1 has a reject, way/2 an invalid row."""
    images = make_photographs(20)
    images[3] = None
    source = write_packaged(
        tmp_path / "in.parquet", images, row_group_size=10, is_valid=[row != 5 for row in range(20)]
    )
    assert embed(source, tmp_path / "out").code == 0
    return tmp_path / "out"


def find_text(folder, text):
    """Return the files below a folder, logs apart, whose rows or footers hold a text."""
    found = []
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            if text in str(table.to_pylist()) or text.encode() in b"".join((table.schema.metadata or {}).values()):
                found.append(path)
        elif path.suffix == ".json" and text in path.read_text():
            found.append(path)
    return found


def test_the_ids_are_gone_from_parts_rejects_and_state(delete, run_main, dataset, tmp_path):
    before = read_dataset(dataset)
    untouched = list_parts(dataset)[4].read_bytes()
    outcome = delete(dataset, "way/1", "way/2", "way/777")
    assert (outcome.code, outcome.stdout) == (0, f"{dataset}\n")
    assert "3 rows deleted; 3 ids are left out from now on" in outcome.stderr
    after = read_dataset(dataset)
    kept = [row for row in before.to_pylist() if row["OSMID"] not in ("way/1", "way/2")]
    assert after.to_pylist() == kept
    for one in ("way/1'", "way/2'"):
        assert find_text(dataset, one) == []
    assert list_parts(dataset)[4].read_bytes() == untouched
    state = read_state(dataset)
    assert (state["rows_embedded"], state["rows_rejected"], state["rows_skipped_invalid"], state["rows_deleted"]) == (
        16,
        0,
        1,
        3,
    )
    assert (state["complete"], state["rejected_by_reason"]) == (True, {})
    outcome = run_main(verify_embeddings.main, dataset, "--input", tmp_path / "in.parquet")
    assert outcome.code == 0, outcome.stderr


def test_a_rerun_deletes_nothing_more_and_a_second_list_adds_to_the_first(delete, dataset):
    assert delete(dataset, "way/1").code == 0
    before = read_bytes(dataset)
    outcome = delete(dataset, "way/1")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "0 rows deleted" in outcome.stderr
    assert read_bytes(dataset) == before
    assert "2 rows deleted; 2 ids" in delete(dataset, "way/9").stderr


def test_parts_that_are_made_again_leave_the_ids_out(delete, embed, dataset, tmp_path):
    assert delete(dataset, "way/1", "way/9").code == 0
    before, state = read_bytes(dataset), read_state(dataset)
    for path in list_parts(dataset):
        path.unlink()
    assert embed(tmp_path / "in.parquet", dataset).code == 0
    assert read_bytes(dataset) == before
    assert read_state(dataset) == state
    assert embed(tmp_path / "in.parquet", dataset, "--overwrite").code == 0
    assert read_bytes(dataset) == before


def test_killed_at_each_write_a_rerun_finishes_and_stage_8_waits_for_it(delete, embed, dataset, tmp_path, monkeypatch):
    undisturbed = None
    plain = parts.write_parquet
    original = read_bytes(dataset)
    state = (dataset / "state.json").read_bytes()
    for stop_at in (None, 1, 2, 3, 4):
        for name, data in original.items():
            (dataset / name).write_bytes(data)
        (dataset / "state.json").write_bytes(state)
        (dataset / "_deleted" / "id_hashes.json").unlink(missing_ok=True)
        written = []

        def write(*arguments, written=written, stop_at=stop_at):
            written.append(arguments[0])
            if len(written) == stop_at:
                raise KeyboardInterrupt
            plain(*arguments)

        monkeypatch.setattr(parts, "write_parquet", write)
        outcome = delete(dataset, "way/1", "way/9")
        monkeypatch.setattr(parts, "write_parquet", plain)
        if stop_at is None:
            undisturbed = read_bytes(dataset)
            assert len(written) == 4
            continue
        assert outcome.code == 130
        refused = embed(tmp_path / "in.parquet", dataset)
        assert refused.code == 1
        assert "a deletion of ids was interrupted: run delete_ids.py again" in refused.stderr.splitlines()[-1]
        assert delete(dataset, "way/1", "way/9").code == 0
        assert read_bytes(dataset) == undisturbed
        assert read_state(dataset)["rows_deleted"] == 4


def test_what_was_made_of_the_dataset_is_removed_with_them(delete, dataset):
    (dataset / "_exports" / "int8").mkdir(parents=True)
    assert delete(dataset, "way/777").code == 0
    assert (dataset / "_exports").is_dir()
    outcome = delete(dataset, "way/1")
    assert "_exports: removed, as it was made with the ids" in outcome.stderr
    assert not (dataset / "_exports").exists()


@pytest.mark.parametrize(
    ("ids", "lines", "left"),
    [
        (pa.array([1, 2, 3], pa.int32()), ["2"], [1, 3]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "", " b "], []),
        (pa.array(["a", None, "b"]), ["b"], ["a", None]),
    ],
)
def test_a_list_of_text_takes_the_type_of_the_ids(delete, tmp_path, ids, lines, left):
    output = write_dataset(tmp_path / "out", ids, unit_rows(0, 3))
    assert delete(output, *lines).code == 0
    table = read_dataset(output)
    assert (table["OSMID"].to_pylist(), table["OSMID"].type) == (left, ids.type)


def test_a_list_may_be_a_parquet(run_main, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array([1, 2, 3]), unit_rows(0, 3))
    pq.write_table(pa.table({"OSMID": pa.array([3, 1], pa.int16())}), tmp_path / "ids.parquet")
    assert run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.parquet").code == 0
    assert read_dataset(output)["OSMID"].to_pylist() == [2]


def test_lists_that_cannot_be_used_are_one_line(delete, run_main, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array([1, 2, 3]), unit_rows(0, 3))
    for ids, text in ((["way/1"], "not all of its ids are int64"), ([], "holds no ids")):
        outcome = delete(output, *ids)
        assert outcome.code == 1
        assert text in outcome.stderr.splitlines()[-1]
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path / "none.txt")
    assert "none.txt: cannot be read" in outcome.stderr.splitlines()[-1]
    assert "no embeddings dataset" in run_main(delete_ids.main, tmp_path / "none", "--delete-ids", "x").stderr
    assert not (output / "_deleted").exists()


def test_a_damaged_order_stops_stage_8_rather_than_bring_rows_back(delete, embed, dataset, tmp_path):
    assert delete(dataset, "way/1").code == 0
    (dataset / "_deleted" / "id_hashes.json").write_text(json.dumps({"done": True}))
    outcome = embed(tmp_path / "in.parquet", dataset)
    assert outcome.code == 1
    assert "id_hashes.json: damaged" in outcome.stderr.splitlines()[-1]
