"""Rows kept on disk while they are computed."""

import os

import numpy as np
import pytest

from pipeline.errors import PipelineError, Rejection
from pipeline.files import scratch as scratch_module
from pipeline.files.scratch import RowScratch

ROWS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def open_scratch(tmp_path, identity="one"):
    return RowScratch(tmp_path / "out" / "0001.parquet", identity)


def list_files(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def test_rows_are_read_at_their_places_in_any_order_of_writing(tmp_path):
    scratch = open_scratch(tmp_path)
    scratch.write([4, 0, 2], ROWS[[4, 0, 2]])
    scratch.write([1], ROWS[[1]])
    np.testing.assert_array_equal(scratch.read(0, 3), ROWS[:3])
    np.testing.assert_array_equal(scratch.read(3, 6), [np.zeros(4), ROWS[4], np.zeros(4)])
    scratch.remove()
    scratch.close()
    assert list_files(tmp_path) == []


def test_nothing_that_was_never_written_is_read_as_more_than_zero(tmp_path):
    scratch = open_scratch(tmp_path)
    assert scratch.read(0, 6).shape == (6, 0)
    scratch.remove()
    scratch.close()


def test_what_was_saved_is_taken_up_by_a_run_of_the_same_identity(tmp_path):
    first = open_scratch(tmp_path)
    first.write([0, 1], ROWS[:2])
    first.seen, first.rejects[2] = 3, Rejection("unreadable_image", "0 bytes")
    first.save()
    first.write([3], ROWS[[3]])  # behind the note: done again
    first.close()
    second = open_scratch(tmp_path)
    assert (second.seen, second.width) == (3, 4)
    assert {row: (why.reason, why.detail) for row, why in second.rejects.items()} == {
        2: ("unreadable_image", "0 bytes")
    }
    np.testing.assert_array_equal(second.read(0, 2), ROWS[:2])
    second.remove()
    second.close()
    assert list_files(tmp_path) == []


def test_what_another_run_left_is_thrown_away(tmp_path):
    first = open_scratch(tmp_path)
    first.write([0], ROWS[:1])
    first.seen = 1
    first.save()
    first.close()
    second = open_scratch(tmp_path, "two")
    assert (second.seen, second.width, second.rejects) == (0, None, {})
    second.write([5], ROWS[[5]])
    np.testing.assert_array_equal(second.read(0, 1), np.zeros((1, 4)))
    second.remove()
    second.close()


@pytest.mark.parametrize("damage", ["note gone", "note cut", "note of something else", "rows gone", "rows cut"])
def test_what_is_not_whole_is_begun_anew(tmp_path, damage):
    first = open_scratch(tmp_path)
    first.write([0, 1], ROWS[:2])
    first.seen = 2
    first.save()
    first.close()
    rows, note = tmp_path / "out" / ".0001.parquet.rows", tmp_path / "out" / ".0001.parquet.progress.json"
    if damage == "note gone":
        note.unlink()
    elif damage == "note cut":
        note.write_text(note.read_text()[:20])
    elif damage == "note of something else":
        note.write_text("[1]")
    elif damage == "rows gone":
        rows.unlink()
    else:
        os.truncate(rows, 20)
    second = open_scratch(tmp_path)
    assert second.seen == 0
    second.remove()
    second.close()


def test_one_process_at_a_time_holds_it(tmp_path):
    first = open_scratch(tmp_path)
    with pytest.raises(PipelineError, match=r"0001\.parquet: process \d+ on \S+ is making it: wait for that one"):
        open_scratch(tmp_path)
    first.close()
    open_scratch(tmp_path).close()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    scratch = open_scratch(tmp_path)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch_module.os, "pwrite", refuse)
    with pytest.raises(PipelineError, match=r"cannot write .*\.rows \(No space left on device\): free space"):
        scratch.write([0], ROWS[:1])
    scratch.remove()
    scratch.close()


def test_a_row_of_which_only_a_part_has_found_room_is_no_row(tmp_path, monkeypatch):
    scratch, write = open_scratch(tmp_path), os.pwrite
    monkeypatch.setattr(scratch_module.os, "pwrite", lambda file, data, place: write(file, data[:3], place))
    with pytest.raises(PipelineError, match=r"cannot write .*\.rows \(No space left on device\)"):
        scratch.write([0], ROWS[:1])
    scratch.remove()
    scratch.close()


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(PipelineError, match=r"cannot write .*0001\.parquet"):
        open_scratch(tmp_path)
