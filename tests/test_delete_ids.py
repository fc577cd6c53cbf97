"""Taking ids out of a dataset: gone everywhere, for good, whenever it is killed."""

import json
import re
import unicodedata
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset
from published_models import list_parts, read_bytes, read_dataset
from stage8_fixtures import read_state

from pipeline.embeddings_dataset import deletions, parts
from publish_model import delete_ids, verify_embeddings


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
    outcome = delete(dataset, "way/1", "way/2")
    assert (outcome.code, outcome.stdout) == (0, f"{dataset}\n")
    assert "3 rows deleted; the 2 ids of the list are left out from now on" in outcome.stderr
    after = read_dataset(dataset)
    kept = [row for row in before.to_pylist() if row["OSMID"] not in ("way/1", "way/2")]
    assert after.to_pylist() == kept
    for one in ("way/1'", "way/2'"):
        assert find_text(dataset, one) == []
    assert list_parts(dataset)[4].read_bytes() == untouched
    state = read_state(dataset)
    assert [state[f"rows_{one}"] for one in ("embedded", "rejected", "skipped_invalid", "deleted")] == [16, 0, 1, 3]
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
    assert "2 rows deleted; the 1 ids" in delete(dataset, "way/9").stderr


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


@pytest.mark.parametrize("damage", ["part", "rejects", "mixed"])
def test_a_killed_takedown_of_broken_files_can_be_finished(delete, run_main, dataset, monkeypatch, damage):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(deletions, "_rewrite", die)
    assert delete(dataset, "way/1").code == 130
    monkeypatch.undo()
    path, other = list_parts(dataset)[:2]
    broken = path if damage == "part" else dataset / "_rejects" / path.name
    broken.write_bytes((dataset / "_rejects" / other.name).read_bytes() if damage == "mixed" else b"PAR1")
    stopped = delete(dataset, "way/1")
    assert (stopped.code, str(broken) in stopped.stderr.splitlines()[-1]) == (1, True)
    if damage == "mixed":
        assert f"remove it and {path}, run this again" in stopped.stderr
    repair = run_main(verify_embeddings.main, dataset, "--repair")
    assert "remove that and the file of its name in parts/ or _rejects/ first" in repair.stderr.splitlines()[-1]
    path.unlink()
    (dataset / "_rejects" / path.name).unlink()
    assert delete(dataset, "way/1").code == 0
    assert run_main(verify_embeddings.main, dataset, "--repair").code == 0
    assert find_text(dataset, "way/1") == []


def test_what_was_made_of_the_dataset_is_removed_with_them(delete, dataset):
    (dataset / "_clusters").mkdir()
    (dataset / "_clusters" / "clusters.json").write_text('{"tool": "cluster_embeddings"}')
    assert delete(dataset, "way/777").code == 1
    assert (dataset / "_clusters").is_dir()
    outcome = delete(dataset, "way/1")
    assert "_clusters: removed, as it was made with the ids" in outcome.stderr
    assert not (dataset / "_clusters").exists()


@pytest.mark.parametrize(
    ("ids", "lines", "left"),
    [
        (pa.array([1, 2, 3], pa.int32()), ["2"], [1, 3]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "", "b"], []),
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
    outcome = delete(write_dataset(tmp_path / "other", pa.array([1, 2, 3]), unit_rows(0, 3)), "way/1", "01", "way/1")
    assert (outcome.code, "2 of its 2 ids match nothing" in outcome.stderr.splitlines()[-1]) == (1, True)
    assert read_dataset(tmp_path / "other")["OSMID"].to_pylist() == [1, 2, 3]
    for ids, text in (([" "], "holds no ids"), ([], "holds no ids")):
        outcome = delete(output, *ids)
        assert outcome.code == 1
        assert text in outcome.stderr.splitlines()[-1]
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path / "none.txt")
    assert "none.txt: cannot be read" in outcome.stderr.splitlines()[-1]
    assert "no embeddings dataset" in run_main(delete_ids.main, tmp_path / "none", "--delete-ids", "x").stderr
    assert not (output / "_deleted").exists()


