"""The files of a training run: what says that it is complete, what it goes on from, what it leaves.

`provenance.json` is written last and marks a complete run. Until then `.checkpoint_latest.pt` holds all that the run
goes on from, and the other files are written from what it holds, so that they agree with it after any kill.
Importing this needs no torch: a complete run is kept without it.
"""

import json
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, StaleOutputError
from pipeline.files import workspace, writing

# What TensorBoard and Weights & Biases are given.
LOG_FOLDERS = TENSORBOARD, WANDB = "_tensorboard", "_wandb"


@dataclass(frozen=True)
class RunFiles:
    """The names within a checkpoint folder."""

    folder: Path

    @property
    def best(self) -> Path:
        """The checkpoint of the epoch with the best validation mAP."""
        return self.folder / "checkpoint_best.pt"

    @property
    def final(self) -> Path:
        """The checkpoint of the last epoch."""
        return self.folder / "checkpoint_final.pt"

    @property
    def metrics(self) -> Path:
        """One JSON object an epoch."""
        return self.folder / "metrics.jsonl"

    @property
    def latest(self) -> Path:
        """What an unfinished run goes on from."""
        return self.folder / ".checkpoint_latest.pt"

    @property
    def provenance(self) -> Path:
        """What a complete run was made from, and its counts."""
        return self.folder / "provenance.json"

    def of_epoch(self, epoch: int) -> Path:
        """Return the periodic checkpoint of an epoch."""
        return self.folder / f"checkpoint_epoch_{epoch}.pt"

    def list_outputs(self) -> list[Path]:
        """Return the files of a run that are there, other than the hidden one and the mark."""
        if not self.folder.is_dir():
            return []
        pattern = re.compile(r"checkpoint_(best|final|epoch_\d+)\.pt|metrics\.jsonl")
        return sorted(path for path in self.folder.iterdir() if pattern.fullmatch(path.name))

    def read_provenance(self) -> dict[str, Any] | None:
        """Return the mark of a complete run, None where there is none.

        Raises InputError if it is damaged.
        """
        try:
            content = json.loads(self.provenance.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise InputError(f"{self.provenance}: damaged: give --overwrite to train again, or remove the folder")
        return content

    def check(self) -> None:
        """Raise StaleOutputError where checkpoints are there and nothing says what they were made from.

        Raises InputError if the mark of a complete run is damaged.
        """
        if self.read_provenance() is None and self.list_outputs() and not self.latest.exists():
            raise StaleOutputError(
                f"{self.list_outputs()[0]}: nothing beside it says what it was made from: give --overwrite to train "
                "over it, or set another [paths].checkpoint_dir"
            )

    def list_all(self) -> list[Path]:
        """Return all that runs leave here; the mark first, so that what is half removed does not look whole."""
        return [self.provenance, self.latest, *self.list_outputs(), *(self.folder / name for name in LOG_FOLDERS)]

    def locked(self) -> AbstractContextManager[None]:
        """Keep other trainings out of the folder while the block runs (see `workspace.locked`)."""
        doing = "is training there: wait for it, or set another [paths].checkpoint_dir"
        return workspace.locked(self.folder, doing, self.folder / ".lock")

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write one line an epoch, in one piece."""
        lines = [json.dumps(record, allow_nan=False) for record in history]
        with writing.writing_to(self.metrics) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
