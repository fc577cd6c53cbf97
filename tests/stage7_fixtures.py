"""Fixtures of the tests of stage 7."""

import json

import pytest
from published_models import make_config, write_checkpoint


@pytest.fixture
def config(toy_backbone, tmp_path):
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    return make_config(tmp_path, toy_backbone)


@pytest.fixture
def config_file(write_config, toy_backbone, tmp_path):
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    return write_config(tmp_path, embedding_model={"model_name": str(toy_backbone)})


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def read_all_text(folder):
    return "\n".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".py", ".md"))
