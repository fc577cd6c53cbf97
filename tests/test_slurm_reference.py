"""What the reference implementation left is complete for a stage by hand, for submit and for status alike."""

import shlex
from pathlib import Path

import pytest
from raw_tars import Entry, make_city, write_tar
from reference_files import age

from difficulty_metadata import compute_visual_neighbors
from generate_embeddings import generate_embeddings
from pipeline.config import load_config
from preprocess_raw_data import compute_fingerprints, merge_and_split, process_tar
from slurm.control import scheduler, submit
from slurm.status import survey

STAGES = {
    1: process_tar, 2: generate_embeddings, 3: merge_and_split, 4: compute_fingerprints, 5: compute_visual_neighbors,
}  # fmt: skip


@pytest.fixture
def config_path(tmp_path, toy_backbone, write_config, run_main, monkeypatch):
    """A configuration of which the reference implementation has done stages 1 to 5."""
    monkeypatch.setattr(scheduler, "ask", lambda _command: None)
    path = write_config(
        tmp_path,
        embedding_model={"model_name": str(toy_backbone)},
        difficulty={"neighbors": 5, "k0_for_local_scale": 2},
    )
    for dataset_id in (1, 2, 3):  # the tars have one folder, their intermediates two
        entries = [Entry(entry.name.split("/", 1)[1], entry.data) for entry in make_city(dataset_id, (3, 2, 4, 2))]
        write_tar(tmp_path / f"raw/{dataset_id:04d}.tar", entries)
    for stage in STAGES.values():
        assert run_main(stage.main, "--config", path).code == 0
    for name in ("0001", "0002", "0003"):
        age(tmp_path / f"intermediates/{name}.parquet", without=("building_id", "streetview_image_id"),
            prefix=f"{name}/")  # fmt: skip
        age(tmp_path / f"embeddings/{name}_embeddings.parquet", prefix=f"{name}/")
        age(tmp_path / f"fingerprints/{name}_fingerprints.parquet")
    for found in [*tmp_path.glob("merged/*.parquet"), tmp_path / "difficulty.parquet"]:
        age(found)
    return path


def list_jobs(run_main, *words):
    outcome = run_main(submit.main, *words, "--dry-run")
    assert outcome.code == 0, outcome.stderr
    commands = [shlex.split(line) for line in outcome.stdout.splitlines()]
    return [Path(word).stem for command in commands for word in command if word.endswith(".sbatch")]


def test_the_pipeline_goes_on_behind_what_is_taken_over(config_path, run_main):
    options = ["--config", config_path]
    assert list_jobs(run_main, "stage", "2", *options) == []
    assert list_jobs(run_main, "stage", "4", *options) == []
    assert list_jobs(run_main, "pipeline", "--from-stage", "6", *options) == ["train", "convert_to_hf", "evaluate"]
    for name in ("merged/train.parquet", "merged/val.parquet", "merged/test.parquet", "difficulty.parquet"):
        (config_path.parent / name).unlink()
    jobs = ["merge_and_split", "compute_visual_neighbors", "train", "convert_to_hf", "evaluate"]
    assert list_jobs(run_main, "pipeline", "--from-stage", "2", *options) == jobs


def test_a_stage_by_hand_submit_and_status_agree_on_what_is_complete(config_path, run_main):
    states = {stage["stage"]: stage for stage in survey(load_config(config_path))}
    for number, stage in STAGES.items():
        by_hand = run_main(stage.main, "--config", config_path)
        submitted = run_main(submit.main, "stage", str(number), "--config", config_path, "--dry-run")
        assert (number, by_hand.code, submitted.stdout) == (number, submitted.code, "")
        is_done = states[number]["done"] == states[number]["total"]
        assert is_done == (by_hand.code == 0) == (number in (2, 4))
        if not is_done:
            assert "it does not say what it was made from" in states[number]["failures"][0]["error"]
