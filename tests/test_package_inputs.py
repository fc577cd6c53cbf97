"""What is packaged: nothing twice or for another thing, and again what has changed; parquets too."""

import os
import shutil
import subprocess
import sys
import weakref

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from package_fixtures import PHOTOGRAPHS, read_package, read_rejects, run
from published_models import read_dataset, write_packaged
from raw_tars import Entry, write_tar

from pipeline import threads
from pipeline.embeddings_dataset.packaged_input import InputOptions, open_input
from publish_model import package_images, verify_embeddings
from publish_model.new_data import image_sources
from publish_model.new_data.image_sources import SourceImage

# ------------------------------------------------------------------------------------------------ nothing taken twice


def test_an_id_that_comes_again_in_a_tar_or_in_one_of_the_same_stem_is_a_reject(run_main, tmp_path):
    again = [Entry("x/1.jpg", PHOTOGRAPHS[0]), Entry("x/2.jpg", PHOTOGRAPHS[1]), Entry("x/1.jpg", PHOTOGRAPHS[2])]
    write_tar(tmp_path / "tars" / "a.TAR", again)
    write_tar(tmp_path / "tars" / "a.b.tar", [Entry("x/1.jpg", PHOTOGRAPHS[3])])
    write_tar(tmp_path / "tars" / "a.tar", [Entry("x/1.jpg", PHOTOGRAPHS[4]), Entry("x/3.jpg", PHOTOGRAPHS[5])])
    outcome = run(run_main, tmp_path / "tars", tmp_path / "packaged", "--max-reject-fraction", "1")
    assert "6 in = 4 out + 2 rejected + 0 dropped (duplicate_image_id 2)" in outcome.stderr
    rows = [(row["OSMID"], row["image_bytes"]) for row in read_package(tmp_path / "packaged").to_pylist()]
    assert [row for row in rows if row[1] is not None] == [
        ("a/x/1.jpg", PHOTOGRAPHS[0]), ("a/x/2.jpg", PHOTOGRAPHS[1]), ("a/x/3.jpg", PHOTOGRAPHS[5]),
        ("a.b/x/1.jpg", PHOTOGRAPHS[3]),
    ]  # fmt: skip
    rejects = pq.read_table(tmp_path / "packaged" / "_rejects" / "00000.parquet").to_pylist()
    assert [row["detail"] for row in rejects] == ["a second member of this name", "a.TAR/x/1.jpg comes first"]


def test_a_folder_with_data_of_several_kinds_is_refused_with_their_counts(run_main, embed, folder, tmp_path):
    write_tar(folder / "north" / "backup.tar", [Entry("x.jpg", PHOTOGRAPHS[0])])
    for outcome in (run(run_main, folder, tmp_path / "packaged"), embed(folder, tmp_path / "out")):
        assert outcome.code == 1
        assert f"{folder}: holds 6 photographs and 1 tars: give a folder with data of one kind" in outcome.stderr
    (folder / "north" / "backup.tar").rename(folder / "_backup.tar")
    assert "holds 6 photographs and 1 tars" in run(run_main, folder, tmp_path / "packaged").stderr
    write_packaged(folder / "old.parquet", PHOTOGRAPHS)
    assert "holds 1 parquet files and 6 photographs and 1 tars" in embed(folder, tmp_path / "out").stderr
    assert not (tmp_path / "out" / "parts").exists()


# ------------------------------------------------------------------------------------------------ what changes behind


@pytest.fixture
def listed(tmp_path, small_files):
    """A CSV of six pictures, two a file; the third is missing, the sixth no picture."""
    place = tmp_path / "listed"
    place.mkdir()
    for number in (0, 1, 3, 4):
        (place / f"{number}.jpg").write_bytes(PHOTOGRAPHS[number])
    (place / "5.jpg").write_bytes(b"no picture")
    (place / "list.csv").write_text("OSMID,path\n" + "".join(f"{number},{number}.jpg\n" for number in range(6)))
    return place


def read_states(output):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.glob("*.parquet")}


def overwrite(path, data):
    """Put other content into a file, whose time of change is another for certain."""
    time_ns = path.stat().st_mtime_ns if path.exists() else 0
    path.write_bytes(data)
    os.utime(path, ns=(time_ns + 10**9, time_ns + 10**9))


