"""Stage 7 with --from-model: what the reference implementation published becomes a folder that needs nothing else."""

import json
import shutil

import numpy as np
import pytest
import torch
from published_models import make_photographs, read_dataset, write_backbone, write_kind, write_packaged
from reference_models import write_reference_model
from safetensors.torch import load_file, save_file
from stage7_fixtures import read_all_text, read_config

from publish_model import convert_to_hf, generate_embeddings_from_parquet
from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel

FILES = {
    "config.json", "model.safetensors", "preprocessor_config.json", "modeling_spatial_embeddings.py",
    "configuration_spatial_embeddings.py", "pooling.py", "projector.py", "README.md", "modules.json",
    "sentence_bert_config.json",
}  # fmt: skip


@pytest.fixture(params=["dinov2", "dinov3", "lite0"])
def kind(request):
    return request.param


@pytest.fixture
def dino(tmp_path):
    """The folder of the reference implementation's, its backbone's folder, and the oracle."""
    backbone = write_backbone(tmp_path / "backbone")
    return tmp_path / "reference", backbone, write_reference_model(tmp_path / "reference", backbone)


@pytest.fixture
def republish(run_main, tmp_path):
    """Run the command with a configuration that names neither checkpoints, splits nor a backbone."""
    (tmp_path / "config.toml").write_text(f'[global]\nlog_dir = "{tmp_path}/logs"\n')

    def run(folder, *arguments):
        config = ("--config", tmp_path / "config.toml")
        output = () if "--output" in arguments else ("--output", tmp_path / "published")
        return run_main(convert_to_hf.main, *config, "--from-model", folder, *output, *arguments)

    return run


def embed(folder, packaged, output):
    arguments = ["--input", packaged, "--output", output, "--model-id", folder]
    generate_embeddings_from_parquet.main([str(argument) for argument in arguments])
    return np.stack(read_dataset(output).column("embedding").to_numpy())


def test_it_computes_what_stage_8_computes_with_the_old_folder_and_needs_no_other(kind, republish, tmp_path):
    backbone, width = write_kind(tmp_path / "backbone", kind)
    write_reference_model(tmp_path / "reference", backbone, width)
    packaged = write_packaged(tmp_path / "packaged.parquet", make_photographs(6))
    before = embed(tmp_path / "reference", packaged, tmp_path / "old")
    outcome = republish(tmp_path / "reference")
    assert (outcome.code, outcome.stdout) == (0, f"{tmp_path / 'published'}\n"), outcome.stderr
    shutil.rmtree(backbone)
    shutil.rmtree(tmp_path / "reference")
    after = embed(tmp_path / "published", packaged, tmp_path / "new")
    assert before.shape == after.shape == (6, 256)
    assert (before * after).sum(axis=1).min() >= 0.9999
    assert np.abs((before @ before.T)[0, 1:]).max() < 0.999  # the pictures are told apart


def test_the_folder_is_one_of_ours_and_names_no_place_on_this_machine(dino, republish, tmp_path):
    (dino[1] / "LICENSE.md").write_text("Do as you like.")
    (dino[1] / "README.md").write_text("---\nlicense: other\nlicense_name: toy-licence\n---\n")
    assert republish(dino[0]).code == 0
    folder = tmp_path / "published"
    assert {path.name for path in folder.iterdir()} == FILES | {"LICENSE.md"}
    assert "the code of the folder was run" not in read_all_text(folder)
    assert str(tmp_path) not in read_all_text(folder)
    card = (folder / "README.md").read_text()
    assert "license_name: toy-licence" in card
    assert "the projector's weights came without a word on what they were trained on" in card
    assert "Not measured: what this model was made from carries no validation results." in card
    assert "checkpoint" not in card
    old = load_file(dino[0] / "model.safetensors")
    new = load_file(folder / "model.safetensors")
    backbone = [name for name in new if name.startswith("backbone.")]
    assert backbone == [name for name in old if name.startswith("backbone.")]
    assert all(torch.equal(new[name], old[name]) for name in backbone)
    assert read_config(folder)["dtype"] == "float32"
    model = SpatialEmbeddingsModel.from_pretrained(folder).eval()
    features = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model.projector(features), dino[2].projector(features), atol=1e-6, rtol=0)


def test_its_own_image_processor_wins_and_another_type_can_be_asked_for(dino, republish, tmp_path):
    settings = json.loads((dino[1] / "preprocessor_config.json").read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (dino[0] / "preprocessor_config.json").write_text(json.dumps(settings))
    assert republish(dino[0], "--dtype", "bfloat16").code == 0
    found = json.loads((tmp_path / "published" / "preprocessor_config.json").read_text())
    assert found["image_mean"] == [0.1, 0.2, 0.3]
    weights = load_file(tmp_path / "published" / "model.safetensors")
    assert {tensor.dtype for name, tensor in weights.items() if name.startswith("backbone.")} == {torch.bfloat16}


def test_a_rerun_keeps_it_and_a_changed_source_is_refused(dino, republish, tmp_path):
    assert republish(dino[0]).code == 0
    assert "nothing redone" in republish(dino[0]).stderr
    (tmp_path / "published" / "pooling.py").unlink()
    assert republish(dino[0]).code == 0
    assert {path.name for path in (tmp_path / "published").iterdir()} == FILES
    with open(dino[0] / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\x80?")
    outcome = republish(dino[0])
    assert outcome.code == 1
    assert "input model has changed" in outcome.stderr
    assert republish(dino[0], "--overwrite").code == 0


def test_the_old_folder_is_never_written_over(dino, republish):
    before = {path.name: path.read_bytes() for path in dino[0].iterdir()}
    for arguments in ((), ("--overwrite",)):
        outcome = republish(dino[0], "--output", dino[0], *arguments)
        assert outcome.code == 1
        assert "not a model that was published here: give another --output" in outcome.stderr
    assert {path.name: path.read_bytes() for path in dino[0].iterdir()} == before


def test_a_folder_of_another_kind_is_one_line(dino, republish, tmp_path):
    assert republish(dino[0]).code == 0
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "published", dino[1], tmp_path / "empty", tmp_path / "nowhere"):
        outcome = republish(folder, "--output", tmp_path / "other")
        assert outcome.code == 1
        assert outcome.stderr.splitlines()[-1].startswith(f"error: {folder}: not a model that the reference")
        assert outcome.stderr.count("error: ") == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("removed", "problem"),
    [
        ("projector.", "holds no projector weights"),
        ("backbone.encoder.layer.1.", "weights are missing (backbone.encoder.layer.1."),
        ("", "holds no projector weights"),
    ],
)
def test_weights_that_are_not_all_there_are_one_line(dino, republish, tmp_path, removed, problem):
    path = dino[0] / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(removed)}
    save_file(kept, path, {"format": "pt"})
    outcome = republish(dino[0])
    assert outcome.code == 1
    assert outcome.stderr.count("error: ") == 1
    assert problem in outcome.stderr.splitlines()[-1]
    assert not (tmp_path / "published").exists()


def test_a_checkpoint_beside_it_is_refused(dino, republish):
    outcome = republish(dino[0], "--checkpoint", "checkpoint_best.pt")
    assert outcome.code == 2
    assert "--checkpoint and --from-model" in outcome.stderr
