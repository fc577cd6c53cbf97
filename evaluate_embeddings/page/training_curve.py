"""Read how a projector came about: its validation mAP by epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evaluate_embeddings.scores.metrics import BASELINES


@dataclass(frozen=True)
class Curve:
    """A training run's validation mAP by epoch."""

    epochs: list[int]
    values: list[float]
    baselines: dict[str, float]  # the mAP of the other kinds on the same images
    published: tuple[int, float]  # the epoch, and the mAP of the interpolation between it and the start


def read_training_curve(training: Mapping[str, Any]) -> Curve | None:
    """Return the curve that the metrics of a checkpoint hold, None if they have none."""
    try:
        validated = [record for record in training["history"] if record["val"] is not None]
        epochs, values = [int(one["epoch"]) for one in validated], [float(one["val"]["map"]) for one in validated]
        baselines = {kind: float(training["val"][kind]["map"]) for kind in BASELINES}
        published = int(training["epoch"]), float(training["val"]["projector"]["map"])
    except (ValueError, KeyError, TypeError):  # not written by our stage 6
        return None
    return Curve(epochs, values, baselines, published) if values else None
