"""Tell whether a checkpoint can be scored on a split: not trained on its buildings, but on embeddings of its kind."""

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.files.tables import read_provenance
from pipeline.inference.model_files import compare_embedded

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint


def doubt_split(checkpoint: "Checkpoint", test_path: Path, building_ids: pa.StringArray) -> str | None:
    """Return a warning if a checkpoint was trained on some of a split's buildings, or on other embeddings than its, or
    does not name its own buildings."""
    split = read_provenance(test_path) or {}
    name, count = checkpoint.path.name, checkpoint.count_trained_on(building_ids.to_pylist())
    if count:  # first, as it makes the scores too good
        return f"Mind: {name} was trained on {count:,} of the {len(building_ids):,} buildings of this split"
    difference = compare_embedded(checkpoint.provenance.get("embedded_with"), split.get("embedded_with"))
    if difference:
        return f"Mind: {name} was trained on other embeddings than this split's ({difference})"
    if count == 0:
        return None
    if split.get("settings", {}).get("split_file"):
        return f"Mind: {name} does not name its training buildings; the scores hold if they are the split file's"
    return f"Mind: {name} does not name its training buildings, and nothing tells if they are in this split"
