"""What stage 7 keeps, refuses and pushes."""

import json
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from published_models import GOOD, make_config, write_backbone, write_checkpoint
from stage7_fixtures import read_config

from pipeline.cli import Options
from pipeline.config import EmbeddingModelSection
from pipeline.errors import InputError, PipelineError, StaleOutputError
from pipeline.inference.model_files import embedding_settings, identify_model
from pipeline.retrieval.checkpoint import build_projector, load_checkpoint
from publish_model import convert_to_hf as stage
from publish_model.convert_to_hf import PublishOptions
from publish_model.model_folder import published_folder
from publish_model.model_folder.model_card import is_measured, worse_than
from publish_model.model_folder.published_model import find_model

FILES = {
    "config.json", "model.safetensors", "preprocessor_config.json", "modeling_spatial_embeddings.py",
    "configuration_spatial_embeddings.py", "pooling.py", "projector.py", "README.md",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- card and gate


def test_the_card_shows_the_projector_beside_both_baselines(config, toy_backbone, tmp_path):
    (toy_backbone / "README.md").write_text("---\nlicense: other\nlicense_name: toy-licence\n---\n# toy\n")
    (toy_backbone / "LICENSE.md").write_text("Do as you like.")
    try:
        stage.run(config, Options())
    finally:
        (toy_backbone / "README.md").unlink()
        (toy_backbone / "LICENSE.md").unlink()
    folder = tmp_path / "published"
    card = (folder / "README.md").read_text()
    assert "| backbone alone | 0.500 | 0.400 | 0.500 |" in card
    assert "| backbone, PCA-whitened | 0.500 | 0.450 | 0.500 |" in card
    assert "| **this model** | 0.500 | 0.500 | 0.500 |" in card
    assert "worse" not in card
    assert "license_name: toy-licence" in card
    assert "Google Street View" in card
    assert (folder / "LICENSE.md").read_text() == "Do as you like."
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert data.library_name == "transformers"


def test_the_snippet_of_the_card_runs(config, tmp_path, monkeypatch, capsys):
    from published_models import make_picture

    stage.run(config, Options())
    folder = tmp_path / "published"
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    make_picture(1).save(folder / "a.jpg")
    make_picture(2).save(folder / "b.jpg")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tensor([[1.0")


@pytest.mark.parametrize("baseline", ["raw", "pca_whitened", "whitening"])
@pytest.mark.parametrize("value", [0.51, float("nan")])
def test_a_projector_that_is_worse_than_no_training_is_refused(config, tmp_path, baseline, value):
    maps = GOOD | {baseline: value}
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt", maps=maps)
    with pytest.raises(PipelineError, match="retrieves worse than no training.*--force"):
        stage.run(config, Options())
    assert not (tmp_path / "published").exists()


def test_force_publishes_it_and_the_card_says_so(config, tmp_path):
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt", maps=GOOD | {"projector": 0.41})
    stage.run(config, PublishOptions(force=True))
    card = (tmp_path / "published" / "README.md").read_text()
    assert (
        "**The projector retrieves worse than the backbone, PCA-whitened and within-class whitening alone** and was "
        "published by `--force` nevertheless: whiten the backbone's embeddings instead."
    ) in card


def test_a_projector_between_the_baselines_is_refused_by_the_one_it_is_worse_than(config, tmp_path):
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt", maps=GOOD | {"projector": 0.47})
    with pytest.raises(PipelineError, match=r"validation mAP: whitening 0\.4800, projector 0\.4700\)"):
        stage.run(config, Options())
    stage.run(config, PublishOptions(force=True))
    card = (tmp_path / "published" / "README.md").read_text().replace("\n", " ")
    assert "worse than the within-class whitening alone** and was published by `--force` nevertheless: whiten" in card


def test_equal_or_as_good_as_rounding_tells_is_not_worse():
    metrics = {row: {"map": 0.5} for row in ("raw", "pca_whitened", "whitening", "projector")}
    assert worse_than(metrics) == []
    assert worse_than(metrics | {"whitening": {"map": 0.50005}}) == []
    assert worse_than(metrics | {"whitening": {"map": 0.5002}}) == ["whitening"]
    assert worse_than(metrics | {"whitening": {"map": 0.51, "map_error": 0.011}}) == []
    assert worse_than(metrics | {"whitening": {"map": 0.51, "map_error": 0.009}}) == ["whitening"]
    assert is_measured(metrics)
    assert not is_measured({row: metrics[row] for row in ("raw", "pca_whitened", "projector")})


def test_a_checkpoint_without_metrics_is_published_as_not_measured(config_file, run_main, tmp_path):
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt", maps=None)
    outcome = run_main(stage.main, "--config", config_file)
    assert outcome.code == 0
    assert "carries no validation metrics" in outcome.stderr
    card = (tmp_path / "published_model" / "README.md").read_text()
    assert "Not measured" in card
    assert "model-index" not in card


# ---------------------------------------------------------------------------------------------------- keep and refuse


def test_a_rerun_keeps_the_folder_without_loading_torch(config_file, run_main, run_script, tmp_path):
    outcome = run_main(stage.main, "--config", config_file)
    assert (outcome.code, outcome.stdout) == (0, f"{tmp_path / 'published_model'}\n")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "published_model").iterdir()}
    code = (
        "import sys; from publish_model.convert_to_hf import main; main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(config_file)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, "nothing redone" in done.stderr) == ("", True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "published_model").iterdir()} == before


@pytest.mark.parametrize(
    ("made_with", "message"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, None),  # another precision of the same features
        ({"image_size": 384}, "(image_size was 384 and is now 'auto'): set"),
        ({"scales": [224, 384]}, "(scales was [224, 384] and is now []): set"),
        ({"pooling_type": "cls_token"}, "(pooling_type was 'cls_token' and is now 'pooler_output')"),
        ({"model": "0123"}, "(model was '0123' and is now "),
    ],
)
def test_a_checkpoint_trained_on_embeddings_made_otherwise_is_refused(
    config, toy_backbone, tmp_path, made_with, message
):
    settings = embedding_settings(EmbeddingModelSection())
    embedded_with = {"model": identify_model(toy_backbone), **settings, "dtype": "auto"} | made_with
    provenance = {"stage": "train", "inputs": [], "embedded_with": embedded_with}
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt", provenance=provenance)
    if message is None:
        assert stage.run(config, Options()).written
        return
    with pytest.raises(InputError) as caught:
        stage.run(config, Options())
    assert message in str(caught.value)
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda own: own[:-1] + bytes([own[-1] ^ 1])),
        ("preprocessor_config.json", lambda own: own.replace(b"{", b'{"note": 1,', 1)),
        ("config.json", lambda own: own.replace(b"{", b'{"id2label": {"0": "house"},', 1)),
    ],
)
def test_a_changed_file_does_not_pass_for_the_one_that_was_published(config, tmp_path, caplog, name, change):
    stage.run(config, Options())
    path = tmp_path / "published" / name
    own = path.read_bytes()
    path.write_bytes(change(own))
    with pytest.raises(StaleOutputError, match=f"published: changed since it was published .{name}.: give"):
        stage.run(config, Options())
    with caplog.at_level("WARNING", "spatial_building_embeddings"):
        find_model(str(tmp_path / "published"), download=False)
    assert f"published: changed since it was published, or another model's: {name}" in caplog.text
    path.write_bytes(own)
    caplog.clear()
    assert stage.run(config, Options()).kept
    find_model(str(tmp_path / "published"), download=False)
    assert "changed since" not in caplog.text


