"""Say how often pairs of images reach a cosine, of two buildings and of one, for grouping images without labels.

The published folder carries a table of the validation split: the share of the pairs of two buildings that reach a
cosine, and how good the groups are that average linkage makes at that cosine (`pipeline/retrieval/pair_table.py`).
"""

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
from pipeline.retrieval.geography import is_position
from pipeline.retrieval.pair_table import PairTable, describe_pairs

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint

FILE_NAME = "pair_rates.json"
# 4,000 images make 8 million pairs: rates down to 1e-7, and an average linkage of a few seconds.
NUM_QUERIES = 4000
# A sample is read from so many row groups: a split of 5.8 million images has 95 GB.
NUM_ROW_GROUPS = 16

POSITION_COLUMNS = ("street_lat", "street_lon")


def read_pairs(folder: Path, kind: str) -> PairTable:
    """Return the table of `all` or `near` pairs that a published folder carries.

    Raises InputError if it has none.
    """
    remedy = "publish the model again with stage 7 beside its splits, or give --threshold"
    try:
        rows = read_json(folder / FILE_NAME)[kind]
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


def sample_rows(path: Path) -> tuple[NDArray[np.float32], pa.Table]:
    """Return (N, D) backbone features of about NUM_QUERIES rows of a split, and their buildings and positions.

    Some row groups are read, and of each the first rows, which are of whole buildings.
    """
    column = find_embedding(path)
    with reading(path), open_parquet(path) as file:
        groups = np.unique(np.linspace(0, file.num_row_groups - 1, NUM_ROW_GROUPS).astype(int))
        names = [name for name in ("building_id", *POSITION_COLUMNS) if name in file.schema_arrow.names]
        features, others = [], []
        for group in groups:
            table = file.read_row_group(int(group), columns=[column.name, *names])
            rows = table.slice(0, -(-NUM_QUERIES // len(groups))).combine_chunks()
            features += [column.read(chunk, 0).astype(np.float32) for chunk in rows[column.name].chunks]
            others.append(rows.select(names))
        return np.concatenate(features), pa.concat_tables(others)


def measure_pairs(config: Config, checkpoint: "Checkpoint") -> dict[str, Any] | None:
    """Return the content of the file, or None if the merged splits are not those that the checkpoint was trained on.

    The splits hold the backbone features, so no image is embedded again.
    """
    import torch

    from pipeline.retrieval.checkpoint import build_projector, project

    if config.paths.merged_dir is None:
        return None
    path = config.path("merged_dir") / "val.parquet"
    if not path.is_file() or identify(path) not in checkpoint.provenance.get("inputs", []):
        logger.info("%s: not what the checkpoint was trained beside: the model carries no rates of false pairs", path)
        return None
    features, columns = sample_rows(path)
    embeddings = project(build_projector(checkpoint), features, torch.device("cpu"))
    buildings = columns["building_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    positions = None
    if set(POSITION_COLUMNS) <= set(columns.column_names):
        positions = np.stack([columns[name].to_numpy() for name in POSITION_COLUMNS], axis=1).astype(np.float64)
        positions = positions if is_position(*positions.T).all() else None
    return describe_pairs(embeddings, buildings, positions)
