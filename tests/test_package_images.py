"""Packaging images for stage 8: from a folder, a CSV, or tars."""

import json
import os
import shutil
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from package_fixtures import PHOTOGRAPHS, read_package, read_rejects, run
from published_models import publish, read_dataset, write_backbone
from raw_tars import make_city, write_tar

from pipeline import workspace
from pipeline.embeddings_dataset.packaged_input import InputOptions, open_input
from publish_model import generate_embeddings_from_parquet, package_images
from publish_model.new_data import image_sources


def test_a_folder_becomes_a_package_and_bad_pictures_are_listed(run_main, folder, tmp_path):
    outcome = run(run_main, folder, tmp_path / "packaged")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.split() == [str(tmp_path / "packaged")]
    assert "6 in = 5 out + 1 rejected + 0 dropped (unreadable_image 1)" in outcome.stderr
    table = read_package(tmp_path / "packaged")
    assert table.schema.names == ["OSMID", "image_bytes", "is_valid"]
    names = ["half.jpg", *(f"north/{number}.jpg" for number in range(4)), "z.PNG"]
    assert table.column("OSMID").to_pylist() == names
    assert table.column("is_valid").to_pylist() == [False, True, True, True, True, True]
    assert table.column("image_bytes").to_pylist()[:2] == [None, PHOTOGRAPHS[0]]
    assert read_rejects(tmp_path / "packaged") == {"half.jpg": "unreadable_image"}


