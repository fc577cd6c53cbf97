"""What the tests of the tuning share."""

import csv
from pathlib import Path
from typing import Any

import pytest
from config_files import write_config
from training_data import SETTINGS, fill_workspace

from pipeline.config import load_config
from train_specialized_embeddings import tune
from train_specialized_embeddings.tune import TuneOptions

# Trials as small as the data. Read by the process of a test and by the workers that it starts.
SMALL_SPACE = """
from optuna.distributions import IntDistribution
from train_specialized_embeddings.tuning.search_space import SPACE

SPACE["training_model.hidden_dim"] = IntDistribution(4, 16, log=True)
"""


def make_workspace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write splits, a difficulty table and a configuration whose settings lie in the space; make that small."""
    from train_specialized_embeddings.tuning.search_space import SPACE

    for name in SPACE:
        monkeypatch.setitem(SPACE, name, SPACE[name])  # puts them back
    exec(SMALL_SPACE, {})
    fill_workspace(folder)
    training = SETTINGS["training"] | {"num_epochs": 2, "batch_size": 64, "learning_rate": 1e-3}
    write_config(folder, training=training, training_model={"output_dim": 8, "hidden_dim": 8})
    return folder


def search(workspace: Path, num_trials: int, *overrides: str, **options: Any) -> Any:
    config = load_config(workspace / "config.toml", list(overrides))
    return tune.run(config, TuneOptions(num_trials=num_trials, **options))


def read_trials(workspace: Path) -> list[dict[str, str]]:
    with open(workspace / "checkpoint/_tune/trials.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))
