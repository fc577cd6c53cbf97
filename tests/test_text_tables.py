"""Ids in the CSVs, lists and parquets of other programs: never taken for numbers that they are not."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset
from published_models import read_dataset

from pipeline.errors import InputError
from pipeline.files import tables, text_tables
from pipeline.files.text_tables import read_csv, read_id_table, whole_or_text
from pipeline.retrieval.labels import label_rows, read_ignore_pairs
from preprocess_raw_data.merging.splits import read_split_file
from publish_model import aggregate_embeddings, delete_ids

AS_TEXT = ["0123", "+5", " 7", "7 ", "-0", "1e5", "1.0", "٣", "1_000", "0x1F", "nan", "9223372036854775808", "1,5"]


@pytest.mark.parametrize("text", AS_TEXT)
def test_what_an_int64_does_not_print_keeps_the_whole_column_text(tmp_path, text):
    (tmp_path / "x.csv").write_text(f'OSMID\n8\n"{text}"\n-12\n', encoding="utf-8")
    column = whole_or_text(read_csv(tmp_path / "x.csv", ["OSMID"], "")["OSMID"])
    assert (column.type, column.to_pylist()) == (pa.string(), ["8", text, "-12"])


def test_whole_numbers_as_an_int64_prints_them_are_int64_and_blank_ones_null(tmp_path):
    (tmp_path / "x.csv").write_text("OSMID,a\n-9223372036854775808,\n9223372036854775807,1\n,2\n \t,2\n0,3\n")
    column = whole_or_text(read_csv(tmp_path / "x.csv", ["OSMID"], "")["OSMID"])
    assert (column.type, column.to_pylist()) == (pa.int64(), [-(2**63), 2**63 - 1, None, None, 0])


def test_ids_as_a_spreadsheet_rounds_them_are_said_to_be_so(tmp_path, caplog):
    (tmp_path / "x.csv").write_text("OSMID,of\n9.74962E+18,1\n1e5,1.5E+7\n")
    assert read_csv(tmp_path / "x.csv", ["OSMID"], "", others=True)["OSMID"].to_pylist() == ["9.74962E+18", "1e5"]
    assert [record.getMessage().partition("x.csv: ")[2][:12] for record in caplog.records] == ["column OSMID"]


def test_a_quoted_name_says_nothing_of_the_separator(tmp_path):
    (tmp_path / "x.csv").write_text('OSMID;path;"a,b,c,d"\n1;x;y\n')
    assert read_csv(tmp_path / "x.csv", ["OSMID"], "", others=True).column_names == ["OSMID", "path", "a,b,c,d"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_blanks_around_names_and_fields_of_megabytes_are_read(tmp_path, delimiter):
    lines = [["OSMID", " path "], ["1", "x" * 3_000_000], ["2", '"a\nb"']]
    (tmp_path / "x.csv").write_text("\n\n".join(delimiter.join(line) for line in lines))
    table = read_csv(tmp_path / "x.csv", ["OSMID", "path"], "")
    assert table.to_pydict() == {"OSMID": ["1", "2"], "path": ["x" * 3_000_000, "a\nb"]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a,b\n1\n", "row 1 below the names has 1 values for 2 columns"),
        ("a,b\n1,2\n1,2,3\n", "row 2 below the names has 3 values for 2 columns"),
        ("a\n1\n", "no column b: give it"),
        ("a,b,b\n1,2,3\n", "more than one column b: give it"),
        ('a,b\n1,"2\n', "not a CSV or text in UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_used_is_named(tmp_path, content, problem):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(InputError, match=rf"x\.csv: {problem}"):
        read_csv(tmp_path / "x.csv", ["a", "b"], "give it")


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_floats_that_are_whole_numbers_are_taken_as_such_and_said(tmp_path, caplog, kind):
    pq.write_table(pa.table({"OSMID": pa.array([1, float("nan"), None, -2047], kind)}), tmp_path / "x.parquet")
    column = read_id_table(tmp_path / "x.parquet", ["OSMID"], "")["OSMID"]
    assert (column.type, column.to_pylist()) == (pa.int64(), [1, None, None, -2047])
    assert "column OSMID holds floats, which are all whole" in caplog.text


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.float64(), 1.5), (pa.float64(), 2.0**53), (pa.float64(), 9.749618424903893e18),
        (pa.float64(), float("inf")),
        (pa.float32(), 2.0**24), (pa.float16(), 2048.0),
    ],
)  # fmt: skip
def test_floats_in_which_two_ids_may_be_one_are_refused_with_the_remedy(tmp_path, kind, value):
    pq.write_table(pa.table({"OSMID": pa.array([1, value], kind)}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="column OSMID holds ids as floats.*write them anew as text or as int64"):
        read_id_table(tmp_path / "x.parquet", ["OSMID"], "")


def test_labels_overlaps_and_split_files_keep_ids_as_they_stand(tmp_path):
    (tmp_path / "labels.csv").write_text("OSMID;building_id\n1.10;007\n1.1;7\n1e5;1.0\n")
    assert label_rows(pa.array(["1.1", "1.10", "1e5", "100000"]), tmp_path / "labels.csv").to_pylist() == [
        "7", "007", "1.0", None,
    ]  # fmt: skip
    (tmp_path / "overlaps.csv").write_text("\ufeffbuilding_id_a, building_id_b,m\n1e5,10e4,3\n", encoding="utf-8")
    assert read_ignore_pairs(tmp_path / "overlaps.csv").to_pylist() == [
        {"building_id_a": "1e5", "building_id_b": "10e4"}
    ]
    (tmp_path / "split.csv").write_text("building_id;split\n1.10;train\n1.1;val\n")
    assert read_split_file(tmp_path / "split.csv") == {"1.10": "train", "1.1": "val"}


def test_labels_that_pandas_made_floats_are_whole_numbers_again_or_refused(tmp_path):
    table = pa.table({"OSMID": [1.0, 2.0], "building_id": [7.0, float("nan")]})
    pq.write_table(table, tmp_path / "labels.parquet")
    assert label_rows(pa.array(["2", "1"]), tmp_path / "labels.parquet").to_pylist() == [None, "7"]
    pq.write_table(pa.table({"OSMID": [1.0, 9.7e18], "building_id": ["a", "b"]}), tmp_path / "labels.parquet")
    with pytest.raises(InputError, match="column OSMID holds ids as floats"):
        label_rows(pa.array(["2", "1"]), tmp_path / "labels.parquet")


BIG = [9749618424903893992, 9749618424903893993, 9749618424903893901]


def take_out(run_main, output, path, content):
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        pq.write_table(pa.table({"OSMID": content}), path)
    return run_main(delete_ids.main, output, "--delete-ids", path)


@pytest.mark.parametrize("kind", [pa.uint64(), pa.string(), pa.decimal128(20, 0)])
def test_one_id_of_nineteen_digits_deletes_one_row(run_main, tmp_path, kind):
    ids = pa.array(map(str, BIG)).cast(kind)
    output = write_dataset(tmp_path / "out", ids, unit_rows(0, 3))
    assert take_out(run_main, output, tmp_path / "ids.csv", f"OSMID\n{BIG[1]}\n").code == 0
    assert read_dataset(output)["OSMID"].combine_chunks().equals(ids.take(pa.array([0, 2])))


@pytest.mark.parametrize("line", ["0123", "+123", "123.5", "1.23e2", "١٢٣", "1_23"])
def test_a_line_that_is_no_whole_number_deletes_none(run_main, tmp_path, line):
    output = write_dataset(tmp_path / "out", pa.array([123, 124]), unit_rows(0, 2))
    outcome = take_out(run_main, output, tmp_path / "ids.txt", f"{line}\n")
    assert (outcome.code, "1 of its 1 ids match nothing" in outcome.stderr) == (1, True)
    assert read_dataset(output)["OSMID"].to_pylist() == [123, 124]


@pytest.mark.parametrize(("name", "content"), [("ids.csv", "OSMID\n9007199254740994.0\n"), ("ids.parquet", [2.0**53])])
def test_a_list_of_floats_that_may_be_rounded_deletes_nothing(run_main, tmp_path, name, content):
    output = write_dataset(tmp_path / "out", pa.array([2**53, 2**53 + 2]), unit_rows(0, 2))
    outcome = take_out(run_main, output, tmp_path / name, content)
    assert (outcome.code, "write them anew as text or as int64" in outcome.stderr) == (1, True)
    assert read_dataset(output).num_rows == 2


def test_keys_of_by_that_are_floats_are_whole_numbers_or_refused(run_main, tmp_path):
    columns = {"year": [2020.0, float("nan"), 2020.0], "zone": [1.1, 1.1, 2.0], "code": ["1.1", "1.10", "1.1"]}
    output = write_dataset(tmp_path / "out", pa.array([7, 7, 7]), unit_rows(0, 3), **columns)
    assert run_main(aggregate_embeddings.main, output, "--by", "OSMID,year").code == 0
    groups = pq.read_table(output / "_aggregated" / "OSMID_year.parquet")
    assert (groups["year"].type, groups["year"].to_pylist()) == (pa.int64(), [2020, None])
    assert run_main(aggregate_embeddings.main, output, "--by", "OSMID,code").code == 0
    groups = pq.read_table(output / "_aggregated" / "OSMID_code.parquet").to_pylist()
    assert [(group["code"], group["num_images"]) for group in groups] == [("1.1", 2), ("1.10", 1)]
    outcome = run_main(aggregate_embeddings.main, output, "--by", "OSMID,zone")
    assert (outcome.code, "--by: column zone holds ids as floats, such as" in outcome.stderr) == (1, True)
    assert not (output / "_aggregated" / "OSMID_zone.parquet").exists()


def test_an_id_of_blanks_is_one_in_a_parquet(run_main, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array(["", " ", "a"]), unit_rows(0, 3))
    assert take_out(run_main, output, tmp_path / "ids.parquet", [" "]).code == 0
    assert read_dataset(output)["OSMID"].to_pylist() == ["", "a"]


@pytest.mark.parametrize("as_text", [False, True])
def test_a_list_that_unfolds_beyond_memory_is_one_line_before_it_does(tmp_path, monkeypatch, as_text):
    for module in (tables, text_tables):
        monkeypatch.setattr(module, "BATCH_BYTES", 2**20)
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array(["A" * 2**16]))
    column = values.cast(pa.string()) if as_text else values
    pq.write_table(pa.table({"OSMID": column}), tmp_path / "ids.parquet")
    with pytest.raises(InputError, match=r"ids\.parquet: 45 rows take \d+ bytes of ids"):
        read_id_table(tmp_path / "ids.parquet", ["OSMID"], "")
