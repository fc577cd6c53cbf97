"""Mapping a configuration of the reference implementation."""

import tomllib

import pytest

from pipeline import migrate
from pipeline.config import list_keys, load_config
from pipeline.reference.settings import RULES, SECTIONS

OLD = """
[global]
seed = 7
[paths]
raw_dir = "data/rawß"
merged_dir = "data/merged"
[embedding_model]
model_name = "a/b"
[generate_embeddings]
batch_size = 16
output_dir = "data/embeddings"
[compute_visual_neighbors]
output_parquet_path = "data/difficulty.parquet"
[infrastructure]
num_workers = 4
batch_size = 8
[data]
batch_size = 100000
sample_fraction_for_bands = 0.1
[training_model]
hidden_dim = 384
num_hidden_layers = 3
hidden_dim_multiplier = 1.25
use_layer_norm = true
use_residual = false
[triplet_training]
batch_size = 256
[training]
train_parquet_path = "data/merged/train.parquet"
val_parquet_path = "data/merged/val.parquet"
learning_rate = 0.001
num_epochs = 90
margin = 0.2
loss_distance = "cosine"
sample_fraction = 0.5
val_sample_fraction = 0.5
sample_buildings = 1000
val_sample_buildings = 100
samples_per_epoch = 5000
retrieval_metric_k = 10
best_training_metric_name = "recall"
early_stopping_patience = 0
resume_from_checkpoint = "old/checkpoint_epoch_3.pt"
ucb_alpha = 1.5
optimizer = "adamw"
neighbours = 3
[logging]
wandb_enabled = true
wandb_mode = "offline"
wandb_project = "buildings"
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
        "paths": {
            "raw_dir": "data/rawß",
            "merged_dir": "data/merged",
            "embeddings_dir": "data/embeddings",
            "difficulty_metadata_path": "data/difficulty.parquet",
        },
        "embedding_model": {"model_name": "a/b", "batch_size": 16},
        "difficulty": {"sample_fraction_for_bands": 0.1},
        "training_model": {"hidden_dim": 384, "num_hidden_layers": 3, "hidden_dim_multiplier": 1.25},
        "training": {
            "batch_size": 256,
            "learning_rate": 0.001,
            "num_epochs": 90,
            "use_residual": False,
            "loss": "triplet",
            "triplet_distance": "cosine",
            "margin": 0.2,
            "anchors_per_epoch": 5000,
            "sample_buildings": 1000,
            "patience": 0,
            "init_checkpoint": "old/checkpoint_epoch_3.pt",
            "band_sampling": "ucb",
        },
        "infrastructure": {"num_workers": 4},
        "logging": {"wandb": "offline", "wandb_project": "buildings"},
    }
    listed = dict(line[2:].split(": ", 1) for line in outcome.stdout.splitlines() if line.startswith("# ["))
    fewer = "[training].sample_buildings trains on fewer buildings, tune.py --sample-buildings the trials"
    validation = "every validation has mAP, MRR and Recall@k, [training].recall_ranks adds k"
    assert listed == {
        "[paths].raw_dir": "it has to hold the tars themselves; the old code found them in dataset_unaligned/",
        "[infrastructure].batch_size": "memory is bounded by [data].memory_mb",
        "[data].batch_size": "memory is bounded by [data].memory_mb",
        "[training_model].use_layer_norm": "stage 6 trains without; an old checkpoint keeps its LayerNorms",
        "[training].learning_rate": (
            "stage 6 divides it by the root of the number of a layer's inputs (64 at 4,096); its default is 5e-3"
        ),
        "[training].sample_fraction": fewer,
        "[training].val_sample_fraction": fewer,
        "[training].val_sample_buildings": fewer,
        "[training].retrieval_metric_k": validation,
        "[training].best_training_metric_name": validation,
        "[training].ucb_alpha": "the bandit has no other setting here",
        "[training].optimizer": "nothing here has this name: docs/configuration.md lists every key",
        "[training].neighbours": (
            "nothing here has this name; did you mean [difficulty].neighbors?: docs/configuration.md lists every key"
        ),
    }
    (tmp_path / "new.toml").write_text(outcome.stdout, encoding="utf-8")
    assert load_config(tmp_path / "new.toml").training_model.hidden_dims == [384, 480, 600]


@pytest.mark.parametrize(
    ("text", "expected", "noted"),
    [
        ("[training]\nwandb_enabled = false\nwandb_mode = 'online'", {"logging": {"wandb": "off"}}, ""),
        ("[training]\nwandb_mode = 'disabled'", {"logging": {"wandb": "off"}}, ""),
        ("[training]\nmargin = 0.2", {"training": {"margin": 0.2}}, 'idle unless [training].loss = "triplet"'),
        ("[training]\nresume_from_checkpoint = 'auto'", {}, "stage 6 resumes by itself"),
        ("[training]\nucb_enabled = false", {"training": {"band_sampling": "uniform"}}, "the bandit has no other"),
        ("[slurm]\noutput_dir = 'x'", {}, "set the key of [paths] of the stage that writes it"),
        ("[process]\nbatch_size = 8", {}, "choose one of [embedding_model].batch_size, [training].batch_size"),
        (
            "[training]\ntrain_parquet_path = 'a/train.parquet'\nval_parquet_path = 'b/val.parquet'",
            {"paths": {"merged_dir": "a"}},
            "[paths].merged_dir is set by [training].train_parquet_path",
        ),
    ],
)
def test_what_a_value_decides(run, text, expected, noted):
    outcome = run(text)
    assert tomllib.loads(outcome.stdout) == expected
    assert noted in outcome.stdout


def test_a_file_of_ours_comes_out_as_it_went_in(run):
    text = "[data]\ntrain_ratio = 0.8\nval_ratio = 0.1\ntest_ratio = 0.1\n\n[embedding_model]\nscales = [224, 384]\n"
    assert tomllib.loads(run(text).stdout) == tomllib.loads(text)
    assert tomllib.loads(run("[training]\nmargin = inf").stdout) == {"training": {"margin": float("inf")}}


def test_every_counterpart_is_a_key_that_is_there():
    valid = list_keys()
    places = [rule for rule in RULES.values() if isinstance(rule, tuple)]
    assert all(key in valid[section] for section, key in places)
    assert all(section in {"", *valid} and key in valid["paths"] for section, key in SECTIONS.values())


def test_what_cannot_be_read_is_exit_code_two(run, run_main, tmp_path):
    assert run(b"[paths\n").code == 2
    outcome = run_main(migrate.main, tmp_path / "none.toml")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "none.toml: cannot read the configuration (No such file or directory)" in outcome.stderr
