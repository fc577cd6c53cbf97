"""Measure, when a model is published, how like the training images those of other buildings are (see drift.py)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.files.lists import find_embedding
from pipeline.files.tables import identify, open_parquet, reading
from pipeline.log import logger
from pipeline.retrieval.checkpoint import Checkpoint, build_projector, project
from publish_model.dataset.drift import NUM_QUERIES, NUM_REFERENCE, describe_training

# Row groups that a sample is taken from: a split of 5.8 million images takes 95 GB.
NUM_ROW_GROUPS = 16


def sample_rows(path: Path, num_rows: int) -> NDArray[np.float32]:
    """Return (N, D) backbone features of about `num_rows` rows, evenly spaced within some row groups of a split."""
    column = find_embedding(path)
    with reading(path), open_parquet(path) as file:
        groups = np.unique(np.linspace(0, file.num_row_groups - 1, NUM_ROW_GROUPS).astype(int))
        taken = []
        for group in groups:
            table = file.read_row_group(int(group), columns=[column.name])
            wanted = min(table.num_rows, -(-num_rows // len(groups)))
            rows = table.take(np.linspace(0, table.num_rows - 1, wanted).astype(np.int64)).combine_chunks()
            taken += [column.read(chunk, 0).astype(np.float32) for chunk in rows[column.name].chunks]
        return np.concatenate(taken)


def measure_training(config: Config, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return what the published folder says of the training images, None where the splits are not those of training.

    The features are those that stage 3 merged, so nothing is embedded again.
    """
    trained_on = {item.get("name"): item for item in checkpoint.provenance.get("inputs", [])}
    if config.paths.merged_dir is None:
        return None
    samples = []
    for name, num_rows in (("train.parquet", NUM_REFERENCE), ("val.parquet", NUM_QUERIES)):
        path = config.path("merged_dir") / name
        if not path.is_file() or identify(path) != trained_on.get(name):
            logger.info("%s: not what the checkpoint was trained on: no likeness to the training images is kept", path)
            return None
        features = sample_rows(path, num_rows)
        samples.append(project(build_projector(checkpoint), features, torch.device("cpu")))
    return describe_training(*samples)
