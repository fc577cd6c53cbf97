"""benchmarks/accuracy.py on a few made-up buildings: folds, datasets, and numbers of training buildings."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from training_data import SETTINGS, make_difficulty, make_split

from benchmarks.accuracy import KINDS, list_cases, list_sizes, read_all
from pipeline.config import PROJECT_ROOT, Config
from pipeline.files import tables
from pipeline.retrieval.features import take_buildings


@pytest.fixture
def workspace(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """A folder with three splits of two datasets, other splits to test on, a difficulty table and a configuration."""
    splits = [make_split(count, seed) for count, seed in ((16, 1), (8, 2), (8, 3))]
    dataset = pa.array(np.repeat([1, 2], [splits[2].num_rows // 2, splits[2].num_rows - splits[2].num_rows // 2]))
    splits[2] = splits[2].set_column(0, "dataset_id", dataset)
    for folder in ("merged", "other"):
        for name, split in zip(("train", "val", "test"), splits, strict=True):
            tables.write_parquet(tmp_path / f"{folder}/{name}.parquet", split, {})
    tables.write_parquet(tmp_path / "difficulty.parquet", make_difficulty(pa.concat_tables(splits)), {})
    write_config(tmp_path, **SETTINGS)
    return tmp_path


def test_folds_cut_the_buildings_and_places_the_datasets(workspace: Path) -> None:
    features = read_all(workspace / "merged")
    assert len(features.building_ids) == 32
    assert features.building_codes.max() == 31
    cases = list(list_cases(features, Config(), 2, 4))
    for seed in (0, 1):
        folds = [case.test for case in cases if case.name == "buildings" and case.seed == seed]
        assert np.sum(folds, axis=0).tolist() == [1] * 32
    assert len([case for case in cases if case.name == "elsewhere"]) == 4
    for case in cases:
        assert (case.train.astype(int) + case.val + case.test == 1).all()
        chosen = take_buildings(features, np.flatnonzero(case.test))
        assert set(chosen.building_ids.to_pylist()) == {
            name for name, taken in zip(features.building_ids.to_pylist(), case.test, strict=True) if taken
        }
        names = np.array(chosen.building_ids.to_pylist())[chosen.building_codes]
        assert [image.split("_")[0] for image in chosen.image_ids.to_pylist()] == [name.split("_")[0] for name in names]


def test_each_size_has_so_many_training_buildings_and_validates_beside_them(workspace: Path) -> None:
    features = read_all(workspace / "merged")
    cases = list(list_sizes(features, Config(), 2, [8, 20]))
    assert [(case.name, case.seed, int(case.train.sum()), int(case.val.sum())) for case in cases] == [
        ("8", 0, 8, 2), ("8", 1, 8, 2), ("20", 0, 20, 4), ("20", 1, 20, 4),
    ]  # fmt: skip
    assert not any((case.train & case.val).any() for case in cases)
    with pytest.raises(SystemExit, match="30 training buildings need 6 more to validate: 32 exist"):
        list(list_sizes(features, Config(), 1, [30]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "cases"),
    [(("--ignore-pairs", "pairs.csv", "--folds", "2"), ["buildings", "buildings", "elsewhere", "elsewhere"]),
     (("--test-merged-dir", "other", "--sizes", "8", "20"), ["8", "20"])],
)  # fmt: skip
def test_the_script_prints_a_table_and_writes_every_score(
    workspace: Path, options: tuple[str, ...], cases: list[str]
) -> None:
    (workspace / "pairs.csv").write_text("building_id_a,building_id_b\n0001_1,0001_2\n")
    command = [sys.executable, PROJECT_ROOT / "benchmarks/accuracy.py", "--config", workspace / "config.toml", "--set",
               "training.num_epochs=1", "--seeds", "1", "--workers", "1", "--output", workspace / "scores.json",
               *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=workspace)
    assert done.returncode == 0, done.stderr
    found = json.loads((workspace / "scores.json").read_text())
    assert [result["case"] for result in found["results"]] == cases
    for result in found["results"]:
        assert set(result["scores"]) == set(KINDS)
        assert result["scores"]["start"]["map"] > 0
        assert result["best_epoch"] in (0, 1)
    assert re.search(rf"{cases[0]} \({cases.count(cases[0])}\) +raw +0\.", done.stderr)
    assert found["settings"]["training"]["num_epochs"] == 1
