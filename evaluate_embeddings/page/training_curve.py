"""Read how a projector came about: its validation mAP by epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate_embeddings.scores.metrics import BASELINES
from pipeline.files.workspace import parse_json


@dataclass(frozen=True)
class Curve:
    """A training run's validation mAP by epoch."""

    epochs: list[int]
    values: list[float]
    baselines: dict[str, float]  # the mAP of the other kinds on the same images, as far as it is recorded
    published: tuple[int, float]  # the best epoch, and the mAP of the published interpolation where it is recorded


def read_training_curve(path: Path, training: Mapping[str, Any]) -> Curve | None:
    """Return the validation mAP by epoch, None if there is none.

    It comes from metrics.jsonl where that goes on from the checkpoint's own epochs, else from the checkpoint.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        records, known = [parse_json(line) for line in lines], training.get("history", [])
        begun = records[: len(known)]
        if [(one["epoch"], one["val"]) for one in begun] != [(one["epoch"], one["val"]) for one in known]:
            records = known  # the file is another run's
        validated = [record for record in records if record["val"] is not None]
        epochs, values = [int(one["epoch"]) for one in validated], [float(one["val"]["map"]) for one in validated]
        baselines = {kind: float(training["val"][kind]["map"]) for kind in BASELINES if kind in training.get("val", {})}
        own = training.get("val", {}).get("projector")
        best = max(values)
        published = epochs[values.index(best)], best
        if own and "epoch" in training:
            published = int(training["epoch"]), float(own["map"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not written by our stage 6
        return None
    return Curve(epochs, values, baselines, published)
