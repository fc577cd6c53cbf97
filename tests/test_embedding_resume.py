"""Stage 8 interrupted, sharded, cut and taken up again."""

import json
import os
import random
import shutil
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_models import (
    list_parts,
    read_bytes,
    read_dataset,
    write_packaged,
)
from stage8_fixtures import PHOTOGRAPHS, read_state

SCRIPT = "publish_model/generate_embeddings_from_parquet.py"


# ---------------------------------------------------------------------------------------------------- resuming


def test_a_rerun_is_a_no_op_and_loads_no_model(embed, packaged, tmp_path, monkeypatch):
    embed(packaged, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    monkeypatch.setattr("publish_model.new_data.batch_embedding.embed_batches", None)
    outcome = embed(packaged, tmp_path / "out")
    assert outcome.code == 0
    assert outcome.stdout == ""
    assert "nothing redone" in outcome.stderr
    assert "37 in = 37 out" in outcome.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before


def test_a_rerun_redoes_just_the_parts_that_are_gone_or_damaged(embed, packaged, tmp_path, undisturbed):
    embed(packaged, tmp_path / "out")
    parts, rejects = list_parts(tmp_path / "out"), sorted((tmp_path / "out" / "_rejects").iterdir())
    parts[0].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:-200])
    parts[2].write_bytes(b"")
    shutil.copy(parts[5], parts[4])  # another part under this one's name
    rejects[6].unlink()
    untouched = {path: path.stat().st_mtime_ns for path in (parts[3], parts[5], *parts[7:])}
    outcome = embed(packaged, tmp_path / "out")
    assert outcome.code == 0
    assert f"{parts[1]}: damaged: it is made again" in outcome.stderr
    assert f"{parts[4]}: damaged: it is made again" in outcome.stderr
    assert read_bytes(tmp_path / "out") == undisturbed
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert read_state(tmp_path / "out")["complete"] is True


@pytest.mark.parametrize("content", [None, "", "{", '{"complete": true}', "[]"])
def test_a_lost_state_is_made_again_from_the_parts(embed, packaged, tmp_path, undisturbed, content):
    output = tmp_path / "out"
    embed(packaged, output)
    state = (output / "state.json").read_text()
    list_parts(output)[3].unlink()
    (output / "state.json").unlink() if content is None else (output / "state.json").write_text(content)
    outcome = embed(packaged, output)
    assert outcome.code == 0
    assert "state.json: missing or damaged: made again from the parts" in outcome.stderr
    assert (output / "state.json").read_text() == state
    assert read_bytes(output) == undisturbed


def test_a_lost_state_does_not_let_another_run_into_the_dataset(embed, packaged, tmp_path):
    embed(packaged, tmp_path / "out")
    (tmp_path / "out" / "state.json").unlink()
    outcome = embed(packaged, tmp_path / "out", read_batch_size=5)
    assert outcome.code == 1
    assert "read_batch_size was 4 and is now 5" in outcome.stderr
    assert not (tmp_path / "out" / "state.json").exists()


@pytest.mark.parametrize("extra", ["rg00077_rb00000.parquet", "copy.parquet"])
def test_a_file_that_is_no_part_of_this_input_is_refused(embed, packaged, tmp_path, extra):
    embed(packaged, tmp_path / "out")
    shutil.copy(list_parts(tmp_path / "out")[0], tmp_path / "out" / "parts" / extra)
    outcome = embed(packaged, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'out' / 'parts' / extra}: no part of this input: give the --input and --read-batch-size "
        "that it was made with, or move it away"
    )


def test_parts_that_do_not_say_what_they_were_made_from_are_not_replaced(embed, packaged, tmp_path):
    parts_dir = tmp_path / "out" / "parts"
    parts_dir.mkdir(parents=True)
    pq.write_table(pa.table({"OSMID": [1]}), parts_dir / "rg00000_rb00000.parquet")
    for options in ((), ("--overwrite",)):
        outcome = embed(packaged, tmp_path / "out", *options)
        assert outcome.code == 1
        assert "rg00000_rb00000.parquet: not written by this project" in outcome.stderr.splitlines()[-1]
        assert pq.read_table(parts_dir / "rg00000_rb00000.parquet")["OSMID"].to_pylist() == [1]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_logs", "parts"]


def test_rejects_of_others_are_not_written_over(embed, packaged, tmp_path):
    embed(packaged, tmp_path / "out")
    part = list_parts(tmp_path / "out")[0]
    part.unlink()
    rejects = tmp_path / "out" / "_rejects" / part.name
    rejects.write_text("mine")
    outcome = embed(packaged, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1].startswith(f"error: {rejects}: not written by this project")
    assert rejects.read_text() == "mine"
    assert not part.exists()


