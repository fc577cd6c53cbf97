"""What stage 8 takes beside one parquet file: folders of parquets; photographs once packaged; columns; memory."""

import datetime
import os
import subprocess
import sys
from decimal import Decimal
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from package_fixtures import read_package
from package_fixtures import read_rejects as read_package_rejects
from package_fixtures import run as run_package
from published_models import list_parts, make_photographs, read_bytes, read_dataset, read_rejects, write_packaged
from stage8_fixtures import read_state

from pipeline.embeddings_dataset.packaged_input import InputOptions, list_data, open_input
from pipeline.files import listing
from pipeline.log import logger
from publish_model import verify_embeddings

REPO = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------------------ folders of parquets


@pytest.fixture
def parquets(tmp_path):
    """Three files of 12, 7 and 5 rows, one of them in a folder below, beside what is not data."""
    images = make_photographs(24)
    images[13] = None
    folder = tmp_path / "packaged"
    for name, start, end in (("a.parquet", 0, 12), ("b.parquet", 12, 19), ("c/d.parquet", 19, 24)):
        write_packaged(folder / name, images[start:end], 5, OSMID=[f"way/{row}" for row in range(start, end)])
    write_packaged(folder / ".hidden.parquet", images[:1])
    write_packaged(folder / "_rejects" / "x.parquet", images[:1])
    return folder


def test_a_folder_of_parquets_is_one_input_in_order_of_names(embed, run_main, parquets, tmp_path):
    assert embed(parquets, tmp_path / "out").code == 0
    table = read_dataset(tmp_path / "out")
    assert table["OSMID"].to_pylist() == [f"way/{row}" for row in range(24) if row != 13]
    assert read_rejects(tmp_path / "out") == {13: "missing_image"}
    assert read_state(tmp_path / "out")["rows_total"] == 24
    one = write_packaged(tmp_path / "one.parquet", make_photographs(24), OSMID=[f"way/{row}" for row in range(24)])
    assert embed(one, tmp_path / "other").code == 0
    for row in read_dataset(tmp_path / "other").to_pylist():
        if row["OSMID"] != "way/13":
            found = next(other for other in table.to_pylist() if other["OSMID"] == row["OSMID"])
            assert found["embedding"] == pytest.approx(row["embedding"], abs=1e-5)
    assert run_main(verify_embeddings.main, tmp_path / "out", "--input", parquets).code == 0


def test_shards_of_a_folder_make_what_one_process_makes(embed, parquets, tmp_path):
    assert embed(parquets, tmp_path / "one").code == 0
    for index in range(3):
        assert embed(parquets, tmp_path / "many", "--shard", f"{index}/3").code == 0
    assert read_bytes(tmp_path / "many") == read_bytes(tmp_path / "one")


def test_the_same_folder_elsewhere_is_the_same_input_and_a_file_more_is_another(embed, parquets, tmp_path):
    assert embed(parquets, tmp_path / "out").code == 0
    moved = parquets.rename(tmp_path / "moved")
    assert "nothing redone" in embed(moved, tmp_path / "out").stderr
    write_packaged(moved / "z.parquet", make_photographs(1))
    outcome = embed(moved, tmp_path / "out")
    assert outcome.code == 1
    assert "input_size was" in outcome.stderr.splitlines()[-1]


def test_files_whose_columns_differ_are_refused_and_named(embed, parquets, tmp_path):
    write_packaged(parquets / "z.parquet", make_photographs(2), OSMID=[1, 2])
    outcome = embed(parquets, tmp_path / "out")
    assert outcome.code == 1
    assert "z.parquet: column OSMID is int64, in a.parquet it is string" in outcome.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("mark", "name"),
    [("_delta_log/0.json", "Delta"), (".hoodie/x.properties", "Hudi"), ("metadata/v1.metadata.json", "Iceberg")],
)
def test_a_table_whose_files_may_be_deleted_ones_is_refused_by_name(embed, parquets, tmp_path, mark, name):
    (tmp_path / "lake").mkdir()
    table = parquets.rename(tmp_path / "lake" / "table")
    (table / mark).parent.mkdir()
    (table / mark).write_text("{}")
    for place in (table, table.parent, table / "c"):
        outcome = embed(place, tmp_path / "out")
        assert outcome.code == 1
        assert f"{table}: a {name} table" in outcome.stderr
        assert "write the rows to embed as plain parquet files" in outcome.stderr


