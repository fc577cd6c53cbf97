"""Locks, unfinished folders and removal: the ways to work in a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import workspace
from pipeline.errors import PipelineError
from pipeline.workspace import (
    clear_temporaries,
    locked,
    read_json,
    read_json_object,
    remove,
    remove_made,
    temporary_path,
    write_json,
    writing_folder,
    writing_to,
)

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
        "import os, sys; from pathlib import Path; from pipeline.workspace import locked\n"
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


def test_a_lock_on_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workspace.os, "pwrite", fail)
    with pytest.raises(PipelineError, match=r"cannot write .*\.a\.lock \(No space left"), locked(tmp_path / "a", BUSY):
        pass
    monkeypatch.undo()
    assert not list_files(tmp_path)


def test_those_that_share_a_lock_keep_out_only_one_that_does_not(tmp_path):
    output = tmp_path / "a"
    with locked(output, BUSY, shared=True):
        with locked(output, BUSY, shared=True):
            pass
        with pytest.raises(PipelineError, match=BUSY), locked(output, BUSY):
            pytest.fail("both hold it")
    assert list_files(tmp_path) == []
    with (
        locked(output, BUSY),
        pytest.raises(PipelineError, match=BUSY),
        locked(output, BUSY, shared=True),
    ):
        pytest.fail("both hold it")


def test_a_file_system_without_locks_is_no_obstacle_and_said(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(workspace.fcntl, "flock", refuse)
    with locked(tmp_path / "out" / "a", BUSY):
        assert "out: this file system has no locks: let one process at a time work there" in caplog.text
    assert list_files(tmp_path / "out") == []


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to, lambda path, _: os.mkfifo(path)])
def test_a_lock_that_is_a_link_or_pipe_is_refused(tmp_path, make):
    (tmp_path / "notes").write_text("mine")
    make(tmp_path / ".a.lock", tmp_path / "notes")
    with pytest.raises(PipelineError, match=r"cannot write .*\.a\.lock \(.* is a link"), locked(tmp_path / "a", BUSY):
        pass
    assert (tmp_path / "notes").read_text() == "mine"


def test_json_is_not_waited_for_at_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "kernel.json").symlink_to("/proc/self/status")
    with pytest.raises(OSError, match="not a file"):
        read_json(tmp_path / "kernel.json")
    assert read_json_object(tmp_path / "a.json") == {}
    with pytest.raises(OSError, match="not a file"):
        read_json(tmp_path / "a.json")


def test_json_of_absurd_length_is_not_read(tmp_path):
    (tmp_path / "a.json").touch()
    os.truncate(tmp_path / "a.json", 2**40)
    assert read_json_object(tmp_path / "a.json") == {}


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "_theirs").mkdir()
    (tmp_path / "_theirs" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "_theirs")
    remove(tmp_path / "link")
    assert list_files(tmp_path) == ["_theirs"]
    assert list_files(tmp_path / "_theirs") == ["file"]
    remove(tmp_path / "_theirs")
    remove(tmp_path / "_theirs")
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
def test_a_file_that_is_written_once_leaves_one_that_is_there(tmp_path, monkeypatch, has_links):
    def refuse(*_, **__):
        raise OSError(95, "Operation not supported")

    if not has_links:
        monkeypatch.setattr(workspace.os, "link", refuse)
    write_json(tmp_path / "name", "first", once=True)
    assert list_files(tmp_path) == ["name"]
    if has_links:
        write_json(tmp_path / "name", "second", once=True)
    assert (tmp_path / "name").read_text() == '"first"\n'
    assert list_files(tmp_path) == ["name"]


def plant_folder(tmp_path, name):
    """Return a user's folder with a file, to which a link of that name leads."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "1").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("name", ["_rejects", "_removed", "parts", ".unfinished"])