def test_another_input_is_refused_and_named(embed, packaged, tmp_path):
    embed(packaged, tmp_path / "out")
    source = tmp_path / "other.parquet"
    write_packaged(source, [*PHOTOGRAPHS[:-1], b""], row_group_size=10)
    outcome = embed(source, tmp_path / "out")
    assert outcome.code == 1
    assert "input_size was" in outcome.stderr
    write_packaged(source, PHOTOGRAPHS, row_group_size=10, year=[2020] * 37)
    outcome = embed(source, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.stderr.count("error: ") == 1


def test_the_same_input_and_model_under_other_paths_are_the_same(embed, packaged, model_dir, tmp_path, undisturbed):
    embed(packaged, tmp_path / "out", "--limit", 20)
    moved = tmp_path / "elsewhere" / "renamed.parquet"
    moved.parent.mkdir()
    shutil.copy(packaged, moved)
    os.utime(moved, (1, 1))
    copied = shutil.copytree(model_dir, tmp_path / "elsewhere" / "model")
    assert embed(moved, tmp_path / "out", model=copied).code == 0
    assert read_bytes(tmp_path / "out") == undisturbed
    assert read_state(tmp_path / "out")["input_path"] == packaged.name


def test_another_model_is_refused_and_named(embed, packaged, model_dir, tmp_path):
    embed(packaged, tmp_path / "out", "--limit", 4)
    other = shutil.copytree(model_dir, tmp_path / "model")
    processor = other / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("64", "60"))
    outcome = embed(packaged, tmp_path / "out", model=other)
    assert outcome.code == 1
    assert "embedding_version was" in outcome.stderr
    assert "another model, processor, pooling or precision" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--no-filter-valid"], "filter_valid was True and is now False"),
        (["--read-batch-size", "5"], "read_batch_size was 4 and is now 5"),
        (["--dtype", "bfloat16"], "precision was 'float32' and is now 'bfloat16'"),
    ],
)
def test_other_settings_are_refused_and_named(embed, packaged, tmp_path, arguments, difference):
    embed(packaged, tmp_path / "out", "--limit", 4)
    before = read_bytes(tmp_path / "out")
    outcome = embed(packaged, tmp_path / "out", *arguments)
    assert outcome.code == 1
    assert difference in outcome.stderr
    assert "state.json: made from another input, model or setting: " in outcome.stderr
    assert "--overwrite to begin anew" in outcome.stderr
    assert read_bytes(tmp_path / "out") == before
    assert embed(packaged, tmp_path / "out", *arguments, "--overwrite").code == 0


def test_what_does_not_shape_the_data_may_change(embed, packaged, tmp_path):
    embed(packaged, tmp_path / "out", "--limit", 4)
    assert embed(packaged, tmp_path / "out", "--batch-size", 3, "--device", "auto").code == 0
    assert read_state(tmp_path / "out")["complete"] is True


def test_a_dataset_goes_on_in_the_precision_in_which_it_was_begun(embed, packaged, tmp_path):
    assert embed(packaged, tmp_path / "out", "--limit", 4, "--dtype", "bfloat16").code == 0
    assert embed(packaged, tmp_path / "out").code == 0
    assert read_state(tmp_path / "out")["precision"] == "bfloat16"


# ---------------------------------------------------------------------------------------------------- overwriting


def test_a_dataset_that_is_overwritten_stays_where_the_new_model_is_none(embed, packaged, toy_backbone, tmp_path):
    output = tmp_path / "out"
    assert embed(packaged, output).code == 0
    before, state = read_bytes(output), read_state(output)
    (tmp_path / "empty").mkdir()
    for model in (toy_backbone, tmp_path / "empty", tmp_path / "none"):
        assert embed(packaged, output, "--overwrite", model=model).code == 1
        assert read_bytes(output) == before
        assert read_state(output) == state


def test_a_model_that_cannot_be_used_begins_no_dataset(embed, packaged, toy_backbone, tmp_path):
    assert embed(packaged, tmp_path / "out", model=toy_backbone).code == 1
    assert not (tmp_path / "out" / "state.json").exists()


def test_a_dataset_that_is_overwritten_stays_until_the_new_one_is_complete(embed, packaged, tmp_path, undisturbed):
    output = tmp_path / "out"
    assert embed(packaged, output, read_batch_size=5).code == 0
    old = read_bytes(output)
    assert embed(packaged, output, "--overwrite", "--limit", 10).code == 0
    assert read_bytes(output / "_removed" / "1") == old
    assert embed(packaged, output).code == 0
    assert read_bytes(output) == undisturbed
    assert not (output / "_removed").exists()


# ---------------------------------------------------------------------------------------------------- limit


def test_a_limit_cuts_a_part_which_a_longer_run_makes_again(embed, packaged, tmp_path, undisturbed):
    output = tmp_path / "out"
    assert embed(packaged, output, "--limit", 15).code == 0
    state = read_state(output)
    assert (state["rows_embedded"], state["parts_done"], state["complete"]) == (15, 4, False)
    assert read_dataset(output)["OSMID"].to_pylist() == pq.read_table(packaged)["OSMID"].to_pylist()[:15]
    cut = output / "parts" / "rg00001_rb00001.parquet"
    assert json.loads(pq.read_schema(cut).metadata[b"spatial_building_embeddings"])["cut"] is True
    assert pq.read_metadata(cut).num_rows == 1
    assert "nothing redone" in embed(packaged, output, "--limit", 15).stderr
    assert "nothing redone" in embed(packaged, output, "--limit", 3).stderr
    assert embed(packaged, output, "--limit", 16).code == 0
    assert pq.read_metadata(cut).num_rows == 2
    assert embed(packaged, output).code == 0
    assert read_bytes(output) == undisturbed
    assert read_state(output)["complete"] is True