def test_the_keys_of_hive_folders_are_kept_where_asked_for_and_said_else(embed, run_main, tmp_path):
    folder = tmp_path / "hive"
    for number, place in enumerate(
        ("year=2021/city=A%20b", "year=2020/city=c", "year=2020/city=__HIVE_DEFAULT_PARTITION__")
    ):
        write_packaged(folder / place / "x.parquet", make_photographs(2), OSMID=[2 * number, 2 * number + 1])
    logger.addHandler(records := QueueHandler(SimpleQueue()))
    outcome = embed(folder, tmp_path / "none")
    logger.removeHandler(records)
    said = [records.queue.get().getMessage() for _ in range(records.queue.qsize())]
    assert sum("its folders name" in line for line in said) == 1
    assert "its folders name year,city: give --keep-columns year,city to keep it as a column" in outcome.stderr
    assert embed(folder, tmp_path / "out", "--keep-columns", "year,city").code == 0
    table = read_dataset(tmp_path / "out")
    assert (table["year"].type, table["city"].type) == (pa.int64(), pa.string())
    assert table.select(["OSMID", "year", "city"]).to_pydict() == {
        "OSMID": [4, 5, 2, 3, 0, 1], "year": [2020] * 4 + [2021] * 2, "city": [None, None, "c", "c", "A b", "A b"],
    }  # fmt: skip
    assert run_main(verify_embeddings.main, tmp_path / "out", "-i", folder).code == 0
    (folder / "year=2021").rename(folder / "year=2022")
    assert "row_group_fingerprint was" in embed(folder, tmp_path / "out", "--keep-columns", "year,city").stderr
    write_packaged(folder / "y.parquet", make_photographs(1), OSMID=[7])
    assert "column year is missing" in embed(folder, tmp_path / "other", "--keep-columns", "year").stderr
    write_packaged(tmp_path / "both/year=2020/x.parquet", make_photographs(2), OSMID=[1, 2], year=[1999, 2020])
    outcome = embed(tmp_path / "both", tmp_path / "twice", "--keep-columns", "year")
    assert "its folders name year: give --keep-columns year to keep it as a column, unless the files" in outcome.stderr
    assert read_dataset(tmp_path / "twice")["year"].to_pylist() == [1999, 2020]


def test_kept_names_that_differ_by_blanks_alone_are_refused(embed, tmp_path):
    source = write_packaged(
        tmp_path / "in.parquet", make_photographs(1), OSMID=[1], **{"year": [2000], "year ": [1900]}
    )
    outcome = embed(source, tmp_path / "out", "--keep-columns", "year ")
    assert (outcome.code, "year is there with blanks around its name too" in outcome.stderr) == (1, True)


def test_text_of_several_widths_in_one_folder_is_one_type(embed, parquets, tmp_path):
    write_packaged(parquets / "z.parquet", make_photographs(2), OSMID=pa.array(["x", "y"], pa.large_string()))
    assert embed(parquets, tmp_path / "out").code == 0
    table = read_dataset(tmp_path / "out")
    assert (table["OSMID"].type, table["OSMID"].to_pylist()[-2:]) == (pa.string(), ["x", "y"])


def test_float_ids_are_whole_numbers_or_refused_before_anything_is_made(embed, tmp_path):
    source = write_packaged(tmp_path / "in.parquet", make_photographs(3), OSMID=[1.0, float("nan"), 2.0])
    outcome = embed(source, tmp_path / "out")
    assert (outcome.code, "holds floats, which are all whole" in outcome.stderr) == (0, True)
    ids = read_dataset(tmp_path / "out")["OSMID"]
    assert (ids.type, ids.to_pylist()) == (pa.int64(), [1, None, 2])
    source = write_packaged(tmp_path / "big.parquet", make_photographs(3), 1, OSMID=[1.0, 9.749618424903893e18, 2.0])
    outcome = embed(source, tmp_path / "other")
    assert (outcome.code, "write them anew as text or as int64" in outcome.stderr) == (1, True)
    assert not (tmp_path / "other").exists()
    with open(source, "r+b") as file:
        file.seek(pq.ParquetFile(source).metadata.row_group(1).column(0).data_page_offset)
        file.write(b"\xff" * 20)
    outcome = embed(source, tmp_path / "other")
    assert (outcome.code, f"error: {source}: " in outcome.stderr.splitlines()[-1]) == (1, True)


