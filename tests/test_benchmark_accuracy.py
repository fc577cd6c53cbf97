"""The cross-validation of benchmarks/accuracy.py on a few made-up buildings."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from training_data import SETTINGS, make_difficulty, make_split

from benchmarks.accuracy import KINDS, list_cases, read_all, take_buildings
from pipeline.config import PROJECT_ROOT
from pipeline.files import tables


@pytest.fixture
def workspace(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """A folder with three splits of two datasets, the difficulty table of all of them, and a configuration."""
    splits = [make_split(count, seed) for count, seed in ((16, 1), (8, 2), (8, 3))]
    dataset = pa.array(np.repeat([1, 2], [splits[2].num_rows // 2, splits[2].num_rows - splits[2].num_rows // 2]))
    splits[2] = splits[2].set_column(0, "dataset_id", dataset)
    for name, split in zip(("train", "val", "test"), splits, strict=True):
        tables.write_parquet(tmp_path / f"merged/{name}.parquet", split, {})
    tables.write_parquet(tmp_path / "difficulty.parquet", make_difficulty(pa.concat_tables(splits)), {})
    write_config(tmp_path, **SETTINGS)
    return tmp_path


def test_folds_cut_the_buildings_and_places_the_datasets(workspace: Path) -> None:
    features = read_all(workspace / "merged")
    assert len(features.building_ids) == 32
    assert features.building_codes.max() == 31
    cases = list(list_cases(features, 2, 4))
    for seed in (0, 1):
        folds = [case.test for case in cases if case.name == "buildings" and case.seed == seed]
        assert np.sum(folds, axis=0).tolist() == [1] * 32
    elsewhere = [case for case in cases if case.name == "elsewhere"]
    assert len(elsewhere) == 4
    assert not any(case.ignores for case in elsewhere)
    for case in cases:
        chosen = take_buildings(features, case.test)
        assert set(chosen.building_ids.to_pylist()) == {
            name for name, taken in zip(features.building_ids.to_pylist(), case.test, strict=True) if taken
        }
        names = np.array(chosen.building_ids.to_pylist())[chosen.building_codes]
        assert [image.split("_")[0] for image in chosen.image_ids.to_pylist()] == [name.split("_")[0] for name in names]


@pytest.mark.slow
def test_the_script_prints_a_table_and_writes_every_score(workspace: Path) -> None:
    (workspace / "pairs.csv").write_text("building_id_a,building_id_b\n0001_1,0001_2\n")
    command = [sys.executable, PROJECT_ROOT / "benchmarks/accuracy.py", "--config", workspace / "config.toml", "--set",
               "training.num_epochs=1", "--ignore-pairs", workspace / "pairs.csv", "--seeds", "1", "--folds", "2",
               "--workers", "1", "--output", workspace / "scores.json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=workspace)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        assert f"buildings (2) {kind}" in done.stderr
    found = json.loads((workspace / "scores.json").read_text())
    assert [result["case"] for result in found["results"][:2]] == ["buildings"] * 2
    for result in found["results"]:
        assert set(result["scores"]) == set(KINDS)
        assert result["scores"]["start"]["map"] > 0
        assert result["best_epoch"] in (0, 1)
    assert found["settings"]["training"]["num_epochs"] == 1