def test_moved_and_touched_inputs_change_nothing(config, toy_backbone, tmp_path):
    stage.run(config, Options())
    moved = shutil.copytree(toy_backbone, tmp_path / "moved" / toy_backbone.name)
    checkpoint = tmp_path / "moved" / "checkpoint_best.pt"
    shutil.copyfile(tmp_path / "checkpoint" / "checkpoint_best.pt", checkpoint)
    result = stage.run(make_config(tmp_path, moved), PublishOptions(checkpoint=checkpoint))
    assert result.kept == [tmp_path / "published"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [("checkpoint", "input checkpoint_best.pt has changed"), ("backbone", "input backbone has changed"),
     ("pooling", "pooling_type was 'pooler_output' and is now 'cls_token'"),
     ("dtype", "dtype was 'as stored' and is now 'bfloat16'")],
)  # fmt: skip
def test_other_inputs_and_settings_are_refused_and_named(config, tmp_path, change, difference):
    stage.run(config, Options())
    options = PublishOptions(dtype="bfloat16" if change == "dtype" else None)
    if change == "checkpoint":
        write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt", maps=GOOD | {"projector": 0.6})
    elif change == "backbone":
        config = make_config(tmp_path, write_backbone(tmp_path / "other", num_hidden_layers=1))
    elif change == "pooling":
        config = make_config(tmp_path, config.embedding_model.model_name, pooling_type="cls_token")
    before = (tmp_path / "published" / "model.safetensors").read_bytes()
    with pytest.raises(StaleOutputError) as caught:
        stage.run(config, options)
    assert difference in str(caught.value)
    assert (tmp_path / "published" / "model.safetensors").read_bytes() == before
    again = PublishOptions(overwrite=True, dtype=options.dtype)
    assert stage.run(config, again).written == [tmp_path / "published"]
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.parametrize("name", ["pooling.py", "projector.py", "configuration_spatial_embeddings.py"])
def test_a_folder_that_lacks_code_is_written_again(config, tmp_path, name):
    stage.run(config, Options())
    (tmp_path / "published" / name).unlink()
    assert stage.run(config, Options()).written == [tmp_path / "published"]
    assert {path.name for path in (tmp_path / "published").iterdir()} == FILES