# ------------------------------------------------------------------------------------------------ photographs


@pytest.fixture
def photographs(tmp_path):
    """Seven photographs in two folders, beside what is none."""
    folder = tmp_path / "photos"
    (folder / "b street").mkdir(parents=True)
    for number, image in enumerate(make_photographs(7)):
        (folder / ("b street" if number % 2 else "") / f"{number}.{'JPG' if number % 3 else 'jpeg'}").write_bytes(image)
    (folder / "notes.txt").write_text("no photograph")
    (folder / ".hidden.jpg").write_bytes(b"x")
    (folder / "bad.png").write_bytes(b"x")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "link.jpg").symlink_to("/etc/passwd")
    return folder


def test_photographs_are_packaged_first_and_the_path_below_the_folder_becomes_the_id(
    embed, run_main, photographs, tmp_path
):
    outcome = embed(photographs, tmp_path / "out")
    assert (outcome.code, "holds 9 photographs: package them first" in outcome.stderr.splitlines()[-1]) == (1, True)
    outcome = run_package(run_main, photographs, tmp_path / "packaged", "--max-reject-fraction", 1)
    assert outcome.code == 0
    said = "2 files are not photographs and are passed over (.jpg (a link) 1, .txt 1), as link.jpg (a link), notes.txt"
    assert said in outcome.stderr
    names = sorted(
        str(path.relative_to(photographs)) for path in photographs.rglob("*.[jJ]*") if path.name[0] not in ".l"
    )
    assert embed(tmp_path / "packaged", tmp_path / "out").code == 0
    assert read_dataset(tmp_path / "out")["OSMID"].to_pylist() == names
    assert len(names) == 7
    assert read_package_rejects(tmp_path / "packaged") == {
        "bad.png": "unreadable_image", "empty.webp": "unreadable_image"
    }  # fmt: skip
    assert run_main(verify_embeddings.main, tmp_path / "out", "-i", tmp_path / "packaged").code == 0


def test_a_name_that_is_not_utf_8_is_escaped(run_main, photographs, tmp_path):
    (Path(str(photographs)) / b"caf\xe9.jpg".decode("utf-8", "surrogateescape")).write_bytes(make_photographs(1)[0])
    assert run_package(run_main, photographs, tmp_path / "packaged", "--max-reject-fraction", 1).code == 0
    assert "caf\\xe9.jpg" in read_package(tmp_path / "packaged")["OSMID"].to_pylist()


