"""Embeddings datasets for the tests of what works on them, written without a model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.parts import PartContent, PartPlan, count_rows, read_part, write_part

WIDTH = 8
VERSION = "0123456789abcdef"


def unit_rows(seed: int, num_rows: int, width: int = WIDTH) -> NDArray[np.float32]:
    """Return random unit vectors, (N, D)."""
    rows = np.random.default_rng(seed).normal(size=(num_rows, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def draw_buildings(seed, num_buildings, num_images, noise=0.15, width=8):
    """Return unit vectors around as many centres, and the building of each."""
    buildings = np.repeat(np.arange(num_buildings), num_images)
    rows = unit_rows(seed, num_buildings, width)[buildings] + noise * unit_rows(seed + 1, len(buildings), width)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), buildings


def write_dataset(
    folder: Path, ids: pa.Array, embeddings: NDArray[np.float32], rows_of_part: int = 10, **columns: Any
) -> Path:
    """Write a complete dataset of these embeddings (N, D), none rejected."""
    width = embeddings.shape[1]
    provenance = {
        "stage": "generate_embeddings_from_parquet", "version": "test", "embedding_version": VERSION,
        "inputs": [{"input_size": 1, "input_schema": [], "row_group_fingerprint": "f"}],
        "settings": {
            "read_batch_size": rows_of_part, "filter_valid": True, "precision": "float32", "embedding_version": VERSION,
            "keep_columns": list(columns), "id_column": "OSMID", "image_column": "image_bytes",
        },
    }  # fmt: skip
    kind = pa.list_(pa.field("element", pa.float32()), width)
    parts = []
    for number, first in enumerate(range(0, len(ids), rows_of_part)):
        own = slice(first, first + rows_of_part)
        table = pa.table(
            {
                "OSMID": ids[own],
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings[own].ravel()), type=kind),
                **{name: pa.array(values)[own] for name, values in columns.items()},
            }
        )
        plan = PartPlan(0, number, first, table.num_rows)
        schema = pa.schema([("row", pa.int64()), ("OSMID", ids.type), ("reason", pa.string()), ("detail", pa.string())])
        image_hashes = np.arange(first, first + table.num_rows, dtype=np.uint64)
        content = PartContent(table, schema.empty_table(), 0, image_hashes)
        write_part(folder, plan, content, provenance | {"part": asdict(plan)})
        parts.append(read_part(folder / "parts" / plan.name))
    state = {
        **provenance["inputs"][0], **provenance["settings"], "model_id": "none", "rows_total": len(ids),
        **count_rows(parts), "parts_total": len(parts), "complete": True,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))
    return folder