def test_a_picture_that_comes_later_or_is_overwritten_behind_a_csv_is_packaged(run_main, listed, tmp_path):
    output, options = tmp_path / "packaged", ("--max-reject-fraction", "1")
    assert run(run_main, listed / "list.csv", output, *options).code == 0
    assert read_rejects(output) == {"2.jpg": "missing_image", "5.jpg": "unreadable_image"}
    before = read_states(output)
    assert len(before) == 3
    (listed / "2.jpg").write_bytes(PHOTOGRAPHS[2])
    outcome = run(run_main, listed / "list.csv", output, *options)
    assert "00001.parquet: 1 pictures have changed, as 2.jpg: made again" in outcome.stderr
    assert "6 in = 5 out + 1 rejected" in outcome.stderr
    assert outcome.stdout.split() == [str(output)]
    assert {name for name, state in read_states(output).items() if state != before[name]} == {"00001.parquet"}
    overwrite(listed / "0.jpg", PHOTOGRAPHS[6])
    overwrite(listed / "5.jpg", PHOTOGRAPHS[5])
    (listed / "4.jpg").unlink()
    assert run(run_main, listed / "list.csv", output, *options).code == 0
    expected = [PHOTOGRAPHS[number] for number in (6, 1, 2, 3)] + [None, PHOTOGRAPHS[5]]
    assert read_package(output)["image_bytes"].to_pylist() == expected
    assert read_rejects(output) == {"4.jpg": "missing_image"}
    outcome = run(run_main, listed / "list.csv", output, *options)
    assert "nothing redone" in outcome.stderr


def test_a_photograph_with_the_same_size_and_other_content_is_packaged_again(run_main, folder, tmp_path):
    output, path = tmp_path / "packaged", folder / "north" / "0.jpg"
    size = max(len(PHOTOGRAPHS[0]), len(PHOTOGRAPHS[6]))
    path.write_bytes(PHOTOGRAPHS[0].ljust(size, b"\0"))
    assert run(run_main, folder, output).code == 0
    overwrite(path, PHOTOGRAPHS[6].ljust(size, b"\0"))
    assert run(run_main, folder, output).code == 0
    assert read_package(output)["image_bytes"].to_pylist()[1].startswith(PHOTOGRAPHS[6])


def test_a_package_with_another_picture_of_the_same_size_is_another_input_of_stage_8(run_main, tmp_path):
    output, fingerprints = tmp_path / "packaged", set()
    (tmp_path / "photographs").mkdir()
    for last in (b"a", b"b"):  # behind the picture's end, where no decoder looks
        (tmp_path / "photographs" / "a.jpg").write_bytes(PHOTOGRAPHS[0] + os.urandom(6_000)[:-1] + last)
        assert run(run_main, tmp_path / "photographs", output, "--overwrite").code == 0
        fingerprints.add(open_input(InputOptions(input=output)).fingerprint)
    assert len(fingerprints) == 2


def test_a_copy_of_the_photographs_is_read_once_and_nothing_is_made_again(run_main, folder, tmp_path, monkeypatch):
    output = tmp_path / "packaged"
    assert run(run_main, folder, output).code == 0
    before = read_states(output)
    (tmp_path / "copy").mkdir()
    moved = shutil.copytree(folder, tmp_path / "copy" / "photographs", copy_function=shutil.copyfile)
    outcome = run(run_main, moved, output)
    assert (outcome.code, "nothing redone" in outcome.stderr) == (0, True)
    assert "6 in = 5 out + 1 rejected" in outcome.stderr
    assert read_states(output) == before
    monkeypatch.setattr(package_images, "try_image", None)
    assert run(run_main, moved, output).code == 0


def test_a_tar_of_the_same_size_with_another_picture_is_refused_by_name(run_main, tmp_path, small_files, monkeypatch):
    output, sizes = tmp_path / "packaged", [len(data) for data in PHOTOGRAPHS]
    members = [Entry(f"{number}.jpg", PHOTOGRAPHS[number].ljust(max(sizes), b"\0")) for number in range(5)]
    tar = write_tar(tmp_path / "0001.tar", members)
    assert run(run_main, tar, output).code == 0
    overwrite(tar, tar.read_bytes())
    before = read_states(output)
    assert "nothing redone" in run(run_main, tar, output).stderr
    assert read_states(output) == before
    with monkeypatch.context() as patched:
        patched.setattr(package_images, "try_image", None)
        assert run(run_main, tar, output).code == 0
    members[3] = Entry("3.jpg", PHOTOGRAPHS[6].ljust(max(sizes), b"\0"))
    overwrite(tar, write_tar(tmp_path / "new.tar", members).read_bytes())
    outcome = run(run_main, tar, output)
    assert (outcome.code, "0001/3.jpg was another picture in its tar: give --overwrite" in outcome.stderr) == (1, True)
    output.rename(tmp_path / ".packaged.unfinished")
    (tmp_path / ".packaged.unfinished" / "00002.parquet").unlink()
    assert "begun anew" in run(run_main, tar, output).stderr
    assert read_package(output)["image_bytes"].to_pylist()[3].startswith(PHOTOGRAPHS[6])


