"""Stage 7: checkpoint and backbone in, a folder that transformers loads alone out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published_models import make_config, write_backbone, write_checkpoint
from safetensors.torch import load_file, save_file
from stage7_fixtures import read_all_text, read_config

from pipeline.cli import Options
from pipeline.errors import InputError
from pipeline.retrieval.checkpoint import load_checkpoint
from publish_model import convert_to_hf as stage
from publish_model.convert_to_hf import PublishOptions
from publish_model.model_folder import published_folder

FILES = {
    "config.json", "model.safetensors", "preprocessor_config.json", "modeling_spatial_embeddings.py",
    "configuration_spatial_embeddings.py", "pooling.py", "projector.py", "README.md",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what comes out


def test_the_folder_holds_backbone_projector_processor_code_and_card(config, toy_backbone, tmp_path):
    result = stage.run(config, Options())
    folder = tmp_path / "published"
    assert (result.counts["in"], result.counts["out"], result.written) == (1, 1, [folder])
    assert {path.name for path in folder.iterdir()} == FILES
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # others may read all of it, or nothing
    found = load_file(folder / "model.safetensors")
    backbone = load_file(toy_backbone / "model.safetensors")
    projector = load_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt").projector
    assert found.keys() == {f"backbone.{name}" for name in backbone} | {f"projector.{name}" for name in projector}
    for name, tensor in backbone.items():
        assert torch.equal(found[f"backbone.{name}"], tensor)
    for name, tensor in projector.items():
        assert torch.equal(found[f"projector.{name}"], tensor)
    assert (folder / "projector.py").read_text() == Path(stage.__file__).parents[1].joinpath(
        "pipeline", "retrieval", "projector.py"
    ).read_text()


def test_the_configuration_names_the_backbone_and_no_place_on_this_machine(config, toy_backbone, tmp_path):
    stage.run(config, Options())
    content = read_config(tmp_path / "published")
    assert content["backbone_model_name"] == toy_backbone.name
    assert content["model_type"] == "spatial_embeddings"
    assert content["backbone_config"]["model_type"] == "dinov2"
    assert (content["pooling_type"], content["dtype"], content["embedding_dim"]) == ("pooler_output", "float32", 256)
    assert content["projector"]["input_dim"] == 24
    text = read_all_text(tmp_path / "published")
    for place in (str(tmp_path), str(toy_backbone), str(toy_backbone.parent), str(Path.home()), "_name_or_path"):
        assert place not in text


def test_a_hub_id_is_recorded_as_it_is(config, toy_backbone, tmp_path, monkeypatch):
    config = make_config(tmp_path, "facebook/some-backbone")
    monkeypatch.setattr(stage, "locate_backbone", lambda *_, **__: toy_backbone)
    stage.run(config, Options())
    assert read_config(tmp_path / "published")["backbone_model_name"] == "facebook/some-backbone"
    assert "base_model: facebook/some-backbone" in (tmp_path / "published" / "README.md").read_text()


def test_the_published_code_imports_torch_and_transformers_alone(config, tmp_path):
    import ast

    stage.run(config, Options())
    for path in (tmp_path / "published").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module]
            for name in names:
                assert name.split(".")[0] in {"torch", "transformers", "collections", "dataclasses", "typing"}


@pytest.mark.parametrize("kind", ["dinov2", pytest.param("dinov3", marks=pytest.mark.slow)])
def test_it_loads_offline_in_a_process_that_knows_nothing_of_the_project(kind, tmp_path):
    backbone = write_backbone(tmp_path / "backbone", kind)
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    stage.run(make_config(tmp_path, backbone), Options())
    shutil.rmtree(backbone)
    elsewhere = shutil.move(tmp_path / "published", tmp_path / "else where" / "model")
    script = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import numpy as np, torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline
folder = sys.argv[1]
model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
inputs = AutoImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="pt")
with torch.inference_mode():
    embedding = model.eval()(**inputs).embeddings
assert embedding.shape == (1, 256) and abs(embedding.norm().item() - 1) < 1e-5
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)
assert abs(float(np.array(extract(picture)).ravel() @ embedding[0].numpy()) - 1) < 1e-5
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).backbone_model_name == "backbone"
assert not any(name.split(".")[0] in ("pipeline", "publish_model") for name in sys.modules), "the project was imported"
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, elsewhere], cwd="/", env=environment, check=False, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------- weights


def test_another_type_can_be_asked_for_and_leaves_the_projector_alone(config, tmp_path):
    stage.run(config, PublishOptions(dtype="bfloat16"))
    found = load_file(tmp_path / "published" / "model.safetensors")
    assert {tensor.dtype for name, tensor in found.items() if name.startswith("backbone.")} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in found.items() if name.startswith("projector.")} == {torch.float32}
    assert read_config(tmp_path / "published")["dtype"] == "bfloat16"


def test_a_backbone_stored_in_bfloat16_stays_so(tmp_path):
    backbone = write_backbone(tmp_path / "backbone")
    stored = {name: tensor.bfloat16() for name, tensor in load_file(backbone / "model.safetensors").items()}
    save_file(stored, backbone / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((backbone / "config.json").read_text()) | {"dtype": "bfloat16", "_name_or_path": "/secret"}
    (backbone / "config.json").write_text(json.dumps(settings))
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    stage.run(make_config(tmp_path, backbone), Options())
    content = read_config(tmp_path / "published")
    assert content["dtype"] == "bfloat16"
    assert content["backbone_config"].keys().isdisjoint({"dtype", "torch_dtype", "_name_or_path"})
    assert load_file(tmp_path / "published" / "model.safetensors")["backbone.layernorm.weight"].dtype == torch.bfloat16


def test_a_large_model_is_cut_into_shards_that_load(config, tmp_path, monkeypatch):
    monkeypatch.setattr(published_folder, "MAX_SHARD_BYTES", 20_000)
    stage.run(config, Options())
    folder = tmp_path / "published"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = [sum(t.numel() * t.element_size() for t in load_file(folder / name).values()) for name in shards]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert stage.run(config, Options()).kept == [folder]
    (folder / shards[1]).unlink()
    assert stage.run(config, Options()).written == [folder]


def test_a_backbone_with_a_head_on_top_is_published_without_it(tmp_path):
    from transformers import AutoModel, BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

    backbone = tmp_path / "classifier"
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "num_labels": 3}
    Dinov2ForImageClassification(Dinov2Config(**shape)).save_pretrained(backbone)
    BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(backbone)
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    stage.run(make_config(tmp_path, backbone), Options())
    found = load_file(tmp_path / "published" / "model.safetensors")
    assert not any("classifier" in name for name in found)
    expected = AutoModel.from_pretrained(backbone).state_dict()["layernorm.weight"]
    assert torch.equal(found["backbone.layernorm.weight"], expected)
    assert {path.name for path in (tmp_path / "published").iterdir()} == FILES


def test_a_backbone_without_the_pooler_of_its_class_is_published_with_zeros_there(tmp_path):
    from transformers import BitImageProcessor, ViTConfig, ViTModel

    backbone = tmp_path / "vit"
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    ViTModel(ViTConfig(**shape, image_size=56, patch_size=14), add_pooling_layer=False).save_pretrained(backbone)
    BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(backbone)
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    stage.run(make_config(tmp_path, backbone, pooling_type="cls_token"), Options())
    found = load_file(tmp_path / "published" / "model.safetensors")
    assert not found["backbone.pooler.dense.weight"].any()
    with pytest.raises(InputError, match=r"weights are missing .*cls_token"):
        stage.run(make_config(tmp_path, backbone), Options(overwrite=True))


def test_an_older_checkpoint_without_its_architecture_is_published(config, tmp_path):
    path = tmp_path / "checkpoint" / "checkpoint_best.pt"
    state = load_checkpoint(path).projector
    torch.save({"projector_state_dict": state}, path)
    stage.run(config, Options())
    content = read_config(tmp_path / "published")["projector"]
    assert (content["input_dim"], content["hidden_dim"], content["num_hidden_layers"]) == (24, 32, 1)
    assert "Not measured" in (tmp_path / "published" / "README.md").read_text()


def test_a_missing_checkpoint_is_found_before_a_backbone_is_fetched(config, monkeypatch):
    monkeypatch.setattr(stage, "locate_backbone", lambda *_, **__: pytest.fail("the backbone was asked for"))
    with pytest.raises(InputError, match="no such checkpoint"):
        stage.run(config, stage.PublishOptions(checkpoint=Path("nowhere.pt")))


@pytest.mark.parametrize("text", ['{"a":', "[]"])
def test_a_backbone_with_a_damaged_configuration_is_one_line(toy_backbone, tmp_path, text):
    backbone = shutil.copytree(toy_backbone, tmp_path / "damaged")
    (backbone / "config.json").write_text(text)
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    with pytest.raises(InputError, match=r"not a model folder \(config\.json.*: fetch the model again"):
        stage.run(make_config(tmp_path, backbone), Options())
    assert not (tmp_path / "published").exists()