def test_a_limit_beyond_the_input_completes_it(embed, packaged, tmp_path, undisturbed):
    assert embed(packaged, tmp_path / "out", "--limit", 1000).code == 0
    assert read_state(tmp_path / "out")["complete"] is True
    assert read_bytes(tmp_path / "out") == undisturbed


# ---------------------------------------------------------------------------------------------------- shards


def test_shards_one_after_the_other_make_what_one_process_makes(embed, packaged, tmp_path, undisturbed):
    for index in (1, 0, 2):
        outcome = embed(packaged, tmp_path / "out", "--shard", f"{index}/3")
        assert outcome.code == 0
        assert read_state(tmp_path / "out")["complete"] is (index == 2)
    assert "7 in = 7 out" not in outcome.stderr  # shard 2 of 3 has row group 2 alone
    assert "10 in = 10 out" in outcome.stderr
    assert read_bytes(tmp_path / "out") == undisturbed
    assert (tmp_path / "out" / "_logs" / "generate_embeddings_from_parquet.1of3.log").exists()


@pytest.mark.slow
def test_of_two_shards_at_once_one_may_be_killed_and_run_again(
    start_script, embed, packaged, model_dir, tmp_path, undisturbed
):
    output = tmp_path / "out"
    arguments = ["-i", packaged, "-o", output, "--model-id", model_dir, "--read-batch-size", 4, "--device", "cpu"]
    first = start_script(SCRIPT, *arguments, "--shard", "0/2", cwd=tmp_path)
    wait_and_signal(start_script(SCRIPT, *arguments, "--shard", "1/2"), output / "parts", "rg00001*", 1, signal.SIGKILL)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    assert embed(packaged, output, "--shard", "1/2").code == 0
    assert read_bytes(output) == undisturbed
    assert read_state(output)["complete"] is True
    assert list(output.rglob(".*")) == []


# ---------------------------------------------------------------------------------------------------- interruptions


def wait_and_signal(process, parts_dir, pattern, num_parts, number):
    """Signal a process when so many parts are there, and return its exit code and stderr."""
    while process.poll() is None:
        if len(list(parts_dir.glob(pattern))) >= num_parts:
            process.send_signal(number)
            break
        time.sleep(0.001)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def check_signal(start_script, embed, model_dir, tmp_path, number, expected_code):
    source = write_packaged(tmp_path / "in.parquet", PHOTOGRAPHS * 10, row_group_size=1000)
    output = tmp_path / "out"
    arguments = ["-i", source, "-o", output, "--model-id", model_dir, "--read-batch-size", 2]
    code, errors = wait_and_signal(start_script(SCRIPT, *arguments), output / "parts", "rg*", 3, number)
    assert code == expected_code, errors
    assert errors.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in errors
    state = read_state(output)
    assert state["parts_done"] == len(list_parts(output)) >= 3
    assert state["complete"] is False
    assert embed(source, output, read_batch_size=2).code == 0
    assert read_state(output)["complete"] is True


@pytest.mark.slow
def test_sigterm_keeps_the_finished_parts_and_says_so(start_script, embed, model_dir, tmp_path):
    check_signal(start_script, embed, model_dir, tmp_path, signal.SIGTERM, 143)


@pytest.mark.slow
def test_ctrl_c_keeps_the_finished_parts_and_says_so(start_script, embed, model_dir, tmp_path):
    check_signal(start_script, embed, model_dir, tmp_path, signal.SIGINT, 130)


@pytest.mark.slow
def test_killed_ten_times_gives_what_an_undisturbed_run_gives(start_script, embed, model_dir, tmp_path):
    source = write_packaged(tmp_path / "in.parquet", PHOTOGRAPHS * 4, row_group_size=40)
    assert embed(source, tmp_path / "undisturbed", read_batch_size=2).code == 0
    output = tmp_path / "out"
    arguments = ["-i", source, "-o", output, "--model-id", model_dir, "--read-batch-size", 2, "--device", "cpu"]
    generator = random.Random(0)
    for number in range(1, 11):
        wanted = number * 70 // 11 + generator.randrange(3)
        code, _ = wait_and_signal(start_script(SCRIPT, *arguments), output / "parts", "rg*", wanted, signal.SIGKILL)
        assert code == -signal.SIGKILL
    assert embed(source, output, read_batch_size=2).code == 0
    assert read_bytes(output) == read_bytes(tmp_path / "undisturbed")
    assert read_state(output)["complete"] is True
    assert list(output.rglob(".*")) == []