def test_a_damaged_order_stops_stage_8_rather_than_bring_rows_back(delete, embed, dataset, tmp_path):
    assert delete(dataset, "way/1").code == 0
    path = dataset / "_deleted" / "id_hashes.json"
    order = json.loads(path.read_text())
    for damaged in ({"done": True}, order | {"salt": "00" * 65}, order | {"salt": ""}, order | {"id_hashes": "AAAA"}):
        path.write_text(json.dumps(damaged))
        outcome = embed(tmp_path / "in.parquet", dataset)
        assert (outcome.code, "id_hashes.json: damaged" in outcome.stderr.splitlines()[-1]) == (1, True)


def write_strings(folder, *ids):
    return write_dataset(folder, pa.array(ids), unit_rows(0, len(ids)))


LISTS = {
    "a byte-order mark": ("ids.txt", "\ufeffway/1\nway/2\n".encode()),
    "windows' line ends": ("ids.txt", b"way/1\r\nway/2\r\n"),
    "a csv with reasons": ("ids.csv", b'OSMID,reason\nway/1,"asked, twice"\nway/2,\n'),
    "a csv of old macs": ("ids.csv", b"OSMID,reason\rway/1,x\rway/2,y\r"),
    "blank lines": ("ids.txt", b"\n\nway/1\n  \n\nway/2\n\n"),
    "a csv with blanks": ("ids.csv", b"reason , OSMID \nx ,way/1\ny ,way/2\n"),
    "columns parted by tabs": ("ids.tsv", b"OSMID\treason\nway/1\tx\nway/2\ty\n"),
    "a csv with outlines": ("ids.csv", b'outline,OSMID\n"' + b"0 1," * 50_000 + b'",way/1\n,way/2\n'),
    "a csv of another country with a mark": ("ids.csv", "\ufeffreason;OSMID\nno;way/1\nno;way/2\n".encode()),
}


@pytest.mark.parametrize("kind", LISTS)
def test_every_id_of_a_list_is_deleted_however_the_list_was_written(run_main, tmp_path, kind):
    name, data = LISTS[kind]
    output = write_strings(tmp_path / "out", "way/1", "way/2", "way/3")
    (tmp_path / name).write_bytes(data)
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path / name)
    assert outcome.code == 0, outcome.stderr
    assert read_dataset(output)["OSMID"].to_pylist() == ["way/3"]


@pytest.mark.parametrize("name", ["ids.txt", "ids.csv"])
def test_a_list_in_utf_16_deletes_nothing(run_main, tmp_path, name):
    output = write_strings(tmp_path / "out", "way/1", "way/2")
    (tmp_path / name).write_text("OSMID\nway/1\n", encoding="utf-16")
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path / name)
    assert (outcome.code, f"{name}: not a CSV or text in UTF-8" in outcome.stderr) == (1, True)


@pytest.mark.parametrize(
    "ids",
    [pa.array([1, 2, 3], pa.time64("ns")), pa.array([b"a\x01", rb"a\x01", b"b"])],
    ids=["nanoseconds", "control characters"],
)
def test_ids_of_a_list_that_read_alike_are_all_deleted(run_main, tmp_path, ids):
    output = write_dataset(tmp_path / "out", ids, unit_rows(0, 3))
    pq.write_table(pa.table({"OSMID": ids[:2]}), tmp_path / "list.parquet")
    assert run_main(delete_ids.main, output, "--delete-ids", tmp_path / "list.parquet").code == 0
    assert read_dataset(output)["OSMID"].combine_chunks().equals(ids[2:])


def test_a_list_with_two_id_columns_deletes_nothing(run_main, tmp_path):
    output = write_strings(tmp_path / "out", "way/1", "way/2")
    (tmp_path / "ids.csv").write_text("OSMID,OSMID\nway/1,way/2\n")
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.csv")
    assert (outcome.code, "more than one column OSMID" in outcome.stderr) == (1, True)
    table = pa.Table.from_arrays([pa.array(["way/1"]), pa.array(["way/2"])], names=["OSMID", "OSMID"])
    pq.write_table(table, tmp_path / "ids.parquet")
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.parquet")
    assert (outcome.code, "more than one column OSMID" in outcome.stderr) == (1, True)
    assert read_dataset(output)["OSMID"].to_pylist() == ["way/1", "way/2"]


