"""The sections of stage 9's page that are drawings: recall, similarity of pairs, training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluate_embeddings.page.layout import build_figure, build_section, build_table
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
from pipeline.config import Config


def build_recall(evaluation: Evaluation, metrics: Mapping[str, Any]) -> str:
    """Return the Recall@k curves."""
    drawing = build_figure(
        plot_recall_curves(evaluation.scores), "Share of queries with a right answer among the first k."
    )
    galleries = metrics["by_gallery_size"]
    more = ""
    if len(galleries) > 1:
        sizes = {f"{int(size):,}": group for size, group in galleries.items()}
        more = build_figure(plot_groups(sizes, "gallery size"), "Recall@1 by gallery size, with 95% intervals.")
    return build_section(
        "Recall", "How far down the list one has to look.", f'<div class="figures">{drawing}{more}</div>'
    )


def build_verification(evaluation: Evaluation, metrics: Mapping[str, Any]) -> str:
    """Return similarity histograms, ROC and what fixed false-positive rates give."""
    found = metrics["verification"]
    histograms = "".join(
        build_figure(plot_similarities(pairs, found[kind], KIND_LABELS[kind]), f"Pairs of images, {KIND_LABELS[kind]}.")
        for kind, pairs in evaluation.pairs.items()
    )
    title = "Same building or not"
    if any(found[kind] is None for kind in evaluation.pairs):
        lead = "There are no pairs of two buildings that one threshold could tell from pairs of one."
        return build_section(title, lead, f'<div class="figures three">{histograms}</div>')
    own = found["projector"]
    row = own["at_false_positive_rate"]["0.001"]
    lead = (
        f"One threshold on the cosine instead of a search. Recommended: {own['recommended_threshold']:.3f} on the "
        f"projector's embeddings, which 1 in 1,000 pairs of two buildings passes and {row['recall']:.0%} of the pairs "
        f"of one building. Both errors are equally likely ({own['equal_error_rate']:.1%}) at "
        f"{own['equal_error_threshold']:.3f}. {len(evaluation.pairs['projector'].same):,} pairs of one building and "
        f"{len(evaluation.pairs['projector'].different):,} of two were drawn at random; in this split one pair in "
        f"{1 / found['share_of_same_pairs']:,.0f} shows one building, which the last column takes into account."
    )
    header = [
        "", "false positives", "threshold", "same pairs found", "precision, as many of both", "precision in this split"
    ]  # fmt: skip
    rows = [
        ("own" if kind == "projector" else "", [KIND_LABELS[kind], f"{float(rate):.1%}", *_format_operating_point(at)])
        for kind in evaluation.pairs
        for rate, at in found[kind]["at_false_positive_rate"].items()
    ]
    roc = build_figure(plot_roc(evaluation.pairs, found), "Receiver operating characteristic, logarithmic.")
    return build_section(
        title,
        lead,
        f'<div class="figures">{histograms}{roc}</div>',
        build_table(header, rows),
    )


def _format_operating_point(at: Mapping[str, Any]) -> list[str]:
    precisions = (at["precision_balanced"], at["precision_in_split"])
    shown = ("–" if precision is None else f"{precision:.1%}" for precision in precisions)
    return [f"{at['threshold']:.3f}", f"{at['recall']:.1%}", *shown]


def build_training(training: Mapping[str, Any], config: Config) -> str:
    """Return the training curve and the shares of the difficulty bands."""
    curve = read_training_curve(config.path("checkpoint_dir") / "metrics.jsonl", training)
    if curve is None:
        missing = '<p class="card soft">No training curve: neither metrics.jsonl nor the checkpoint has one.</p>'
        return build_section("Training", "How the projector came about.", missing)
    figures = build_figure(plot_training(curve), "Validation mAP by epoch; the best epoch is kept, be it epoch 0.")
    if curve.band_shares:
        figures += build_figure(plot_band_shares(curve), "From which difficulty band the negatives were drawn.")
    return build_section(
        "Training", "How the projector came about: epoch 0 is its start, before any step.",
        f'<div class="figures">{figures}</div>',
    )  # fmt: skip


def read_training_curve(path: Path, training: Mapping[str, Any]) -> Curve | None:
    """Return the validation mAP by epoch, of metrics.jsonl or else of the checkpoint; None where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        records = [json.loads(line) for line in lines] or training["history"]
        epochs, values = [int(record["epoch"]) for record in records], [float(r["val"]["map"]) for r in records]
        baselines = {kind: float(training["val"][kind]["map"]) for kind in BASELINES if kind in training.get("val", {})}
        shares = {int(record["epoch"]): record["band_shares"] for record in records if record.get("band_shares")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # an older run's: the page can do without
        return None
    return Curve(epochs, values, baselines, shares) if epochs else None
