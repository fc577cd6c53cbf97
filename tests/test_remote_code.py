"""A backbone that comes with code of its own: refused unless it is trusted, then run and said so."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from generate_embeddings import generate_embeddings
from pipeline.files import tables
from preprocess_raw_data import process_tar

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
def own_backbone(toy_backbone, tmp_path, monkeypatch):
    """A model of a type that transformers does not know."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
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
    assert f"{own_backbone}: the code that comes with the model is run" in outcome.stderr
    path = tmp_path / "embeddings/0001_embeddings.parquet"
    assert tables.read_provenance(path)["settings"]["trust_remote_code"] is True
    rows = np.stack(pq.read_table(path)["embedding"].to_numpy())
    np.testing.assert_allclose(rows - rows[:, :1], np.tile(np.arange(8.0), (len(rows), 1)), atol=1e-5)
