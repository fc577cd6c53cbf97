"""What stage 8 refuses, in one line."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_models import (
    list_parts,
    read_bytes,
    write_packaged,
)
from stage8_fixtures import PHOTOGRAPHS, read_state

from publish_model import generate_embeddings_from_parquet as stage

# ---------------------------------------------------------------------------------------------------- what is refused


def check_refused(outcome, *texts, code=1):
    assert outcome.code == code
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for text in texts:
        assert text in last


def test_an_input_that_cannot_be_read_is_one_line_and_leaves_nothing_behind(embed, tmp_path):
    source = tmp_path / "in.parquet"
    check_refused(embed(source, tmp_path / "out"), f"{source}: no such file")
    source.write_bytes(b"PAR1 and no more")
    check_refused(embed(source, tmp_path / "out"), f"{source}: not a readable parquet file")
    empty = tmp_path / "empty"
    empty.mkdir()
    check_refused(embed(empty, tmp_path / "out"), f"{empty}: holds no parquet files: correct the path")
    write_packaged(source, [])
    check_refused(embed(source, tmp_path / "out"), f"{source}: holds no rows")
    assert not (tmp_path / "out").exists()


def test_wrong_columns_are_all_named(embed, tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"OSMID": [[1]], "is_valid": ["yes"]}), source)
    check_refused(
        embed(source, tmp_path / "out"),
        "column OSMID is list<element: int64>, expected a scalar type",
        "column image_bytes is missing",
        "column is_valid is string, expected bool",
    )
    pq.write_table(pa.table({"OSMID": [1], "image_bytes": ["text"]}), source)
    check_refused(embed(source, tmp_path / "out"), "column image_bytes is string, expected binary")
    pq.write_table(pa.table({"OSMID": [1], "image_bytes": [PHOTOGRAPHS[0]], "is_valid": ["yes"]}), source)
    assert embed(source, tmp_path / "out", "--no-filter-valid").code == 0


def test_damage_inside_the_input_is_one_line_and_the_whole_input_goes_on(embed, packaged, undisturbed, tmp_path):
    whole, output = packaged.read_bytes(), tmp_path / "out"
    offset = pq.read_metadata(packaged).row_group(2).column(1).data_page_offset
    with open(packaged, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 200)
    check_refused(embed(packaged, output), f"{packaged}: damaged (")
    assert read_state(output)["parts_done"] == len(list_parts(output)) <= 6
    packaged.write_bytes(whole)
    assert embed(packaged, output).code == 0
    assert read_bytes(output) == undisturbed


def test_too_many_rejects_fail_the_run_and_keep_what_was_made(embed, tmp_path):
    source = write_packaged(tmp_path / "in.parquet", [PHOTOGRAPHS[0], None, None, b"x"], is_valid=[True] * 4)
    outcome = embed(source, tmp_path / "out", "--max-reject-fraction", 0.7)
    assert outcome.code == 1
    assert "4 in = 1 out + 3 rejected" in outcome.stderr
    last = outcome.stderr.splitlines()[-1]
    assert "3 of 4 items were rejected, more than --max-reject-fraction = 0.7 allows" in last
    assert read_state(tmp_path / "out")["complete"] is True
    assert embed(source, tmp_path / "out").code == 0
    assert embed(source, tmp_path / "out", "--max-reject-fraction", 0.75).code == 0


def test_a_model_that_is_not_there_is_one_line_with_the_remedy(embed, packaged, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = tmp_path / "no" / "model"
    check_refused(embed(packaged, tmp_path / "out", model=missing), f"{missing}: no such model folder", "--model-id")
    check_refused(embed(packaged, tmp_path / "out", model="nobody/nothing"), "nobody/nothing: the model is neither")
    (tmp_path / "empty").mkdir()
    check_refused(embed(packaged, tmp_path / "out", model=tmp_path / "empty"), "not a model folder")


def test_a_backbone_without_projector_is_refused(embed, packaged, toy_backbone, tmp_path):
    check_refused(embed(packaged, tmp_path / "out", model=toy_backbone), "not L2-normalised", "stage 7")


def test_a_model_that_lacks_weights_is_refused(embed, packaged, model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights.pop("projector.shortcut.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    check_refused(embed(packaged, tmp_path / "out", model=broken), "1 weights are missing")


def test_embeddings_that_are_not_finite_stop_the_run_and_name_the_row(embed, packaged, tmp_path, monkeypatch):
    from pipeline.inference.backbone import Launched

    plain = Launched.result

    def spoil(self):
        embeddings = plain(self)
        if len(embeddings) == 4:  # a read batch, not the trial
            embeddings[2] = np.nan
        return embeddings

    monkeypatch.setattr(Launched, "result", spoil)
    check_refused(embed(packaged, tmp_path / "out"), "row 2: its embedding is not finite")
    assert list_parts(tmp_path / "out") == []


def test_an_output_that_cannot_be_written_is_one_line(embed, packaged, tmp_path):
    (tmp_path / "file").write_text("")
    check_refused(embed(packaged, tmp_path / "file" / "out"), f"cannot write {tmp_path / 'file' / 'out'}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "0"], ["--batch-size", "many"], ["--limit", "-1"], ["--read-batch-size", "0"],
        ["--max-reject-fraction", "1.5"], ["--max-reject-fraction", "x"], ["--device", "tpu"], ["--shard", "2/2"],
        ["--config", "config.toml"], ["--overwrite", "--shard", "0/2"],
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_with_code_2(embed, packaged, tmp_path, arguments):
    check_refused(embed(packaged, tmp_path / "out", *arguments), code=2)
    assert not (tmp_path / "out").exists()


def test_help_says_the_number_of_the_stage_first(run_main, capsys):
    outcome = run_main(stage.main, "--help")
    assert outcome.code == 0
    assert outcome.stdout.startswith("Stage 8: ")
