"""What the tests of stage 6 share: splits, a difficulty table, a workspace, and runs read back for comparison."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.cli import Options, StageResult
from pipeline.config import load_config
from pipeline.files import tables
from train_specialized_embeddings import train

WIDTH = 12
OUTPUTS = ["checkpoint_best.pt", "checkpoint_epoch_2.pt", "checkpoint_epoch_4.pt", "checkpoint_final.pt",
           "metrics.jsonl", "provenance.json"]  # fmt: skip
SETTINGS = {
    "training": {"num_epochs": 5, "batch_size": 16, "save_every_n_epochs": 2, "patience": 99},
    "training_model": {"output_dim": 8, "hidden_dim": 6},
}


def make_split(num_buildings: int, seed: int, width: int = WIDTH) -> pa.Table:
    """Return images of buildings whose embeddings share large directions that say nothing of the building."""
    generator = np.random.default_rng(seed)
    codes = np.repeat(np.arange(num_buildings), generator.integers(2, 5, num_buildings))
    count = len(codes)
    noise = generator.standard_normal((count, width)) * np.linspace(3, 0.3, width)
    values = (generator.standard_normal((num_buildings, width))[codes] + noise + 2).astype(np.float32)
    return pa.table(
        {
            "dataset_id": pa.array(np.full(count, seed), pa.int64()),
            "street_view_id": pa.array(np.arange(count), pa.int64()),
            "target_lat": pa.array(52 + codes * 0.01),
            "target_lon": pa.array(np.zeros(count)),
            "building_id": pa.array([f"{seed:04d}_{code}" for code in codes]),
            "streetview_image_id": pa.array([f"{seed:04d}_{row}" for row in range(count)]),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width),
        }
    )


def make_difficulty(split: pa.Table) -> pa.Table:
    """Return a table in which every image has two neighbours a band, of any building."""
    names = split["building_id"].to_pylist()
    generator = np.random.default_rng(0)
    return pa.table(
        {
            "target_coord_hash": split["streetview_image_id"],
            "neighbor_building_ids": pa.array([generator.choice(names, 14).tolist() for _ in names]),
            "neighbor_bands": pa.array(
                [[band for band in range(7) for _ in range(2)] for _ in names], pa.list_(pa.int32())
            ),
        }
    )


def fill_workspace(folder: Path) -> None:
    """Write splits and a difficulty table where the configuration of `write_config` looks for them."""
    split = make_split(30, 1)
    made_by = {"stage": "merge_and_split", "split_hash": "abc", "embedded_with": {"flip": True}}
    tables.write_parquet(folder / "merged/train.parquet", split, made_by)
    tables.write_parquet(folder / "merged/val.parquet", make_split(12, 2), made_by)
    tables.write_parquet(folder / "difficulty.parquet", make_difficulty(split), {"stage": "compute_visual_neighbors"})


def run(workspace: Path, *overrides: str, overwrite: bool = False) -> StageResult:
    return train.run(load_config(workspace / "config.toml", list(overrides)), Options(overwrite=overwrite))


def read_checkpoints(workspace: Path) -> dict[str, dict[str, Any]]:
    folder = workspace / "checkpoint"
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}


def read_metrics(workspace: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workspace / "checkpoint/metrics.jsonl").read_text().splitlines()]


def simplify(value: Any) -> Any:
    """Turn tensors into bytes and leave out the seconds, so that == compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), str(value.dtype), value.numpy().tobytes())
    if isinstance(value, dict):
        return {key: simplify(item) for key, item in value.items() if key != "seconds"}
    if isinstance(value, (list, tuple)):
        return [simplify(item) for item in value]
    return value


def assert_same_run(one: Path, other: Path) -> None:
    assert sorted(path.name for path in (one / "checkpoint").iterdir()) == OUTPUTS
    assert sorted(path.name for path in (other / "checkpoint").iterdir()) == OUTPUTS
    assert simplify(read_checkpoints(one)) == simplify(read_checkpoints(other))
    assert simplify(read_metrics(one)) == simplify(read_metrics(other))
    marks = [json.loads((folder / "checkpoint/provenance.json").read_text()) for folder in (one, other)]
    for mark in marks:
        assert mark.pop("outputs").keys() == {"checkpoint_best.pt", "checkpoint_final.pt"}  # pickles of equal content
    assert marks[0] == marks[1]