@pytest.mark.parametrize("name", ["ids.parquet", "ids.csv"])
def test_a_list_of_pandas_with_one_id_missing_names_whole_numbers(run_main, tmp_path, name):
    output = write_dataset(tmp_path / "out", pa.array([1, 1234567890123, 3]), unit_rows(0, 3))
    if name == "ids.csv":
        (tmp_path / name).write_text("OSMID\n1.0\n\n1234567890123.0\n")
    else:
        pq.write_table(pa.table({"OSMID": [1.0, float("nan"), 1234567890123.0]}), tmp_path / name)
    assert run_main(delete_ids.main, output, "--delete-ids", tmp_path / name).code == 0
    assert read_dataset(output)["OSMID"].to_pylist() == [3]


def test_rows_of_a_csv_that_name_no_id_are_counted(run_main, tmp_path):
    output = write_strings(tmp_path / "out", "way/1", "way/2")
    (tmp_path / "ids.csv").write_text("reason,OSMID\nx,way/1\ny\nz,\n")
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.csv")
    assert (outcome.code, "ids.csv: row 2 below the names has 1 values for 2 columns" in outcome.stderr) == (1, True)
    (tmp_path / "ids.csv").write_text("reason,OSMID\nx,way/1\ny,\nz,\n")
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.csv")
    assert (outcome.code, "ids.csv: 2 rows without an id are passed over" in outcome.stderr) == (0, True)
    assert read_dataset(output)["OSMID"].to_pylist() == ["way/2"]


def test_a_list_that_is_a_folder_is_not_called_text_of_another_kind(run_main, tmp_path):
    output = write_strings(tmp_path / "out", "way/1")
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path)
    assert (outcome.code, "UTF-8" in outcome.stderr) == (1, False)
    assert f"error: {tmp_path}: cannot be read (Is a directory): correct the path" in outcome.stderr