def test_a_csv_names_pictures_and_its_other_columns_are_kept(run_main, folder, tmp_path):
    lines = [
        "OSMID,path,year,heading,note,code",
        'way/1,north/0.jpg,2019,12.5,"a, b",007',
        f"way/1,{folder / 'north' / '1.jpg'},2020,-3,,008",
        "way/2,gone.jpg,,1e2,x,009",
        "relation/2,north,2021,0,x,010",
        "way/3,,2021,0,x,010",
        "",
    ]
    (folder / "list.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    outcome = run(run_main, folder / "list.csv", tmp_path / "packaged", "--max-reject-fraction", "0.6")
    assert outcome.code == 0, outcome.stderr
    table = read_package(tmp_path / "packaged")
    assert {field.name: str(field.type) for field in table.schema} == {
        "OSMID": "string", "image_bytes": "binary", "is_valid": "bool", "path": "string", "year": "int64",
        "heading": "string", "note": "string", "code": "string",
    }  # fmt: skip
    assert table.column("OSMID").to_pylist() == ["way/1", "way/1", "way/2", "relation/2", "way/3"]
    assert table.column("year").to_pylist() == [2019, 2020, None, 2021, 2021]
    assert table.column("heading").to_pylist() == ["12.5", "-3", "1e2", "0", "0"]
    assert table.column("note").to_pylist() == ["a, b", None, "x", "x", "x"]
    assert table.column("code").to_pylist()[0] == "007"
    assert table.column("image_bytes").to_pylist() == [PHOTOGRAPHS[0], PHOTOGRAPHS[1], None, None, None]
    assert read_rejects(tmp_path / "packaged") == {
        "gone.jpg": "missing_image", "north": "missing_image", "": "missing_image",
    }  # fmt: skip


def test_whole_numbers_for_ids_stay_numbers(run_main, folder, tmp_path):
    (folder / "list.csv").write_text("path,OSMID\nnorth/0.jpg,12\nnorth/1.jpg,9007199254740993\n")
    assert run(run_main, folder / "list.csv", tmp_path / "packaged").code == 0
    column = read_package(tmp_path / "packaged").column("OSMID")
    assert (column.type, column.to_pylist()) == (pa.int64(), [12, 9007199254740993])


@pytest.mark.parametrize(
    "ids",
    [
        ["9749618424903893992", "9749618424903893993", "9749618424903893901"],
        ["1.1", "1.10"],
        ["1e5", "10e4", "2e999"],
        ["1.0", "2"],
        ["007", "7"],
        ["9223372036854775808", "1"],
    ],
)
def test_an_id_that_is_no_whole_number_stays_text_as_it_stands(run_main, folder, tmp_path, ids):
    (folder / "list.csv").write_text("OSMID,path\n" + "".join(f"{one},north/0.jpg\n" for one in ids))
    assert run(run_main, folder / "list.csv", tmp_path / "packaged").code == 0
    column = read_package(tmp_path / "packaged").column("OSMID")
    assert (column.type, column.to_pylist()) == (pa.string(), ids)


def test_the_largest_whole_numbers_stay_numbers(run_main, folder, tmp_path):
    ids = [9223372036854775807, -9223372036854775808, 0]
    (folder / "list.csv").write_text("OSMID;path\n" + "".join(f"{one};north/0.jpg\n" for one in ids))
    assert run(run_main, folder / "list.csv", tmp_path / "packaged").code == 0
    column = read_package(tmp_path / "packaged").column("OSMID")
    assert (column.type, column.to_pylist()) == (pa.int64(), ids)


def test_a_name_that_is_not_utf8_and_its_escape_written_out_are_not_one_id(run_main, tmp_path):
    (tmp_path / "photographs").mkdir()
    for name, data in zip((b"p\xff.jpg", b"p\\xff.jpg"), PHOTOGRAPHS, strict=False):
        (tmp_path / "photographs" / os.fsdecode(name)).write_bytes(data)
    outcome = run(run_main, tmp_path / "photographs", tmp_path / "packaged")
    assert (outcome.code, "two photographs have the id p\\xff.jpg: rename one" in outcome.stderr) == (1, True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("OSMID,file\n1,a.jpg\n", "no column path"),
        ("OSMID,path\n", "holds no rows"),
        ("", "no column OSMID"),
        ("OSMID,path,path\n1,a.jpg,b.jpg\n", "more than one column path: its first line names"),
        ("OSMID,path,a,a\n1,a.jpg,b,c\n", "each column once"),
        ("OSMID,path, \n1,a.jpg,b\n", "its first line has to name each column once"),
        ("OSMID,path,is_valid\n1,a.jpg,1\n", "column is_valid has the name of one that is made here"),
        ("OSMID,path\n1,a.jpg\n2,a,b.jpg\n", "row 2 below the names has 3 values for 2 columns"),
        ("OSMID,path\n1,a\udcff.jpg\n", "not a CSV or text in UTF-8"),
        ('OSMID,path\n1,"a.jpg\n', "not a CSV or text in UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused_by_name(run_main, tmp_path, text, problem):
    (tmp_path / "list.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    outcome = run(run_main, tmp_path / "list.csv", tmp_path / "packaged")
    assert outcome.code == 1
    assert outcome.stderr.count("error: ") == 1
    assert problem in outcome.stderr
    assert "list.csv" in outcome.stderr
    assert not (tmp_path / "packaged").exists()


def test_tars_are_read_in_order_without_being_unpacked(run_main, tmp_path):
    for number in (2, 1):
        write_tar(tmp_path / "tars" / f"{number:04d}.tar", make_city(number, (2, 1)))
    assert run(run_main, tmp_path / "tars", tmp_path / "packaged").code == 0
    ids = read_package(tmp_path / "packaged").column("OSMID").to_pylist()
    assert len(ids) == 6
    assert all(name.endswith(".jpg") for name in ids)
    assert [name.partition("/")[0] for name in ids] == ["0001"] * 3 + ["0002"] * 3
    assert run(run_main, tmp_path / "tars" / "0002.tar", tmp_path / "one").code == 0
    assert read_package(tmp_path / "one").equals(read_package(tmp_path / "packaged").slice(3))


def test_a_damaged_tar_is_an_error_and_leaves_no_package(run_main, tmp_path):
    tar = write_tar(tmp_path / "0001.tar", make_city(1, (3, 3)))
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    outcome = run(run_main, tar, tmp_path / "packaged")
    assert outcome.code == 1
    assert "fetch the tar again" in outcome.stderr
    assert not (tmp_path / "packaged").exists()


def test_row_groups_are_bounded_in_rows_and_bytes(run_main, folder, tmp_path, small_files, monkeypatch):
    assert run(run_main, folder, tmp_path / "packaged").code == 0
    paths = sorted((tmp_path / "packaged").glob("*.parquet"))
    groups = [pq.ParquetFile(path).metadata.row_group(0).num_rows for path in paths]
    assert len(paths) > 1
    assert set(groups) <= {1, 2}
    monkeypatch.setattr(package_images, "ROW_GROUP_BYTES", 1)
    assert run(run_main, folder, tmp_path / "single").code == 0
    for path in (tmp_path / "single").glob("*.parquet"):
        footer = pq.ParquetFile(path).metadata
        for number in range(footer.num_row_groups):  # a row without bytes may stand beside one that fills the group
            images = pq.ParquetFile(path).read_row_group(number).column("image_bytes").to_pylist()
            assert len([image for image in images if image]) <= 1
    assert read_package(tmp_path / "single").equals(read_package(tmp_path / "packaged"))


def test_an_interrupted_run_goes_on_where_it_stood(run_main, folder, tmp_path, small_files, monkeypatch):
    tried = []
    genuine = image_sources.check_image

    def check(data):
        tried.append(len(data))
        if len(tried) == 6 and not go_on:
            raise KeyboardInterrupt
        genuine(data)

    monkeypatch.setattr(image_sources, "check_image", check)
    monkeypatch.setattr(package_images, "count_cores", lambda: 1)
    go_on = False
    assert run(run_main, folder, tmp_path / "packaged").code == 130
    assert not (tmp_path / "packaged").exists()
    go_on, before = True, len(tried)
    outcome = run(run_main, folder, tmp_path / "packaged")
    assert outcome.code == 0
    assert "going on behind image" in outcome.stderr
    assert len(tried) - before == 2
    monkeypatch.setattr(image_sources, "check_image", genuine)
    assert run(run_main, folder, tmp_path / "again").code == 0
    assert read_package(tmp_path / "packaged").equals(read_package(tmp_path / "again"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"photographs", "packaged", "again"}


def test_what_an_interrupted_run_made_of_other_pictures_is_not_taken_up(run_main, folder, tmp_path, small_files):
    unfinished = tmp_path / ".packaged.unfinished"
    assert run(run_main, folder, tmp_path / "packaged").code == 0
    (tmp_path / "packaged").rename(unfinished)
    (folder / "a.jpg").write_bytes(PHOTOGRAPHS[6])
    outcome = run(run_main, folder, tmp_path / "packaged")
    assert outcome.code == 0
    assert "begun with other images" in outcome.stderr
    assert read_package(tmp_path / "packaged").column("OSMID").to_pylist()[0] == "a.jpg"
    assert read_package(tmp_path / "packaged").num_rows == 7


def test_a_second_process_at_the_same_output_is_refused(run_main, folder, tmp_path):
    with workspace.writing_folder(tmp_path / "packaged", resumable=True):
        outcome = run(run_main, folder, tmp_path / "packaged")
    assert outcome.code == 1
    assert "is at it: wait for that one, or stop it" in outcome.stderr


def test_a_rerun_keeps_the_package_and_another_input_is_refused(run_main, folder, tmp_path):
    output = tmp_path / "packaged"
    assert run(run_main, folder, output).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    outcome = run(run_main, folder, output)
    assert outcome.code == 0
    assert "nothing redone" in outcome.stderr
    assert "6 in = 5 out + 1 rejected" in outcome.stderr
    assert {path.name: path.stat().st_mtime_ns for path in output.rglob("*.parquet")} == before
    (folder / "half.jpg").unlink()
    outcome = run(run_main, folder, output)
    assert outcome.code == 1
    assert "made from other inputs" in outcome.stderr
    assert run(run_main, folder, output, "--overwrite").code == 0
    assert read_package(output).num_rows == 5
    assert read_rejects(output) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"photographs", "packaged"}


def test_a_finished_package_with_rejects_of_another_one_is_refused_and_kept(run_main, folder, tmp_path, small_files):
    output, other = tmp_path / "packaged", tmp_path / "other"
    assert run(run_main, folder, output).code == 0
    (folder / "a.jpg").write_bytes(PHOTOGRAPHS[6])
    assert run(run_main, folder, other).code == 0
    (folder / "a.jpg").unlink()
    shutil.copyfile(other / "_rejects" / "00001.parquet", output / "_rejects" / "00001.parquet")
    before = {path: path.read_bytes() for path in output.rglob("*.parquet")}
    outcome = run(run_main, folder, output)
    assert outcome.code == 1
    assert "00001.parquet: made from other inputs or settings (input photographs has changed)" in outcome.stderr
    assert {path: path.read_bytes() for path in output.rglob("*.parquet")} == before
    assert run(run_main, folder, output, "--overwrite").code == 0
    assert read_package(output).num_rows == 6


@pytest.mark.parametrize("name", ["photographs", "others"])
def test_a_file_of_another_package_is_not_kept(run_main, folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "b" / name)
    (tmp_path / "b" / name / "z.PNG").write_bytes(PHOTOGRAPHS[6])
    assert (
        run(run_main, folder, tmp_path / "one").code == run(run_main, tmp_path / "b" / name, tmp_path / "two").code == 0
    )
    before = read_package(tmp_path / "one")
    shutil.copy2(tmp_path / "two" / "00000.parquet", tmp_path / "one" / "00000.parquet")
    outcome = run(run_main, folder, tmp_path / "one")
    if name == "others":
        assert (outcome.code, "(input others is gone)" in outcome.stderr) == (1, True)
    else:
        assert (outcome.code, "1 pictures have changed" in outcome.stderr) == (0, True)
        assert read_package(tmp_path / "one").equals(before)
        assert "nothing redone" in run(run_main, folder, tmp_path / "one").stderr


def test_overwrite_leaves_the_old_package_until_the_new_one_is_there(run_main, folder, tmp_path):
    output = tmp_path / "packaged"
    assert run(run_main, folder, output).code == 0
    tar = write_tar(tmp_path / "0001.tar", make_city(1, (3, 3)))
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    assert run(run_main, tar, output, "--overwrite").code == 1
    assert read_package(output).num_rows == 6


def test_what_is_no_package_is_never_replaced(run_main, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.parquet").write_bytes(b"something")
    for option in ((), ("--overwrite",)):
        assert run(run_main, folder, tmp_path / "mine", *option).code == 1
        assert (tmp_path / "mine" / "00000.parquet").read_bytes() == b"something"
    inside = run(run_main, folder, folder / "packaged")
    assert inside.code == 2
    assert "lies in the input folder" in inside.stderr


def test_a_wrong_folder_does_not_pass_for_success(run_main, folder, tmp_path):
    (tmp_path / "list.csv").write_text("OSMID,path\n1,north/0.jpg\n2,north/1.jpg\n")
    for _ in range(2):  # nor does a rerun
        outcome = run(run_main, tmp_path / "list.csv", tmp_path / "packaged")
        assert outcome.code == 1
        assert "2 of 2 items were rejected, more than --max-reject-fraction = 0.2 allows" in outcome.stderr
    assert run(run_main, tmp_path / "nowhere", tmp_path / "other").code == 1
    (tmp_path / "empty").mkdir()
    assert "holds neither photographs nor tars" in run(run_main, tmp_path / "empty", tmp_path / "other").stderr


def test_stage_8_embeds_a_package(run_main, folder, tmp_path):
    model = publish(tmp_path / "model", write_backbone(tmp_path / "backbone"))
    assert run(run_main, folder, tmp_path / "packaged").code == 0
    stage8 = generate_embeddings_from_parquet.main
    arguments = ("--input", tmp_path / "packaged", "--output", tmp_path / "a", "--model-id", model)
    assert run_main(stage8, *arguments).code == 0
    assert read_dataset(tmp_path / "a").num_rows == 5
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    assert (state["rows_embedded"], state["rows_skipped_invalid"], state["rows_rejected"]) == (5, 1, 0)
    source = open_input(InputOptions(input=tmp_path / "packaged", filter_valid=True))
    assert source.num_rows == 6


def test_a_killed_run_is_finished_by_the_next_one(start_script, run_script, tmp_path):
    place = tmp_path / "photographs"
    place.mkdir()
    for number in range(300):
        (place / f"{number:03d}.jpg").write_bytes(PHOTOGRAPHS[number % 7])
    arguments = ("publish_model/package_images.py", "--input", place, "--output", tmp_path / "packaged")
    process = start_script(*arguments)
    unfinished = tmp_path / ".packaged.unfinished"
    deadline = time.monotonic() + 60
    while not unfinished.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    outcome = run_script(*arguments)
    assert outcome.code == 0, outcome.stderr
    assert read_package(tmp_path / "packaged").column("image_bytes").to_pylist() == [
        PHOTOGRAPHS[number % 7] for number in range(300)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"photographs", "packaged"}
