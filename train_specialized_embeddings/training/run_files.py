"""The files of a training run.

`provenance.json` is written last and marks a complete run. Until then `.checkpoint_latest.pt` holds all that the run
resumes from, and the other files are written from its content, so that they agree with it after any kill.
Importing this needs no torch: a complete run is kept without it.
"""

import re
from pathlib import Path

from pipeline.files.identity import digest_file

BEST, FINAL = "checkpoint_best.pt", "checkpoint_final.pt"  # what is published; the last epoch
PERIODIC = "checkpoint_epoch_{}.pt"
METRICS = "metrics.jsonl"  # one JSON object an epoch
LATEST = ".checkpoint_latest.pt"  # the state of an unfinished run
PROVENANCE = "provenance.json"  # the inputs, settings and counts of a complete run
LOG_FOLDERS = TENSORBOARD, WANDB = "_tensorboard", "_wandb"
_OUTPUT = re.compile(r"checkpoint_(best|final|epoch_\d+)\.pt|metrics\.jsonl")


def digest_outputs(folder: Path) -> dict[str, str]:
    """Return the digests of a complete run's checkpoints; metrics.jsonl has the seconds that it took."""
    return {name: digest_file(folder / name) for name in (BEST, FINAL) if (folder / name).exists()}


def list_outputs(folder: Path) -> list[Path]:
    """Return the checkpoints and metrics that exist in a folder."""
    return sorted(path for path in folder.glob("*") if _OUTPUT.fullmatch(path.name))
