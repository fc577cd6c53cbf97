"""Tell whether a checkpoint may have been trained on buildings of the split that is scored."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.files.tables import read_provenance

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint


def doubt_split(checkpoint: "Checkpoint", test_path: Path) -> str | None:
    """Return a warning if a checkpoint was trained on another split than the scored one's, or nothing tells."""
    scored = (read_provenance(test_path) or {}).get("split_hash")
    trained_on = checkpoint.provenance.get("split_hash")
    if scored and trained_on == scored:
        return None
    why = "on another split" if scored and trained_on else "on a split that nothing names"
    return f"Mind: {checkpoint.path.name} was trained {why}, and may have seen buildings of this test split"
