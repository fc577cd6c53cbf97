"""Mapping a configuration of the reference implementation."""

import tomllib

import pytest

from pipeline import migrate
from pipeline.config import load_config

OLD = """
seed = 7
[paths]
raw_dir = "data/rawß"
temp_dir = "/tmp/x"
[embedding_model]
model_name = "a/b"
batch_size = 16
num_workers = 4
[training]
hidden_dim = 384
lr = 0.001
learning_rate = 0.01
batch_size = 256
optimizer = "adamw"
num_epochs = "many"
[difficulty]
n_neighbors = 20
leaf_size = 40
[process]
batch_size = 8
[tuning]
n_trials = 50
"""


@pytest.fixture
def run(tmp_path, run_main):
    def run(text):
        (tmp_path / "old.toml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8-sig"))
        return run_main(migrate.main, tmp_path / "old.toml")

    return run


def test_every_key_is_mapped_or_listed_with_the_reason(run, tmp_path):
    outcome = run(OLD)
    assert outcome.code == 0
    assert tomllib.loads(outcome.stdout) == {
        "global": {"seed": 7},
        "paths": {"raw_dir": "data/rawß"},
        "embedding_model": {"model_name": "a/b", "batch_size": 16},
        "difficulty": {"neighbors": 20},
        "training_model": {"hidden_dim": 384},
        "training": {"learning_rate": 0.01, "batch_size": 256},
        "infrastructure": {"num_workers": 4},
    }
    listed = dict(line[2:].split(": ", 1) for line in outcome.stdout.splitlines() if line.startswith("# ["))
    assert listed == {
        "[paths].temp_dir": "tars are streamed and nothing is extracted to disk",
        "[training].lr": "[training].learning_rate is set by [training].learning_rate",
        "[training].optimizer": migrate.UNKNOWN,
        "[training].num_epochs": "its value 'many' does not fit: input should be a valid integer",
        "[difficulty].leaf_size": "the search is exact, and [difficulty].backend names its engine",
        "[process].batch_size": "choose one of [embedding_model].batch_size, [training].batch_size",
        "[tuning].n_trials": "it is an option of train_specialized_embeddings/tune.py: docs/tuning.md",
    }
    (tmp_path / "new.toml").write_text(outcome.stdout, encoding="utf-8")
    assert load_config(tmp_path / "new.toml").training_model.hidden_dim == 384


def test_a_file_of_ours_comes_out_as_it_went_in(run):
    text = "[data]\ntrain_ratio = 0.8\nval_ratio = 0.1\ntest_ratio = 0.1\n\n[embedding_model]\nscales = [224, 384]\n"
    assert tomllib.loads(run(text).stdout) == tomllib.loads(text)


def test_values_that_cannot_go_together_are_listed(run):
    outcome = run("[data]\ntrain_ratio = 0.9\n")
    assert "# [data]: train_ratio, val_ratio, test_ratio: must sum to 1" in outcome.stdout
    assert tomllib.loads(outcome.stdout) == {"data": {"train_ratio": 0.9}}


def test_every_other_name_leads_to_a_key_that_is_there():
    valid = migrate.list_keys()
    assert all(key in valid[section] for section, key in migrate.RENAMED.values())


def test_what_cannot_be_read_is_exit_code_two(run, run_main, tmp_path):
    assert run(b"[paths\n").code == 2
    outcome = run_main(migrate.main, tmp_path / "none.toml")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "none.toml: cannot read the configuration (No such file or directory)" in outcome.stderr
