"""A backbone that comes with code of its own: refused unless it is trusted, then run and said so."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from published_models import encode, make_picture, publish, write_kind
from safetensors.torch import save_file

from generate_embeddings import generate_embeddings
from pipeline.errors import InputError
from pipeline.files import tables
from pipeline.inference.backbone import Embedder
from pipeline.inference.loading import find_vision_config
from pipeline.inference.model_files import DEFAULT_MODEL_ID, locate_model
from preprocess_raw_data import process_tar
from publish_model import embed_images
from publish_model.model_folder import published_model
from publish_model.model_folder.published_model import find_model

CODE = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

class OwnConfig(PretrainedConfig):
    model_type = "mean_colour"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(3, 8)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        pooled = self.layer(pixel_values.mean((2, 3)))
        return BaseModelOutputWithPooling(last_hidden_state=pooled[:, None], pooler_output=pooled)
"""


@pytest.fixture
def own_backbone(toy_backbone, tmp_path):
    """A model of a type that transformers does not know."""
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(toy_backbone / "preprocessor_config.json", folder)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    config = {"model_type": "mean_colour", "architectures": ["OwnModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    weights = {"layer.weight": torch.ones(8, 3), "layer.bias": torch.arange(8.0)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_code_of_a_backbone_is_run_only_where_it_is_trusted(tmp_path, own_backbone, make_tar, write_config, run_main):
    make_tar(tmp_path / "raw")
    config = write_config(tmp_path, embedding_model={"model_name": str(own_backbone)})
    assert run_main(process_tar.main, "--config", config).code == 0
    outcome = run_main(generate_embeddings.main, "--config", config)
    assert outcome.code == 1
    assert (
        "comes with code of its own, which is not run unasked: read it, then set [embedding_model].trust_re"
        in (outcome.stderr.splitlines()[-1])
    )
    outcome = run_main(
        generate_embeddings.main, "--config", config, "--set", "embedding_model.trust_remote_code=true"
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    assert f"{own_backbone / 'own.py'}: its code is run, as asked: SHA-256 {digest}" in outcome.stderr
    path = tmp_path / "embeddings/0001_embeddings.parquet"
    assert tables.read_provenance(path)["settings"]["trust_remote_code"] is True
    rows = np.stack(pq.read_table(path)["embedding"].to_numpy())
    np.testing.assert_allclose(rows - rows[:, :1], np.tile(np.arange(8.0), (len(rows), 1)), atol=1e-5)


# ------------------------------------------------------------------------------------------------ published folders

PAYLOAD = "\nopen({!r}, 'w').close()\n"


@pytest.fixture
def hostile(model_dir, tmp_path):
    """A published folder whose files, processor included, write a file when they are run."""
    folder = shutil.copytree(model_dir, tmp_path / "hostile")
    for path in folder.glob("*.py"):
        path.write_text(path.read_text() + PAYLOAD.format(str(tmp_path / "ran")))
    return folder


def test_a_published_folders_code_is_run_only_where_it_is_trusted(run_main, hostile, model_dir, tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode(make_picture(1)))
    outcome = run_main(embed_images.main, tmp_path / "a.jpg", "--model-id", hostile)
    assert outcome.code == 1
    assert "comes with code of its own, which is not run unasked" in outcome.stderr
    assert "configuration_spatial_embeddings.py: not the code that this version publishes" in outcome.stderr
    assert not (tmp_path / "ran").exists()
    trusted = run_main(embed_images.main, tmp_path / "a.jpg", "--model-id", hostile, "--trust-remote-code")
    assert trusted.code == 0
    digest = hashlib.sha256((hostile / "pooling.py").read_bytes()).hexdigest()
    assert f"{hostile / 'pooling.py'}: its code is run, as asked: SHA-256 {digest}" in trusted.stderr
    assert (tmp_path / "ran").exists()
    plain = run_main(embed_images.main, tmp_path / "a.jpg", "--model-id", model_dir)
    assert plain.stdout == trusted.stdout  # to the last bit
    assert "its code is run" not in plain.stderr


def test_code_that_the_settings_of_a_published_folder_name_is_not_run(run_main, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "evil.py").write_text(PAYLOAD.format(str(tmp_path / "ran")) + "class Evil: pass\n")
    for name in ("config.json", "preprocessor_config.json"):
        settings = json.loads((folder / name).read_text())
        evil = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor"), "evil.Evil")
        settings["auto_map"] = evil
        if name == "config.json":
            settings["backbone_config"]["auto_map"] = evil
        (folder / name).write_text(json.dumps(settings))
    (tmp_path / "a.jpg").write_bytes(encode(make_picture(1)))
    found, plain = (
        run_main(embed_images.main, tmp_path / "a.jpg", "--model-id", one).stdout for one in (folder, model_dir)
    )
    assert found == plain != ""
    assert not (tmp_path / "ran").exists()


def test_no_code_is_copied_or_run_for_a_sound_published_folder(run_script, model_dir, tmp_path):
    """Nothing is written to $HF_HOME either, so that it need not be writable."""
    (tmp_path / "a.jpg").write_bytes(encode(make_picture(1)))
    (tmp_path / "home").write_text("no folder, and none can be made in it")
    outcome = run_script(
        "publish_model/embed_images.py", tmp_path / "a.jpg", "--model-id", model_dir, HF_HOME=tmp_path / "home"
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr


def test_code_of_another_repository_is_never_run(own_backbone):
    config = json.loads((own_backbone / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "someone/else--own.OwnModel"
    (own_backbone / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="code of another repository"):
        find_vision_config(own_backbone, trust_remote_code=True)


def test_an_image_processors_code_is_neither_run_nor_published(toy_backbone, own_backbone, tmp_path):
    backbone = shutil.copytree(toy_backbone, tmp_path / "backbone")
    settings = json.loads((backbone / "preprocessor_config.json").read_text())
    settings["auto_map"] = {"AutoImageProcessor": "toy.Toy"}
    settings["inner"] = [{"Auto_Map ": settings["auto_map"], "custom_pipelines": {"x": {"impl": "toy.Toy"}}}]
    (backbone / "preprocessor_config.json").write_text(json.dumps(settings))
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps(config | {"inner": settings["inner"]}))
    (backbone / "toy.py").write_text(PAYLOAD.format(str(tmp_path / "ran")) + "class Toy: pass\n")
    published = publish(tmp_path, backbone)
    for name in ("preprocessor_config.json", "config.json"):
        assert "toy.Toy" not in (published / name).read_text()
    assert json.loads((published / "preprocessor_config.json").read_text())["inner"] == [{}]
    Embedder(backbone, device="cpu", trust_remote_code=True)
    del settings["image_processor_type"]
    (own_backbone / "preprocessor_config.json").write_text(json.dumps(settings))
    shutil.copy(backbone / "toy.py", own_backbone)
    with pytest.raises(InputError, match="its image processor is code of its own, which is never run"):
        Embedder(own_backbone, device="cpu", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_a_folder_called_as_the_default_model_does_not_take_its_place(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(model_dir, tmp_path / DEFAULT_MODEL_ID)
    assert locate_model(DEFAULT_MODEL_ID, "", download=False) is None
    assert locate_model(f"./{DEFAULT_MODEL_ID}", "", download=False) is not None


def test_two_published_folders_of_one_name_each_run_their_own_code(model_dir, tmp_path, monkeypatch):
    """In a user's process, by transformers: the second one is of a version that pools otherwise."""
    first, second = (shutil.copytree(model_dir, tmp_path / name / "published") for name in "ab")
    paths = [Path(shutil.copy(path, tmp_path)) for path in published_model.CODE_PATHS]
    (tmp_path / "pooling.py").write_text((tmp_path / "pooling.py").read_text() + "\n\nLATER = True\n")
    monkeypatch.setattr(published_model, "CODE_PATHS", paths)
    for name, content in published_model.read_code().items():
        (second / name).write_bytes(content)
    script = (
        "import sys\nfrom transformers import AutoModel\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
        "    module = type(model).__module__.replace('modeling_spatial_embeddings', 'pooling')\n"
        "    print(hasattr(sys.modules[module], 'LATER'))\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    found = subprocess.check_output([sys.executable, "-c", script, first, second], env=environment, text=True)
    assert found.split() == ["False", "True"]


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "lite0"])
def test_our_own_classes_give_the_shipped_codes_values_to_the_last_bit(kind, tmp_path):
    backbone, width = write_kind(tmp_path / "backbone", kind)
    folder = publish(tmp_path, backbone, width)
    own = find_model(str(folder), download=False, device="cpu").load("float32")
    shipped = Embedder(folder, device="cpu", dtype="float32", batch_size=32, trust_remote_code=True)
    assert type(own.model) is not type(shipped.model)
    pictures = [own.decode(encode(make_picture(seed))) for seed in range(4)]
    assert np.array_equal(own.embed(pictures), shipped.embed(pictures))
