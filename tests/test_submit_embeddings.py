"""Submitting stage 8 alone: every option and every input of the stage."""

import shlex
from dataclasses import fields

import pytest
from published_models import write_packaged
from slurm_fixtures import dry_run

from publish_model.new_data.embed_options import EmbedOptions
from publish_model.new_data.embed_options import parse as parse_embed_options
from slurm.control import submit
from slurm.control.target import spell_options


def test_a_dry_run_for_new_data_prints_one_array(slurmless, tmp_path):
    (command,) = dry_run(
        "--account", "a", "--input", "in put.parquet", "--output", "out", "--model-id", "x/y", "--batch-size", "64",
        "--array-size", "4", "--limit", "10", "--nice=5",
        script="publish_model/slurm/submit_embeddings_from_parquet.sh", cwd=tmp_path, PATH=slurmless,
    )  # fmt: skip
    text = shlex.join(command)
    assert "--array=0-3 " in text
    assert "--nice=5 " in text
    assert f"--shards 4 --input '{tmp_path}/in put.parquet' --output {tmp_path}/out --model-id x/y" in text
    assert text.endswith("--batch-size 64 --limit 10")


def test_every_option_of_stage_8_goes_to_the_stage_and_none_to_sbatch(dry_run_here, tmp_path):
    values = {
        "batch_size": 7, "device": "cpu", "dtype": "float32", "limit": 7, "filter_valid": False,
        "read_batch_size": 5, "max_reject_fraction": 0.5, "keep_columns": ("year", "a b"),
        "id_column": "id", "image_column": "image", "trust_remote_code": True,
    }  # fmt: skip
    wanted = EmbedOptions(input=tmp_path / "in", output=tmp_path / "out", model_id="x/y", **values)
    others = {"shard", "overwrite"}  # the array's, refused
    assert {field.name for field in fields(EmbedOptions)} - others == {"input", "output", "model_id", *values}
    words = spell_options(wanted)
    assert parse_embed_options("", words) == wanted
    (command,) = dry_run_here(submit.main, "embeddings", *words, "--qos=high")
    place = next(number for number, word in enumerate(command) if word.endswith(".sbatch"))
    assert command[place + 1 :] == ["--shards", "1", *words]
    assert "--qos=high" in command[:place]


def test_a_folder_is_submitted_by_its_row_groups(dry_run_here, tmp_path):
    for name in ("a.parquet", "b.pq"):
        write_packaged(tmp_path / "packaged" / name, [b"x"] * 3, row_group_size=1, OSMID=range(3))
    arguments = ["--input", tmp_path / "packaged", "--output", tmp_path / "out", "--model-id", "x/y"]
    (command,) = dry_run_here(submit.main, "embeddings", *arguments, "--array-size", 99)
    assert "--array=0-5" in command


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--overwrite", "error: --overwrite: a task that is requeued would begin anew each time"),
        ("--shard=0/2", "error: --shard: the tasks of the array are the shards: give --array-size N"),
    ],
)
def test_what_only_one_process_can_do_is_not_submitted(run_main, option, complaint):
    outcome = run_main(submit.main, "embeddings", "--input", "a", "--output", "b", option)
    assert outcome.code == 2
    assert outcome.stderr.startswith(complaint)


def test_a_missing_input_for_new_data_leaves_no_folder(run_main, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "spatial_embeddings"}')
    arguments = ["--input", tmp_path / "no.parquet", "--output", tmp_path / "out", "--model-id", tmp_path / "model"]
    outcome = run_main(submit.main, "embeddings", *arguments)
    assert outcome.code == 1
    assert "no.parquet: no such file" in outcome.stderr
    assert not (tmp_path / "out").exists()
