"""Tell whether a checkpoint was trained on buildings of the split that is scored."""

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.files.tables import read_provenance

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint


def doubt_split(checkpoint: "Checkpoint", test_path: Path, building_ids: pa.StringArray) -> str | None:
    """Return a warning if a checkpoint was trained on some of a split's buildings, or does not name its own."""
    name, count = checkpoint.path.name, checkpoint.count_trained_on(building_ids.to_pylist())
    if count:
        return f"Mind: {name} was trained on {count:,} of the {len(building_ids):,} buildings of this split"
    if count == 0:
        return None
    if (read_provenance(test_path) or {}).get("settings", {}).get("split_file"):
        return f"Mind: {name} does not name its training buildings; the scores hold if they are the split file's"
    return f"Mind: {name} does not name its training buildings, and nothing tells if they are in this split"
