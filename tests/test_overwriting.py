"""--overwrite, in every stage: what is replaced stays until what replaces it is there."""

import os

import pytest
from embedding_files import SIZES, make_rows, write
from published_models import make_photographs, write_packaged
from training_data import SETTINGS, fill_workspace, run

from pipeline import workspace
from pipeline.errors import PipelineError
from pipeline.workspace import replacing, writing_folder
from preprocess_raw_data import merge_and_split
from preprocess_raw_data.merging.splits import SPLITS
from train_specialized_embeddings.training.training_run import TrainingRun


def read(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_checkpoints_stay_where_the_splits_cannot_be_trained_on(tmp_path, write_config):
    fill_workspace(tmp_path)
    write_config(tmp_path, **SETTINGS)
    run(tmp_path)
    before = read(tmp_path / "checkpoint")
    val = tmp_path / "merged" / "val.parquet"
    whole = val.read_bytes()
    val.write_bytes(whole[: len(whole) // 2] + whole[len(whole) // 2 + 9 :])
    with pytest.raises(PipelineError):
        run(tmp_path, overwrite=True)
    assert read(tmp_path / "checkpoint") == before


def test_checkpoints_stay_until_the_new_run_is_complete(tmp_path, write_config, monkeypatch):
    fill_workspace(tmp_path)
    write_config(tmp_path, **SETTINGS)
    run(tmp_path)
    before = read(tmp_path / "checkpoint")

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "settle", stop)  # the last epoch is saved, the best one not chosen
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, overwrite=True)
    assert read(tmp_path / "checkpoint" / "_replaced" / "1") == before
    run(tmp_path)
    assert not (tmp_path / "checkpoint" / "_replaced").exists()
    assert read(tmp_path / "checkpoint").keys() == before.keys()


def test_what_a_killed_run_moved_aside_is_what_comes_back(tmp_path):
    mark, log = tmp_path / "mark", tmp_path / "_log"
    (tmp_path / "_replaced" / "1").mkdir(parents=True)
    (tmp_path / "_replaced" / "1" / "mark").write_text("whole")
    log.mkdir()
    mark.write_text("half")
    with pytest.raises(PipelineError), replacing(tmp_path, [mark, log]):
        raise PipelineError("no")
    assert mark.read_text() == "whole"
    assert not log.exists()
    assert not (tmp_path / "_replaced").exists()


def test_what_was_moved_aside_goes_when_its_successor_is_complete(tmp_path):
    mark = tmp_path / "mark"
    mark.write_text("old")
    with replacing(tmp_path, [mark]):
        assert not mark.exists()
        mark.write_text("new")
        assert (tmp_path / "_replaced" / "1" / "mark").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["mark"]


def test_a_folder_comes_back_where_its_successor_cannot_take_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    plain = os.replace

    def fail(name, target, **folders):
        if target == "model" and not name.endswith(".old"):
            raise OSError(5, os.strerror(5), name)
        return plain(name, target, **folders)

    monkeypatch.setattr(workspace.os, "replace", fail)
    with pytest.raises(PipelineError, match="cannot write .*model"), writing_folder(folder) as temporary:
        (temporary / "weights").write_text("new")
    assert (folder / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_a_killed_run_moved_aside_comes_back(tmp_path):
    folder = tmp_path / "model"
    moved = tmp_path / ".model.old"
    moved.mkdir()
    (moved / "weights").write_text("old")
    with pytest.raises(ValueError, match="no"), writing_folder(folder):
        raise ValueError("no")
    assert (folder / "weights").read_text() == "old"


def test_what_the_user_put_into_a_replaced_folder_stays(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("weights", "old_weights", "notes.txt"):
        (folder / name).write_text("old")
    with writing_folder(folder, made=r".*weights") as temporary:
        (temporary / "weights").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"weights": "new", "notes.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_the_user_keeps_where_old_output_is_set_aside_stays(tmp_path, caplog):
    (tmp_path / "_replaced" / "photographs").mkdir(parents=True)
    (tmp_path / "mark").write_text("old")
    with replacing(tmp_path, [tmp_path / "mark"]):
        (tmp_path / "mark").write_text("new")
    assert [path.name for path in (tmp_path / "_replaced").iterdir()] == ["photographs"]
    assert "photographs: not written by this project" in caplog.text


def test_splits_stay_where_the_new_ones_find_no_room(tmp_path, write_config, monkeypatch, run_main):
    write(tmp_path, 1, make_rows(1, SIZES))
    config = write_config(tmp_path)
    assert run_main(merge_and_split.main, "--config", config).code == 0
    before = read(tmp_path / "merged")
    plain, synced = workspace.sync_file, []

    def fill_disk(path):
        synced.append(path)
        if len(synced) == len(SPLITS):
            raise OSError(28, os.strerror(28))
        plain(path)

    monkeypatch.setattr(workspace, "sync_file", fill_disk)
    outcome = run_main(merge_and_split.main, "--config", config, "--overwrite")
    assert outcome.code == 1
    assert "No space left" in outcome.stderr.splitlines()[-1]
    assert read(tmp_path / "merged") == before


@pytest.mark.parametrize("name", ["state.json", "_rejects/rg00000_rb00000.parquet"])
def test_stage_8_removes_no_folder_in_place_of_a_file(embed, tmp_path, name):
    source, dataset = write_packaged(tmp_path / "in.parquet", make_photographs(4)), tmp_path / "out"
    assert embed(source, dataset).code == 0
    (dataset / name).unlink()
    (dataset / name).mkdir()
    (dataset / name / "notes.txt").touch()
    for options in (["--overwrite"], []):
        outcome = embed(source, dataset, *options)
        assert outcome.code == 1
        assert "Traceback" not in outcome.stderr
    assert (dataset / name / "notes.txt").exists()


def test_a_folder_of_the_users_in_the_place_of_a_file_stays(tmp_path):
    theirs = tmp_path / "model" / "weights" / "photograph.jpg"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    (tmp_path / "model" / "mark").write_text("old")
    writings = [
        lambda: writing_folder(theirs.parent.parent, made="weights|mark"),
        lambda: replacing(theirs.parent.parent, [theirs.parent.parent / "mark", theirs.parent]),
    ]
    for writing in writings:
        with pytest.raises((PipelineError, OSError), match="a folder of yours"), writing():
            pass
    with pytest.raises(OSError, match="a folder of yours"):
        workspace.remove(theirs.parent)
    assert theirs.read_text() == "mine"
    assert (tmp_path / "model" / "mark").read_text() == "old"