def test_a_folder_of_something_else_is_never_removed(config, tmp_path):
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not a model that was published here"):
        stage.run(config, Options(overwrite=True))
    assert (tmp_path / "published" / "thesis.tex").read_text() == "mine"


def test_a_disk_that_takes_only_a_part_is_one_line_and_leaves_nothing(config, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # config.json fits, the weights do not
    try:
        with pytest.raises(PipelineError, match=r"cannot write .*published \(File too large\): free space"):
            stage.run(config, Options())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


# ---------------------------------------------------------------------------------------------------- what is refused


def check_refused(outcome, *texts, code=1):
    assert outcome.code == code
    assert outcome.stdout == ""
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for text in texts:
        assert text in last


def test_a_checkpoint_of_another_width_is_refused_naming_both(config_file, run_main, tmp_path):
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt", input_dim=1280)
    outcome = run_main(stage.main, "--config", config_file)
    check_refused(outcome, "its projector takes 1280 features, the backbone toy-dinov2 gives 24", "model_name")
    assert not (tmp_path / "published_model").exists()


def test_a_missing_or_damaged_checkpoint_is_one_line(config_file, run_main, tmp_path):
    path = tmp_path / "checkpoint" / "checkpoint_best.pt"
    path.write_bytes(path.read_bytes()[:500])
    check_refused(run_main(stage.main, "--config", config_file), f"{path}: not a checkpoint")
    other = tmp_path / "other.pt"
    check_refused(
        run_main(stage.main, "--config", config_file, "--checkpoint", other),
        f"{other}: no such checkpoint: run stage 6",
    )


def test_a_missing_backbone_is_one_line(config_file, run_main, tmp_path):
    override = f"embedding_model.model_name={tmp_path / 'nowhere'}"
    outcome = run_main(stage.main, "--config", config_file, "--set", override)
    check_refused(outcome, f"{tmp_path / 'nowhere'}: no such model folder")


def test_damaged_backbone_weights_are_one_line(config_file, run_main, toy_backbone, tmp_path):
    broken = shutil.copytree(toy_backbone, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:5000])
    outcome = run_main(stage.main, "--config", config_file, "--set", f"embedding_model.model_name={broken}")
    check_refused(outcome, f"{broken}: the model cannot be loaded")
    assert not (tmp_path / "published_model").exists()


