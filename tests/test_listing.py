"""Listing folders: nothing is passed over without a word."""

import os
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.files import listing
from pipeline.files.listing import is_parquet, list_files, list_outputs, walk_files


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def walk(folder):
    return sorted(os.path.relpath(path, folder) for path in walk_files(folder))


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What was warned of so far."""
    monkeypatch.setattr(listing.logger, "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("name", "expected"), [("a.parquet", True), ("a.PARQUET", True), ("a.pq", True), ("a.parquet.tmp", False)]
)
def test_a_parquet_is_known_by_its_ending_in_any_case(name, expected):
    assert is_parquet(Path(name)) is expected


def test_a_stages_outputs_of_any_ending_are_taken_and_other_files_counted(tmp_path, warnings):
    make_files(tmp_path, "2_embeddings.PARQUET", "1_embeddings.parquet", "3_embeddings.pq", ".4_embeddings.parquet")
    make_files(tmp_path, "5.parquet", "b.log", "a.log", "_rejects/1_embeddings.parquet")
    names = [path.name for path in list_outputs(tmp_path, 2, "_embeddings")]
    assert names == ["1_embeddings.parquet", "2_embeddings.PARQUET", "3_embeddings.pq"]
    assert warnings() == [
        f"{tmp_path}: 3 files are not *_embeddings.parquet and are passed over (.log 2, .parquet 1), as "
        "5.parquet, a.log, b.log"
    ]


def test_links_to_files_are_files_and_folders_are_none(tmp_path):
    make_files(tmp_path, "in/a", "in/folder/b", "elsewhere/c")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere" / "c")
    assert [path.name for path in list_files(tmp_path / "in")] == ["a", "link"]


def test_every_folder_is_walked_once_however_many_links_lead_to_it(tmp_path, warnings):
    make_files(tmp_path, "in/a/1", "in/b/2", "elsewhere/3", "elsewhere/deep/4", "in/.hidden/5")
    for place, target in (("in/a/loop", "in"), ("in/again", "in/b"), ("in/up", "."), ("in/c", "elsewhere"),
                          ("in/d", "elsewhere/deep")):  # fmt: skip
        (tmp_path / place).symlink_to(tmp_path / target)
    assert walk(tmp_path / "in") == ["a/1", "b/2", "c/3", "c/deep/4"]
    assert warnings() == [
        f"{tmp_path}/in: 4 links lead to folders that are read already, or hold this one: passed over"
    ]


def test_a_folder_below_keeps_its_own_name_wherever_a_link_to_it_lies(tmp_path):
    make_files(tmp_path, "a/deep/1", "z/2", "z/deep/3")
    (tmp_path / "a" / "deep" / "link").symlink_to(tmp_path / "z")
    assert walk(tmp_path) == ["a/deep/1", "z/2", "z/deep/3"]


def test_a_link_that_leads_nowhere_is_yielded_as_it_is(tmp_path):
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    assert walk(tmp_path) == ["broken.jpg", "itself.jpg"]


@pytest.mark.parametrize("place", ["", "below"])
def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(tmp_path, monkeypatch, place):
    make_files(tmp_path, "a.jpg", "below/b.jpg")
    real, closed = os.scandir, os.fspath(tmp_path / place)

    def scan(folder):
        if os.fspath(folder) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return real(folder)

    monkeypatch.setattr(listing.os, "scandir", scan)
    complaint = f"{closed}: cannot be read \\(Permission denied\\): correct the path, or allow reading it"
    with pytest.raises(InputError, match=complaint):
        walk(tmp_path)
    if not place:
        with pytest.raises(InputError, match=complaint):
            list_files(tmp_path)


def test_a_missing_folder_and_a_file_in_its_place_are_told_apart(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"nowhere: cannot be read \(No such file or directory\): correct the path"):
        list_files(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"file: cannot be read \(Not a directory\)"):
        walk(tmp_path / "file")
