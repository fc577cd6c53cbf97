"""The files of a training run.

`provenance.json` is written last and marks a complete run. Until then `.checkpoint_latest.pt` holds all that the run
resumes from, and the other files are written from its content, so that they agree with it after any kill.
Importing this needs no torch: a complete run is kept without it.
"""

import json
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline.errors import StaleOutputError
from pipeline.files import workspace

# For TensorBoard and Weights & Biases.
LOG_FOLDERS = TENSORBOARD, WANDB = "_tensorboard", "_wandb"
_OUTPUT = re.compile(r"checkpoint_(best|final|epoch_\d+)\.pt|metrics\.jsonl")


class RunFiles:
    """The paths in a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best = folder / "checkpoint_best.pt"  # what is published
        self.final = folder / "checkpoint_final.pt"  # the last epoch
        self.metrics = folder / "metrics.jsonl"  # one JSON object an epoch
        self.latest = folder / ".checkpoint_latest.pt"  # the state of an unfinished run
        self.provenance = folder / "provenance.json"  # the inputs, settings and counts of a complete run

    def of_epoch(self, epoch: int) -> Path:
        """Return the periodic checkpoint of an epoch."""
        return self.folder / f"checkpoint_epoch_{epoch}.pt"

    def list_outputs(self) -> list[Path]:
        """Return the checkpoints and metrics that exist."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _OUTPUT.fullmatch(path.name))

    def list_all(self) -> list[Path]:
        """Return all that runs leave here; the mark first, so that a half-removed run does not look complete."""
        return [self.provenance, self.latest, *self.list_outputs(), *(self.folder / name for name in LOG_FOLDERS)]

    def check(self) -> None:
        """Raise StaleOutputError where nothing says what the checkpoints that exist were made from."""
        if self.list_outputs() and not (self.provenance.exists() or self.latest.exists()):
            raise StaleOutputError(
                f"{self.list_outputs()[0]}: nothing beside it says what it was made from: give --overwrite to train "
                "over it, or set another [paths].checkpoint_dir"
            )

    def locked(self) -> AbstractContextManager[None]:
        """Keep other trainings out of the folder while the block runs."""
        doing = "is training there: wait for it, or set another [paths].checkpoint_dir"
        return workspace.locked(self.folder, doing, self.folder / ".lock")

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write one line an epoch."""
        lines = [json.dumps(record, allow_nan=False) for record in history]
        with workspace.writing_to(self.metrics) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