HOSTILE = {
    "config.json": {"num_attention_heads": 0},
    "preprocessor_config.json": {"image_mean": "abc"},
    "processor_config.json": {"image_processor": {"image_processor_type": "BitImageProcessor", "size": {"a": 1}}},
}


@pytest.mark.parametrize("name", [*HOSTILE, "pytorch_model.bin"])
def test_a_hostile_backbone_is_one_line(config_file, run_main, toy_backbone, tmp_path, name):
    hostile = shutil.copytree(toy_backbone, tmp_path / "hostile")
    if name in HOSTILE:
        settings = json.loads((hostile / name).read_text()) if (hostile / name).exists() else {}
        (hostile / name).write_text(json.dumps(settings | HOSTILE[name]))
    else:
        (hostile / "model.safetensors").unlink()
        (hostile / name).write_bytes(pickle.dumps(print, protocol=2))
    outcome = run_main(stage.main, "--config", config_file, "--set", f"embedding_model.model_name={hostile}")
    check_refused(outcome, f"{hostile}: ")
    assert not (tmp_path / "published_model").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_what_a_link_in_a_backbone_leads_to_is_not_published(config_file, run_main, toy_backbone, tmp_path, name):
    linked = shutil.copytree(toy_backbone, tmp_path / "linked")
    (linked / name).rename(tmp_path / "private")
    (linked / name).symlink_to(tmp_path / "private")
    outcome = run_main(stage.main, "--config", config_file, "--set", f"embedding_model.model_name={linked}")
    check_refused(outcome, f"{linked / name}: a link out of the model's folder")


def test_a_link_that_takes_the_hidden_folders_place_is_not_written_through(config, tmp_path, monkeypatch):
    mine, write_card = tmp_path / "mine", published_folder.write_card
    mine.mkdir()
    (mine / "README.md").write_text("mine")

    def swap(folder, *arguments):
        (hidden,) = tmp_path.glob(".published.*.tmp")
        hidden.rename(tmp_path / "moved")
        hidden.symlink_to(mine)
        write_card(folder, *arguments)

    monkeypatch.setattr(published_folder, "write_card", swap)
    with pytest.raises(PipelineError, match="a link or pipe"):
        stage.run(config, Options())
    assert [path.read_text() for path in mine.iterdir()] == ["mine"]
    assert (tmp_path / "moved" / "README.md").exists()


def test_options_reach_the_stage(config_file, run_main, tmp_path):
    output = tmp_path / "elsewhere" / "model"
    write_checkpoint(tmp_path / "epoch.pt", maps=GOOD | {"projector": 0.1})
    arguments = ["--config", config_file, "--output", output, "--checkpoint", tmp_path / "epoch.pt"]
    check_refused(run_main(stage.main, *arguments), "--force")
    outcome = run_main(stage.main, *arguments, "--force", "--dtype", "bfloat16")
    assert (outcome.code, outcome.stdout) == (0, f"{output}\n")
    assert read_config(output)["dtype"] == "bfloat16"
    check_refused(run_main(stage.main, *arguments, "--dtype", "int8"), "invalid choice", code=2)


def test_help_says_the_number_of_the_stage_first(run_main):
    assert run_main(stage.main, "--help").stdout.startswith("Stage 7: ")


# ---------------------------------------------------------------------------------------------------- the hub


def test_without_a_token_nothing_is_pushed(config_file, run_main, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    outcome = run_main(stage.main, "--config", config_file, "--push-to-hub", "group/model")
    assert outcome.code == 1
    assert "group/model: no token to publish with: export HF_TOKEN" in outcome.stderr.splitlines()[-1]


def test_the_checkpoint_that_is_published_is_the_one_that_computes(config, tmp_path):
    from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel

    stage.run(config, Options())
    model = SpatialEmbeddingsModel.from_pretrained(tmp_path / "published").eval()
    projector = build_projector(load_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt"))
    features = torch.randn(5, 24)
    with torch.inference_mode():
        assert torch.equal(model.projector(features), projector(features))
