"""The scaling curve of benchmarks/scaling.py on a few made-up buildings."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from training_data import SETTINGS, make_difficulty, make_split

from benchmarks.accuracy import KINDS, read_all
from benchmarks.scaling import draw_buildings, expand, extrapolate, format_table
from pipeline.config import PROJECT_ROOT
from pipeline.files import tables


@pytest.fixture
def workspace(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """A folder with splits to train on and others to test on, the former's difficulty table, and a configuration."""
    for folder, seeds in (("merged", (1, 2, 3)), ("other", (4, 5, 6))):
        splits = [make_split(count, seed) for count, seed in zip((16, 8, 8), seeds, strict=True)]
        for name, split in zip(("train", "val", "test"), splits, strict=True):
            tables.write_parquet(tmp_path / folder / f"{name}.parquet", split, {})
        if folder == "merged":
            tables.write_parquet(tmp_path / "difficulty.parquet", make_difficulty(pa.concat_tables(splits)), {})
    write_config(tmp_path, **SETTINGS)
    return tmp_path


def make_result(size: int, gain: float, seed: int = 0) -> dict[str, object]:
    scores = {kind: {"recall_at_1": 0.6, "map": 0.5} for kind in KINDS}
    return {"size": size, "seed": seed, "collapses": 0,
            "scores": scores | {"projector": {"recall_at_1": 0.7, "map": 0.5 + gain}}}  # fmt: skip


def test_training_and_validation_buildings_are_apart_and_as_many_as_asked_for(workspace: Path) -> None:
    features = read_all(workspace / "merged")
    is_train, is_val = draw_buildings(features, 20, 0.25, 1)
    assert (is_train.sum(), is_val.sum(), (is_train & is_val).sum()) == (20, 5, 0)
    assert not np.array_equal(is_train, draw_buildings(features, 20, 0.25, 2)[0])
    with pytest.raises(SystemExit, match="error: 30 training buildings need 8 more to validate: 32 are there"):
        draw_buildings(features, 30, 0.25, 1)


def test_an_expansion_is_signed_noisy_keeps_the_neighbourhoods_and_is_always_the_same() -> None:
    rows = np.abs(np.random.default_rng(0).standard_normal((50, 20))).astype(np.float32)
    center = rows.mean(axis=0)
    wide = expand(rows, center, 400, 1)
    assert wide.shape == (50, 400)
    assert (wide < 0).mean() == pytest.approx(0.5, abs=0.05)
    distances = [np.linalg.norm(part[:1] - part[1:], axis=1) for part in (rows, wide)]
    assert np.corrcoef(*distances)[0, 1] > 0.9
    np.testing.assert_array_equal(expand(rows, center, 400, 1), wide)
    moved = expand(rows, center, 400, 2) - wide
    assert 0 < moved.std() < 0.3 * wide.std()


def test_the_line_through_the_gains_is_extended_to_a_million_with_its_error() -> None:
    exact = extrapolate([make_result(size, gain) for size, gain in ((100, 0.02), (1000, 0.04), (10_000, 0.06))])
    assert exact["slope_per_decade"] == pytest.approx(0.02)
    assert [exact[key] for key in ("value", "low", "high")] == pytest.approx([0.1] * 3, abs=1e-6)
    noisy = extrapolate([make_result(size, gain) for size, gain in ((100, 0.03), (1000, 0.02), (10_000, 0.07))])
    assert noisy["low"] < noisy["value"] < noisy["high"]


def test_the_table_has_the_means_and_the_smallest_gain() -> None:
    lines = format_table([make_result(3000, 0.1, 0), make_result(3000, 0.08, 1)])
    assert "| 3,000 (2) | 0.5000 / 0.6000 |" in lines[2]
    assert lines[2].endswith("| 0.5900 / 0.7000 | +0.0900 (+0.0800) | 0 |")


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--expand", "30")])
def test_the_script_prints_a_table_and_writes_scores_and_a_plot(workspace: Path, options: tuple[str, ...]) -> None:
    command = [sys.executable, PROJECT_ROOT / "benchmarks/scaling.py", "--config", workspace / "config.toml",
               "--test-merged-dir", workspace / "other", "--set", "training.num_epochs=1", "--sizes", "8", "20",
               "--seeds", "2", "--workers", "1", "--output", workspace / "scores.json",
               "--plot", workspace / "curve.svg", *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:4]] == ["8 (2)", "20 (2)"]
    assert "at a million" in done.stdout
    found = json.loads((workspace / "scores.json").read_text())["results"]
    assert [(row["size"], row["seed"]) for row in found] == [(8, 0), (8, 1), (20, 0), (20, 1)]
    assert all(set(row["scores"]) == set(KINDS) for row in found)
    assert "<svg" in (workspace / "curve.svg").read_text()
