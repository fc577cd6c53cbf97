"""Locks, unfinished folders and removal: the ways to work in a folder."""

import os
import subprocess
import sys

import pytest

from pipeline.errors import PipelineError
from pipeline.files import workspace
from pipeline.files.workspace import locked, move_unless_taken, remove, writing_folder

BUSY = "is at it: wait for that one"


def list_files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_names_its_holder_and_leaves_nothing_behind(tmp_path):
    output = tmp_path / "out" / "a.parquet"
    with locked(output, BUSY):
        assert list_files(output.parent) == [".a.parquet.lock"]
        with (
            pytest.raises(PipelineError, match=rf"a\.parquet: process {os.getpid()} on \S+ {BUSY}$"),
            locked(output, BUSY),
        ):
            pass
    assert list_files(output.parent) == []
    with locked(output, BUSY):
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from pipeline.files.workspace import locked\n"
        "with locked(Path(sys.argv[1]), 'is at it'):\n"
        "    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "a"], check=False).returncode == -9
    assert list_files(tmp_path) == [".a.lock"]
    with locked(tmp_path / "a", BUSY):
        pass
    assert list_files(tmp_path) == []


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    plain, turns = workspace.fcntl.flock, []

    def flock(descriptor, how):
        if not turns:
            (tmp_path / ".a.lock").unlink()
        turns.append(descriptor)
        plain(descriptor, how)

    monkeypatch.setattr(workspace.fcntl, "flock", flock)
    with locked(tmp_path / "a", BUSY):
        assert len(turns) == 2
        assert (tmp_path / ".a.lock").exists()


def test_a_file_system_without_locks_is_warned_of_once(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workspace.fcntl, "flock", refuse)
    with caplog.at_level("WARNING", "spatial_building_embeddings"):
        for _ in range(2):
            with locked(tmp_path / "a", BUSY):
                pass
    assert len(caplog.records) == 1
    assert "cannot be locked (Operation not supported)" in caplog.text


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / ".a.lock").symlink_to(tmp_path / "notes")
    with pytest.raises(PipelineError, match=r"cannot write .*\.a\.lock"), locked(tmp_path / "a", BUSY):
        pass
    assert (tmp_path / "notes").read_text() == "mine"


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    remove(tmp_path / "link")
    assert list_files(tmp_path) == ["theirs"]
    assert list_files(tmp_path / "theirs") == ["file"]
    remove(tmp_path / "theirs")
    remove(tmp_path / "theirs")
    assert list_files(tmp_path) == []


def test_a_resumable_folder_keeps_what_a_failed_block_has_made_and_is_held_by_one_process(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    with (
        pytest.raises(PipelineError, match="is at it"),
        writing_folder(output, resumable=True) as folder,
        writing_folder(folder.parent / output.name, resumable=True),
    ):
        pytest.fail("both hold it")
    (folder / "first").touch()
    assert list_files(output) == ["old"]
    with writing_folder(output, resumable=True) as folder:
        assert list_files(folder) == ["first"]
        (folder / "second").touch()
    assert list_files(output) == ["first", "second"]
    assert list_files(tmp_path) == ["out"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_name_is_given_only_where_it_is_free(tmp_path, monkeypatch, has_links):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    if not has_links:
        monkeypatch.setattr(workspace.os, "link", refuse)
    (tmp_path / "new").write_text("new")
    assert move_unless_taken(tmp_path / "new", tmp_path / "name")
    assert list_files(tmp_path) == ["name"]
    if has_links:
        (tmp_path / "new").write_text("other")
        assert not move_unless_taken(tmp_path / "new", tmp_path / "name")
        assert (tmp_path / "name").read_text() == "new"
