"""All figures of stage 9's page, and the training curve that two of them show."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from evaluate_embeddings.page.plots import (
    Curve,
    plot_band_shares,
    plot_groups,
    plot_recall_curves,
    plot_roc,
    plot_similarities,
    plot_training,
)
from evaluate_embeddings.scores.metrics import BASELINES, KIND_LABELS, Evaluation

BREAKDOWNS = {
    "by_views": "images of the building",
    "by_viewpoint_change": "change of heading, degrees",
    "by_distance": "distance of the camera, metres",
}


def draw_figures(evaluation: Evaluation, metrics: Mapping[str, Any], curve: Curve | None) -> dict[str, Any]:
    """Return the page's drawings by name, None for what there is nothing to draw of."""
    found, pairs = metrics["verification"], evaluation.pairs
    galleries = {f"{int(size):,}": group for size, group in metrics["by_gallery_size"].items()}
    return {
        "recall": Markup(plot_recall_curves(evaluation.scores)),
        "galleries": Markup(plot_groups(galleries, "gallery size")) if len(galleries) > 1 else None,
        "similarities": {
            kind: Markup(plot_similarities(one, found[kind], KIND_LABELS[kind])) for kind, one in pairs.items()
        },
        "roc": Markup(plot_roc(pairs, found)) if all(found[kind] for kind in pairs) else None,
        "breakdowns": {
            key: Markup(plot_groups(metrics[key], label)) for key, label in BREAKDOWNS.items() if metrics[key]
        },
        "training": Markup(plot_training(curve)) if curve else None,
        "band_shares": Markup(plot_band_shares(curve)) if curve and curve.band_shares else None,
    }


def read_training_curve(path: Path, training: Mapping[str, Any]) -> Curve | None:
    """Return the validation mAP by epoch, of metrics.jsonl or else of the checkpoint; None where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        records = [json.loads(line) for line in lines] or training["history"]
        epochs, values = [int(record["epoch"]) for record in records], [float(r["val"]["map"]) for r in records]
        baselines = {kind: float(training["val"][kind]["map"]) for kind in BASELINES if kind in training.get("val", {})}
        own = training.get("val", {}).get("projector")
        published = (int(training["epoch"]), float(own["map"])) if own and "epoch" in training else None
        shares = {int(record["epoch"]): record["band_shares"] for record in records if record.get("band_shares")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # an older run's: the page can do without
        return None
    return Curve(epochs, values, baselines, published, shares) if epochs else None