def test_nothing_is_made_or_removed_behind_a_link_in_an_output(tmp_path, name):
    theirs = plant_folder(tmp_path, name)
    with (
        pytest.raises(PipelineError, match=rf"cannot write .*out/{name} is a link"),
        writing_to(tmp_path / "out" / name / "deeper" / "a") as temporary,
    ):
        temporary.write_text("ours")
    for removal in (lambda folder: remove(folder / "1"), lambda folder: remove_made(folder, ".*")):
        with pytest.raises(OSError, match="a link or pipe, and nothing is made or removed through one"):
            removal(tmp_path / "out" / name)
    assert (theirs / "1").read_text() == "mine"
    assert list_files(theirs) == ["1"]


def test_a_folder_that_becomes_a_link_meanwhile_is_not_written_through(tmp_path):
    parts, theirs = tmp_path / "out" / "parts", tmp_path / "theirs"
    theirs.mkdir()

    def write(temporary):
        parts.rename(tmp_path / "moved")
        parts.symlink_to(theirs)
        temporary.write_text("ours")

    with pytest.raises(PipelineError, match="parts is a link"), writing_to(parts / "a") as temporary:
        write(temporary)
    assert list_files(theirs) == []
    assert [path.read_text() for path in (tmp_path / "moved").iterdir()] == ["ours"]


def test_an_output_may_be_a_link_itself(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    for name in ("a", "_rejects/a"):
        with writing_to(tmp_path / "out" / name) as temporary:
            temporary.write_text("ours")
    remove(tmp_path / "out" / "a")
    assert list_files(tmp_path / "scratch") == ["_rejects"]


@pytest.mark.parametrize("ending", ["unfinished", "old"])
def test_a_link_in_place_of_an_unfinished_folder_is_refused(tmp_path, ending):
    theirs = plant_folder(tmp_path, f".model.{ending}")
    with pytest.raises(PipelineError, match="is a link"), writing_folder(tmp_path / "out" / "model", resumable=True):
        pytest.fail("it was followed")
    assert list_files(theirs) == ["1"]


def test_a_temporary_file_is_made_anew_under_a_name_that_nobody_guesses(tmp_path):
    names = set()
    for _ in range(2):
        with writing_to(tmp_path / "a") as temporary:
            assert temporary.stat().st_size == 0
            names.add(temporary.name)
            temporary.write_text("ours")
    assert len(names) == 2
    planted = tmp_path / "planted"
    planted.symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="a link"):
        workspace.open_file(planted, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def test_temporary_files_go_with_their_process(tmp_path):
    mine = temporary_path(tmp_path / "a")
    dead = tmp_path / f".a.{workspace._host()}-{2**22 + 1}-{'0' * 16}.tmp"  # above any number of a process
    elsewhere, notes = tmp_path / f".a.elsewhere-1-{'0' * 16}.tmp", tmp_path / ".notes.tmp"
    for path in (mine, dead, elsewhere, notes):
        path.touch()
    clear_temporaries(tmp_path)
    assert list_files(tmp_path) == sorted(path.name for path in (mine, elsewhere, notes))
    assert [bool(workspace.is_temporary(path.name)) for path in (mine, dead, elsewhere, notes)] == [True] * 3 + [False]


def test_a_link_is_named_by_its_path_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x" / "_logs").mkdir(parents=True)
    link = (tmp_path / "x" / "_logs" / "a.log").relative_to(tmp_path)
    link.symlink_to("elsewhere")
    for flags in (os.O_WRONLY, os.O_WRONLY | os.O_CREAT):
        with pytest.raises(OSError, match="a link") as caught:
            workspace.open_file(link, flags)
        assert caught.value.filename == "x/_logs/a.log"
    with pytest.raises(FileNotFoundError) as missing:
        workspace.open_file(link.with_name("b.log"), os.O_RDONLY)
    assert missing.value.filename == "x/_logs/b.log"


def test_names_that_this_project_does_not_give_stay(tmp_path, caplog):
    for name in ("1", "2", "2021_photographs"):
        (tmp_path / "_removed" / name).mkdir(parents=True)
    remove_made(tmp_path / "_removed", r"\d+")
    assert list_files(tmp_path / "_removed") == ["2021_photographs"]
    assert "2021_photographs: not written by this project" in caplog.text
    (tmp_path / "_removed" / "2021_photographs").rmdir()
    remove_made(tmp_path / "_removed", r"\d+")
    assert list_files(tmp_path) == []