def test_linked_folders_of_photographs_are_followed_once_and_a_pipe_is_not_waited_for(photographs, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.jpg").write_bytes(make_photographs(1)[0])
    (elsewhere / "back").symlink_to(photographs)
    (photographs / "linked").symlink_to(elsewhere)
    os.mkfifo(photographs / "pipe.jpg")
    names = list_data(photographs)[1]
    assert "linked/far.jpg" in names
    assert len(names) == 10
    assert "pipe.jpg" not in names


def test_parquets_of_any_ending_in_linked_folders_are_taken_and_others_counted(tmp_path, caplog, monkeypatch):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
    images = make_photographs(3)
    for number, path in enumerate([folder / "a.PARQUET", folder / "b.pq", elsewhere / "c.parquet"]):
        write_packaged(path, [images[number]], OSMID=[number])
    (folder / "linked").symlink_to(elsewhere)
    (folder / "old.csv").touch()
    monkeypatch.setattr(listing.logger, "propagate", True)
    source = open_input(InputOptions(input=folder, filter_valid=True))
    assert [path.name for path, _ in source.places] == ["a.PARQUET", "b.pq", "c.parquet"]
    assert "1 files are not parquet files and are passed over (.csv 1), as old.csv" in caplog.text


def test_an_output_inside_the_input_is_refused(embed, photographs):
    outcome = embed(photographs, photographs / "out")
    assert outcome.code == 2
    assert "lies in the input folder" in outcome.stderr.splitlines()[-1]
    assert not (photographs / "out").exists()


# ------------------------------------------------------------------------------------------------ columns to keep


def test_columns_are_carried_along_row_by_row_whatever_their_type(embed, run_main, tmp_path):
    images = make_photographs(12)
    images[2], images[9] = None, b"x"
    columns = {
        "year": list(range(2000, 2012)),
        "note": pa.array([None if row % 3 else f"n{row}" for row in range(12)]).dictionary_encode(),
        "price": [Decimal(row) / 4 for row in range(12)],
        "taken": pa.array([datetime.datetime(2020, 1, 1 + row) for row in range(12)], pa.timestamp("ns")),
        "box": [{"x": row, "ys": [row] * (row % 3)} for row in range(12)],
        "is_valid": [row != 5 for row in range(12)],
    }
    source = write_packaged(tmp_path / "in.parquet", images, 6, **columns)
    names = ",".join(columns)
    expected = pq.read_table(source)
    for arguments, gone in (([], (2, 5, 9)), (["--no-filter-valid"], (2, 9))):
        output = tmp_path / f"out{len(arguments)}"
        outcome = embed(source, output, "--keep-columns", names, *arguments)
        assert outcome.code == 0, outcome.stderr
        table = read_dataset(output)
        assert table.column_names == ["OSMID", "embedding", *columns]
        rows = [row for row in range(12) if row not in gone]
        for name in columns:
            assert table[name].type == expected[name].type
            assert table[name].to_pylist() == expected[name].take(rows).to_pylist()
        outcome = run_main(verify_embeddings.main, output, "-i", source)
        assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize(
    ("names", "code", "text"),
    [
        ("none", 1, "column none is missing"),
        ("OSMID", 2, "other than OSMID, image_bytes"),
        ("embedding", 2, "name columns once each"),
        ("year,year", 2, "name columns once each"),
        ("", 2, "must name columns"),
    ],
)
def test_columns_that_cannot_be_kept_are_one_line(embed, packaged, tmp_path, names, code, text):
    outcome = embed(packaged, tmp_path / "out", "--keep-columns", names)
    assert outcome.code == code
    assert text in outcome.stderr.splitlines()[-1]


def test_other_columns_to_keep_are_another_dataset(embed, tmp_path):
    source = write_packaged(tmp_path / "in.parquet", make_photographs(4), year=[1, 2, 3, 4])
    assert embed(source, tmp_path / "out").code == 0
    outcome = embed(source, tmp_path / "out", "--keep-columns", "year")
    assert outcome.code == 1
    assert "keep_columns was [] and is now ['year']" in outcome.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ memory

MEASURE = """
import resource, sys
sys.path.insert(0, {repo!r})
from pathlib import Path
from pipeline.embeddings_dataset.packaged_input import InputOptions, open_input, read_batches
source = open_input(InputOptions(input=Path(sys.argv[1]), read_batch_size=50))
for table in read_batches(source, 0):
    del table
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_the_memory_of_a_process_does_not_grow_with_the_row_group(tmp_path):
    """Row groups of 1,000 and of 12,000 images of 20 KB: 20 MB and 240 MB."""
    peaks = []
    for num_rows in (1_000, 12_000):
        path = tmp_path / f"{num_rows}.parquet"
        schema = pa.schema([("OSMID", pa.int64()), ("image_bytes", pa.binary())])
        batch = pa.array([bytes([row % 251, row % 7]) * 10_000 for row in range(1_000)], pa.binary())
        images = pa.chunked_array([batch] * (num_rows // 1_000))
        table = pa.table({"OSMID": range(num_rows), "image_bytes": images}, schema=schema)
        pq.write_table(
            table, path, row_group_size=num_rows, use_dictionary=False, compression="none", write_batch_size=16
        )
        code = MEASURE.format(repo=str(REPO))
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert pq.read_metadata(path).num_row_groups == 1
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 40_000_000


def test_parts_of_one_row_group_are_as_many_as_its_read_batches(embed, tmp_path):
    source = write_packaged(tmp_path / "in.parquet", make_photographs(9), row_group_size=9)
    assert embed(source, tmp_path / "out").code == 0
    assert [pq.read_metadata(path).num_rows for path in list_parts(tmp_path / "out")] == [4, 4, 1]