def test_a_listed_name_is_the_id_that_is_written_so_and_no_other(delete, tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Caf\u00e9.jpg") for form in ("NFC", "NFD"))
    output = write_strings(tmp_path / "out", composed, decomposed, " 7", "7", "\\n", "\n", '"x"', "x", "0x78")
    for _ in range(2):  # a rerun takes no more
        assert delete(output, decomposed, " 7", "\\n", '"x"').code == 0
        assert read_dataset(output)["OSMID"].to_pylist() == [composed, "7", "\n", "x", "0x78"]
    outcome = delete(output, "7 ", "0x78")
    assert (outcome.code, "1 of its 2 ids match nothing" in outcome.stderr) == (1, True)
    assert "('7 ')" in outcome.stderr
    assert read_dataset(output)["OSMID"].to_pylist() == [composed, "7", "\n", "x"]


def test_ids_with_line_breaks_of_any_kind_are_deleted(run_main, tmp_path):
    ids = ["a\u2028b", "c\u0085d", "e\nf", " g", "x"]
    output = write_strings(tmp_path / "out", *ids)
    (tmp_path / "ids.txt").write_text("a\u2028b\nc\u0085d\n g\n", encoding="utf-8", newline="")
    assert run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.txt").code == 0
    assert read_dataset(output)["OSMID"].to_pylist() == ["e\nf", "x"]
    (tmp_path / "ids.txt").write_text("e\rx", newline="")
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.txt")
    assert "has carriage returns and no line feed" in outcome.stderr
    (tmp_path / "ids.csv").write_text('OSMID\n"e\nf"\n', encoding="utf-8", newline="")
    assert run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.csv").code == 0
    assert read_dataset(output)["OSMID"].to_pylist() == ["x"]


def test_ids_that_match_nothing_are_said_and_make_exit_code_1(delete, run_main, tmp_path):
    output = write_strings(tmp_path / "out", "way/1", "way/2")
    for rows in (1, 0):  # a rerun says it again, and does not say it of what the first run has deleted
        outcome = delete(output, "way/1", "way/7", "weg/2")
        assert outcome.code == 1
        assert f"{rows} rows deleted" in outcome.stderr
        assert re.search(r"2 of its 3 ids match nothing.*\('way/7', 'weg/2'\)", outcome.stderr.splitlines()[-1])
        assert read_dataset(output)["OSMID"].to_pylist() == ["way/2"]
    arguments = [output, "--delete-ids", tmp_path / "ids.txt", "--allow-missing"]
    assert run_main(delete_ids.main, *arguments).code == 0


def test_a_list_without_an_id_column_is_one_line(run_main, tmp_path):
    output = write_strings(tmp_path / "out", "a", "b")
    (tmp_path / "ids.csv").write_text("id,reason\na,x\n")
    outcome = run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.csv")
    assert outcome.code == 1
    assert "no column OSMID: name the column of ids OSMID" in outcome.stderr.splitlines()[-1]


def test_rows_without_an_id_are_not_deleted_by_a_list_with_a_hole(run_main, tmp_path):
    """pandas makes floats with NaN of numbers of which one is missing."""
    output = write_dataset(tmp_path / "out", pa.array([1.0, float("nan"), None, 4.0]), unit_rows(0, 4))
    pq.write_table(pa.table({"OSMID": [4.0, float("nan"), None]}), tmp_path / "ids.parquet")
    assert run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.parquet").code == 0
    assert str(read_dataset(output)["OSMID"].to_pylist()) == "[1.0, nan, None]"


VIEWS = {
    "text": (pa.string_view(), ["a", "b", None, "a"]),
    "bytes": (pa.binary_view(), [b"a", b"b", None, b"a"]),
    "list": (pa.list_(pa.string_view()), [["a"], [], None, ["b", "c"]]),
    "struct": (pa.struct([("x", pa.string_view())]), [{"x": "a"}, {"x": None}, None, {"x": "b"}]),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_views_in_kept_columns_and_ids_do_not_stop_a_takedown(delete, tmp_path, kind):
    view, values = VIEWS[kind]
    ids = pa.array(["a", "b", "c", "d"], pa.string_view())
    output = write_dataset(tmp_path / "out", ids, unit_rows(0, 4), k=pa.array(values, view))
    outcome = delete(output, "b", "d")
    assert outcome.code == 0, outcome.stderr
    table = read_dataset(output)
    assert table.select(["OSMID", "k"]).to_pylist() == [{"OSMID": "a", "k": values[0]}, {"OSMID": "c", "k": values[2]}]


UUIDS = [uuid.UUID(int=number) for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("ids", "line"),
    [
        (pa.ExtensionArray.from_storage(pa.uuid(), pa.array([one.bytes for one in UUIDS], pa.binary(16))), UUIDS[1]),
        (pa.array([one.bytes for one in UUIDS], pa.binary(16)), UUIDS[1]),
        (pa.array([b"\xff\x00", b"\xfe", b"c"]), "0xfe"),
        (pa.array([b"a", b"way/1", b"c"]), "way/1"),
        (pa.array([1, 2, 3], pa.timestamp("us")), "1970-01-01 00:00:00.000002"),
    ],
)
def test_a_text_list_names_uuids_binary_ids_and_times(delete, tmp_path, ids, line):
    output = write_dataset(tmp_path / "out", ids, unit_rows(0, 3))
    assert delete(output, line).code == 0
    assert read_dataset(output)["OSMID"].combine_chunks().equals(pa.concat_arrays([ids.slice(0, 1), ids.slice(2)]))


def test_overwriting_a_dataset_whose_deletion_was_killed_applies_the_deletion(delete, embed, dataset, tmp_path):
    expected = None
    assert delete(dataset, "way/1", "way/9").code == 0
    expected = read_bytes(dataset)
    order = dataset / "_deleted" / "id_hashes.json"
    assert embed(tmp_path / "in.parquet", dataset, "--overwrite").code == 0
    order.write_text(json.dumps(json.loads(order.read_text()) | {"done": False}))
    assert embed(tmp_path / "in.parquet", dataset).code == 1
    outcome = embed(tmp_path / "in.parquet", dataset, "--overwrite")
    assert outcome.code == 0, outcome.stderr
    assert read_bytes(dataset) == expected
    assert json.loads(order.read_text())["done"] is True
    assert not (dataset / "_removed").exists()
    assert embed(tmp_path / "in.parquet", dataset).code == 0
