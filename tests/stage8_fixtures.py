"""Fixtures of the tests of stage 8."""

import json

import pytest
from published_models import make_photographs, publish, read_bytes, write_packaged

from publish_model import generate_embeddings_from_parquet as stage

PHOTOGRAPHS = make_photographs(37)


@pytest.fixture(scope="session")
def model_dir(toy_backbone, tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"), toy_backbone)


@pytest.fixture
def packaged(tmp_path):
    return write_packaged(tmp_path / "packaged.parquet", PHOTOGRAPHS, row_group_size=10)


@pytest.fixture
def embed(run_main, model_dir):
    """Run the stage in this process, with small parts unless told otherwise."""

    def run(source, output, *arguments, model=model_dir, read_batch_size=4):
        return run_main(
            stage.main, "-i", source, "-o", output, "--model-id", model, "--device", "cpu",
            "--read-batch-size", read_batch_size, *arguments,
        )  # fmt: skip

    return run


@pytest.fixture
def undisturbed(embed, packaged, tmp_path):
    """The files of a dataset that one process made at one go."""
    assert embed(packaged, tmp_path / "undisturbed").code == 0
    return read_bytes(tmp_path / "undisturbed")


def read_state(output):
    return json.loads((output / "state.json").read_text())
