"""Measure how similar new images are to the training images: the cosine to the nearest training embedding.

The published folder carries a sample of the training embeddings, without ids, and quantiles of the similarity between
validation images, whose buildings were not trained on, and their nearest neighbours in the sample. Of new images of the
same kind, 1 % fall below the first percentile of similarity, which is the 99th of distance.

It also carries the tables of pairs by which images are grouped without labels (`pipeline/retrieval/pair_table.py`).
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.files.identity import identify
from pipeline.files.list_columns import find_embedding
from pipeline.files.tables import open_parquet, reading
from pipeline.files.workspace import read_json
from pipeline.log import logger
from pipeline.retrieval.pair_table import PairTable, describe_pairs

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint

FILE_NAME = "training_similarity.json"
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# 2,000 vectors of 256 float16 are 1 MB.
NUM_REFERENCE = 2000
# 4,000 images make 8 million pairs: rates down to 1e-7, and an average linkage of a few seconds.
NUM_QUERIES = 4000
# A sample is read from so many row groups: a split of 5.8 million images has 95 GB.
NUM_ROW_GROUPS = 16

POSITION_COLUMNS = ("street_lat", "street_lon")

Embeddings = NDArray[np.float32]


def nearest_similarity(queries: Embeddings, reference: Embeddings) -> NDArray[np.float32]:
    """Return the cosine of each of (N, D) unit vectors to the nearest of (R, D), (N,)."""
    blocks = [queries[start : start + 4096] @ reference.T for start in range(0, len(queries), 4096)]
    return np.concatenate([block.max(axis=1) for block in blocks]) if blocks else np.empty(0, dtype=np.float32)


def describe_training(
    reference: Embeddings, queries: Embeddings, pairs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of the file: the sample (R, D), the quantiles of similarity to it, and the tables of pairs."""
    stored = reference.astype("<f2")
    similarity = nearest_similarity(queries, stored.astype(np.float32))
    return {
        "what": "cosine similarity of held-out images to the nearest of a sample of the training embeddings",
        "quantiles": {str(q): round(float(np.quantile(similarity, q)), 6) for q in QUANTILES},
        "num_queries": len(queries),
        "reference_shape": list(stored.shape),
        "reference_float16": base64.b64encode(stored.tobytes()).decode("ascii"),
        "pairs": pairs or {},
    }


def read_training(folder: Path) -> tuple[dict[str, float], Embeddings]:
    """Return the quantiles and the sample (R, D) that a published folder carries."""
    try:
        content = read_json(folder / FILE_NAME)
        values = np.frombuffer(base64.b64decode(content["reference_float16"]), dtype="<f2")
        reference = values.reshape(content["reference_shape"]).astype(np.float32)
        return {str(key): float(value) for key, value in content["quantiles"].items()}, reference
    except FileNotFoundError:
        raise InputError(f"{folder}: carries no {FILE_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder / FILE_NAME}: damaged: publish the model again") from None


def read_pairs(folder: Path, kind: str) -> PairTable:
    """Return the table of `all` or `near` pairs that a published folder carries.

    Raises InputError if it has none.
    """
    remedy = "publish the model again with stage 7 beside its splits, or give --threshold"
    try:
        rows = read_json(folder / FILE_NAME)["pairs"][kind]
        table = PairTable.of(rows)
        is_sound = len(rows) > 1 and all(np.isfinite(values).all() for values in table.columns.values())
        is_sound = is_sound and bool(
            (np.diff(table.columns["cosine"]) > 0).all() and (np.diff(table.columns["false_rate"]) < 0).all()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise InputError(f"{folder / FILE_NAME}: no rates of false pairs by cosine ({kind}): {remedy}")
    return table


def sample_rows(
    path: Path, num_rows: int, names: Sequence[str] = (), *, spread: bool = True
) -> tuple[NDArray[np.float32], pa.Table]:
    """Return (N, D) backbone features of about `num_rows` rows of a split, and further columns.

    Some row groups are read; the rows in each are evenly spaced, or, not `spread`, those that follow one another, which
    are of whole buildings.
    """
    column = find_embedding(path)
    with reading(path), open_parquet(path) as file:
        groups = np.unique(np.linspace(0, file.num_row_groups - 1, NUM_ROW_GROUPS).astype(int))
        names = [name for name in names if name in file.schema_arrow.names]
        features, others = [], []
        for group in groups:
            table = file.read_row_group(int(group), columns=[column.name, *names])
            wanted = min(table.num_rows, -(-num_rows // len(groups)))
            if spread:
                table = table.take(np.linspace(0, table.num_rows - 1, wanted).astype(np.int64))
            rows = table.slice(0, wanted).combine_chunks()
            features += [column.read(chunk, 0).astype(np.float32) for chunk in rows[column.name].chunks]
            others.append(rows.select(names))
        return np.concatenate(features), pa.concat_tables(others)


def measure_training(config: Config, checkpoint: "Checkpoint") -> dict[str, Any] | None:
    """Return the content of the file, or None if the merged splits are not those that the checkpoint was trained on.

    The splits hold the backbone features, so no image is embedded again.
    """
    import torch

    from pipeline.retrieval.checkpoint import build_projector, project

    trained_on = {item.get("name"): item for item in checkpoint.provenance.get("inputs", [])}
    if config.paths.merged_dir is None:
        return None
    paths = [config.path("merged_dir") / name for name in ("train.parquet", "val.parquet")]
    for path in paths:
        name = path.name
        if not path.is_file() or identify(path) != trained_on.get(name):
            logger.info("%s: not what the checkpoint was trained on: no likeness to the training images is kept", path)
            return None
    projector = build_projector(checkpoint)
    reference, _ = sample_rows(paths[0], NUM_REFERENCE)
    queries, columns = sample_rows(paths[1], NUM_QUERIES, ["building_id", *POSITION_COLUMNS], spread=False)
    reference, queries = (project(projector, rows, torch.device("cpu")) for rows in (reference, queries))
    if "building_id" not in columns.column_names:
        return describe_training(reference, queries)
    buildings = columns["building_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    positions = None
    if set(POSITION_COLUMNS) <= set(columns.column_names):
        positions = np.stack([columns[name].to_numpy() for name in POSITION_COLUMNS], axis=1).astype(np.float64)
        positions = positions if np.isfinite(positions).all() else None
    return describe_training(reference, queries, describe_pairs(queries, buildings, positions))
