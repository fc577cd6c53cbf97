"""Tell whether a checkpoint may have been trained on buildings of the split that is scored."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.files.tables import read_provenance

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint


def doubt_split(checkpoint: "Checkpoint", test_path: Path, building_ids: Sequence[str]) -> str | None:
    """Return a warning if a checkpoint was trained on some of a split's buildings, or nothing tells."""
    name, seen = checkpoint.path.name, checkpoint.count_trained_on(building_ids)
    if seen is not None:
        return (
            f"Mind: {name} was trained on {seen} of the {len(building_ids)} buildings of this split" if seen else None
        )
    split = read_provenance(test_path) or {}
    scored, trained_on = split.get("split_hash"), checkpoint.provenance.get("split_hash")
    if seen == 0 or (scored and trained_on == scored):
        return None
    if split.get("settings", {}).get("split_file") and not trained_on:
        return f"Mind: {name} does not name its training buildings; the scores hold if they are the split file's"
    why = "on another split" if scored and trained_on else "on a split that nothing names"
    return f"Mind: {name} was trained {why}, and may have seen buildings of this test split"