def test_pictures_that_change_before_an_interrupted_run_goes_on_are_the_new_ones(run_main, listed, tmp_path):
    output, options = tmp_path / "packaged", ("--max-reject-fraction", "1")
    assert run(run_main, listed / "list.csv", output, *options).code == 0
    output.rename(tmp_path / ".packaged.unfinished")
    (tmp_path / ".packaged.unfinished" / "00002.parquet").unlink()
    (listed / "2.jpg").write_bytes(PHOTOGRAPHS[2])
    outcome = run(run_main, listed / "list.csv", output, *options)
    assert "going on behind image 4" in outcome.stderr
    assert read_package(output)["image_bytes"].to_pylist() == [*PHOTOGRAPHS[:5], None]


# ------------------------------------------------------------------------------------------------ packaged parquets


def test_hugging_faces_image_column_is_packaged_and_embedded(run_main, embed, tmp_path):
    images = [{"bytes": data, "path": f"{number}.jpg"} for number, data in enumerate(PHOTOGRAPHS)]
    images[2], images[4] = {"bytes": None, "path": "2.jpg"}, None
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {"image": pa.array(images, kind), "key": [float(number) for number in range(7)], "label": range(7)}
    )
    table = table.append_column("is_valid", pa.array([True] * 7))
    pq.write_table(table, tmp_path / "hub.parquet", row_group_size=3)
    columns = ("--image-column", "image", "--id-column", "key", "--keep-columns", "label")
    outcome = run(run_main, tmp_path / "hub.parquet", tmp_path / "packaged", "--max-reject-fraction", "1", *columns)
    assert outcome.code == 0, outcome.stderr
    packaged = read_package(tmp_path / "packaged")
    valid = [data and data["bytes"] for data in images]
    assert packaged.to_pydict() == {
        "OSMID": list(range(7)), "image_bytes": valid, "is_valid": [data is not None for data in valid],
        "label": list(range(7)),
    }  # fmt: skip
    assert read_rejects(tmp_path / "packaged") == {"2": "missing_image", "4": "missing_image"}
    outcome = run(run_main, tmp_path / "hub.parquet", tmp_path / "else", *columns[:-1], "is_valid")
    assert "column is_valid has the name of one that is made here" in outcome.stderr
    outcome = embed(tmp_path / "hub.parquet", tmp_path / "out", *columns)
    assert outcome.code == 0, outcome.stderr
    embedded = read_dataset(tmp_path / "out")
    assert embedded.column_names == ["OSMID", "embedding", "label"]
    assert embedded["OSMID"].to_pylist() == embedded["label"].to_pylist() == [0, 1, 3, 5, 6]
    rejects = [pq.read_table(path).to_pylist() for path in sorted((tmp_path / "out" / "_rejects").iterdir())]
    assert [(row["OSMID"], row["reason"]) for rows in rejects for row in rows] == [
        (2, "missing_image"), (4, "missing_image"),
    ]  # fmt: skip
    assert run_main(verify_embeddings.main, tmp_path / "out", "--input", tmp_path / "hub.parquet").code == 0
    other = embed(tmp_path / "hub.parquet", tmp_path / "out", "--image-column", "image", "--id-column", "label")
    assert "keep_columns was ['label'] and is now []" in other.stderr
    other = embed(tmp_path / "hub.parquet", tmp_path / "else")
    assert "column image_bytes is missing" in other.stderr
    assert "give --image-column image" in other.stderr
    other = embed(tmp_path / "hub.parquet", tmp_path / "else", "--image-column", "image", "--id-column", "label",
                  "--keep-columns", "image")  # fmt: skip
    assert "--keep-columns: there would be two columns image" in other.stderr
    other = embed(tmp_path / "hub.parquet", tmp_path / "else", "--image-column", "image", "--id-column", "image")
    assert "there would be two columns image" in other.stderr


def test_columns_are_named_only_where_there_are_some(run_main, folder, tmp_path):
    outcome = run(run_main, folder, tmp_path / "packaged", "--id-column", "key")
    assert (outcome.code, "belong to an --input of parquets" in outcome.stderr) == (1, True)


def test_a_package_of_parquets_goes_on_in_the_middle_of_a_row_group(run_main, tmp_path, small_files, monkeypatch):
    write_packaged(tmp_path / "in.parquet", PHOTOGRAPHS, row_group_size=5, OSMID=range(7))
    assert run(run_main, tmp_path / "in.parquet", tmp_path / "packaged").code == 0
    for kept in range(1, 4):
        unfinished = tmp_path / f".again{kept}.unfinished"
        shutil.copytree(tmp_path / "packaged", unfinished)
        for number in range(kept, 4):
            (unfinished / f"{number:05d}.parquet").unlink()
        assert run(run_main, tmp_path / "in.parquet", tmp_path / f"again{kept}").code == 0
        assert read_package(tmp_path / f"again{kept}").equals(read_package(tmp_path / "packaged"))


