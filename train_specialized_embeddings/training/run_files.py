"""The files of a training run.

`provenance.json` is written last and marks a complete run. Until then `.checkpoint_latest.pt` holds all that the run
resumes from, and the other files are written from its content, so that they agree with it after any kill.
Importing this needs no torch: a complete run is kept without it.
"""

import re
from pathlib import Path

from pipeline.errors import StaleOutputError
from pipeline.files.identity import digest_file
from pipeline.workspace import read_json_object

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
    return sorted(path for path in folder.glob("*") if _OUTPUT.fullmatch(path.name))


def check_marked(folder: Path) -> None:
    """Raise StaleOutputError where nothing beside outputs says what they were made from: they may be anybody's."""
    found = list_outputs(folder)
    if found and not any((folder / name).exists() for name in (PROVENANCE, LATEST)):
        raise StaleOutputError(
            f"{found[0]}: nothing beside it says what it was made from: move it away, or set another "
            "[paths].checkpoint_dir"
        )


def check_outputs(folder: Path) -> None:
    """Raise StaleOutputError where outputs are not marked, or one was put in later."""
    check_marked(folder)
    made = read_json_object(folder / PROVENANCE).get("outputs", {})
    for name, digest in digest_outputs(folder).items() if made else ():
        if made.get(name, digest) != digest:
            raise StaleOutputError(
                f"{folder / name}: not the one that this run wrote: put that back, or give --overwrite"
            )
