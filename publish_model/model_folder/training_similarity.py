"""Measure how similar new images are to the training images: the cosine to the nearest training embedding.

The published folder carries a sample of the training embeddings, without ids, and quantiles of the similarity between
validation images, whose buildings were not trained on, and their nearest neighbours in the sample. Of new images of the
same kind, 1 % fall below the first percentile of similarity, which is the 99th of distance.
"""

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.files.identity import identify
from pipeline.files.list_columns import find_embedding
from pipeline.files.tables import open_parquet, reading
from pipeline.log import logger

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint

FILE_NAME = "training_similarity.json"
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# 2,000 vectors of 256 float16 are 1 MB; of 2,000 queries 20 lie below the first percentile.
NUM_REFERENCE = NUM_QUERIES = 2000
# A sample is read from so many row groups: a split of 5.8 million images has 95 GB.
NUM_ROW_GROUPS = 16

Embeddings = NDArray[np.float32]


def nearest_similarity(queries: Embeddings, reference: Embeddings) -> NDArray[np.float32]:
    """Return the cosine of each of (N, D) unit vectors to the nearest of (R, D), (N,)."""
    blocks = [queries[start : start + 4096] @ reference.T for start in range(0, len(queries), 4096)]
    return np.concatenate([block.max(axis=1) for block in blocks]) if blocks else np.empty(0, dtype=np.float32)


def describe_training(reference: Embeddings, queries: Embeddings) -> dict[str, Any]:
    """Return the content of the file: the sample (R, D) and the quantiles of similarity to it."""
    stored = reference.astype("<f2")
    similarity = nearest_similarity(queries, stored.astype(np.float32))
    return {
        "what": "cosine similarity of held-out images to the nearest of a sample of the training embeddings",
        "quantiles": {str(q): round(float(np.quantile(similarity, q)), 6) for q in QUANTILES},
        "num_queries": len(queries),
        "reference_shape": list(stored.shape),
        "reference_float16": base64.b64encode(stored.tobytes()).decode("ascii"),
    }


def read_training(folder: Path) -> tuple[dict[str, float], Embeddings]:
    """Return the quantiles and the sample (R, D) that a published folder carries."""
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        values = np.frombuffer(base64.b64decode(content["reference_float16"]), dtype="<f2")
        reference = values.reshape(content["reference_shape"]).astype(np.float32)
        return {str(key): float(value) for key, value in content["quantiles"].items()}, reference
    except FileNotFoundError:
        raise InputError(f"{folder}: carries no {FILE_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder / FILE_NAME}: damaged: publish the model again") from None


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


def measure_training(config: Config, checkpoint: "Checkpoint") -> dict[str, Any] | None:
    """Return the content of the file, or None if the merged splits are not those that the checkpoint was trained on.

    The splits hold the backbone features, so no image is embedded again.
    """
    import torch

    from pipeline.retrieval.checkpoint import build_projector, project

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