def test_overwrite_keeps_the_files_that_are_the_users_own(run_main, folder, tmp_path):
    output = tmp_path / "packaged"
    assert run(run_main, folder, output).code == 0
    (output / "README.md").write_text("mine")
    assert run(run_main, folder, output, "--overwrite").code == 0
    assert (output / "README.md").read_text() == "mine"
    assert read_package(output).num_rows == 6


_PACKAGING = """
from pathlib import Path
from publish_model import package_images
from pipeline import threads
megabytes = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
package_images.count_cores = lambda: 8
package_images.main(["--input", "few.csv", "--output", "few"])
before = megabytes()
threads.HELD_BYTES = package_images.ROW_GROUP_BYTES = 2**22
package_images.main(["--input", INPUT, "--output", "packaged"])
print(megabytes() - before)
"""


def test_memory_is_bounded_by_bytes_however_large_the_pictures_are(tmp_path):
    """Forty pictures of 8 MiB, of which 32 would be in flight: one in flight, one row group and their copies fit."""
    comments = (b"\xff\xfe\xff\xff" + bytes(range(256)) * 255 + bytes(253)) * 128
    large = PHOTOGRAPHS[0][:2] + comments + PHOTOGRAPHS[0][2:]
    (tmp_path / "small.jpg").write_bytes(PHOTOGRAPHS[0])
    (tmp_path / "few.csv").write_text("OSMID,path\n1,small.jpg\n")
    table = pa.table({"OSMID": list(range(40)), "image_bytes": pa.array([large] * 40, pa.binary())})
    pq.write_table(table, tmp_path / "many.parquet", dictionary_pagesize_limit=2**30)
    del table
    run = subprocess.run(
        [sys.executable, "-c", _PACKAGING.replace("INPUT", repr("many.parquet"))],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "40 in = 40 out + 0 rejected" in run.stderr
    grown = float(run.stdout.splitlines()[-1])
    assert grown < 200, f"{grown:.0f} MB"


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_the_bytes_in_flight_are_a_row_group_and_the_pictures_that_are_tried(run_main, tmp_path, monkeypatch, kind):
    size = 2**16
    large, path = PHOTOGRAPHS[0].ljust(size, b"\0"), tmp_path / kind
    damaged = b"no picture".ljust(size, b"\0")
    pictures = [large, damaged, large, large] * 15
    if kind == "folder":
        path.mkdir()
        for number, data in enumerate(pictures):
            (path / f"{number:02d}.jpg").write_bytes(data)
    elif kind == "tar":
        path = write_tar(tmp_path / "a.tar", [Entry(f"{number}.jpg", data) for number, data in enumerate(pictures)])
    else:
        path = write_packaged(tmp_path / "in.parquet", pictures, OSMID=range(60))
    held = most = 0

    def forget():
        nonlocal held
        held -= size

    def make(*values, **others):
        nonlocal held, most
        image = SourceImage(*values, **others)
        weakref.finalize(image, forget)
        held += size
        most = max(most, held)
        return image

    monkeypatch.setattr(image_sources, "SourceImage", make)
    monkeypatch.setattr(package_images, "count_cores", lambda: 8)
    monkeypatch.setattr(package_images, "ROW_GROUP_BYTES", 4 * size)
    monkeypatch.setattr(package_images, "FILE_BYTES", 9 * size)
    monkeypatch.setattr(threads, "HELD_BYTES", 2 * size)
    outcome = run(run_main, path, tmp_path / "packaged", "--max-reject-fraction", "1")
    assert "60 in = 45 out + 15 rejected" in outcome.stderr
    assert read_package(tmp_path / "packaged")["image_bytes"].to_pylist() == [
        data if data == large else None for data in pictures
    ]
    assert held == 0
    assert 4 * size < most <= 8 * size  # each bound is passed by a picture, and one has just been read


@pytest.mark.skipif(not os.access("/proc/kmsg", os.R_OK), reason="the kernel's log is closed to this user")
def test_a_file_that_waits_for_news_is_not_waited_for(run_main, tmp_path):
    (tmp_path / "list.csv").write_text("OSMID,path\n1,/proc/kmsg\n2,/dev/zero\n3,/proc/kcore\n4,/proc/self/environ\n")
    assert run(run_main, tmp_path / "list.csv", tmp_path / "packaged", "--max-reject-fraction", "1").code == 0
    assert len(read_rejects(tmp_path / "packaged")) == 4
