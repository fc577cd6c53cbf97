"""Format scores as tables of at most 80 columns, the verdict last."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluate_embeddings.scores.metrics import (
    BASELINES,
    KIND_LABELS,
    KINDS,
    SCORE_LABELS,
    Scores,
    judge,
    summarize_kinds,
)
from pipeline.retrieval.candidates import IgnoredPairs
from pipeline.retrieval.scores import SCORE_KEYS, Embeddings, QueryScores, percentile_intervals, resample_means

COLUMNS = 80
# The smallest p of a comparison is then 0.0002.
NUM_RESAMPLES = 10_000
# The scores that fit into so many columns.
TABLE_KEYS = tuple(key for key in SCORE_KEYS if key != "recall_at_100")


@dataclass(frozen=True)
class LabelledModels:
    """One or two models and their embeddings of the same images, with the building of each image."""

    places: list[Path]  # where each model was read from
    embeddings: list[Embeddings]  # of each model (N, D), L2-normalised
    codes: NDArray[np.int32]  # (N,) of the building
    ignored: IgnoredPairs
    notes: list[str] = field(default_factory=list)  # why the comparison may be unfair


def format_metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return metrics.json as a table, with the intervals below the values."""
    counts = (metrics["queries"], metrics["gallery"], metrics["buildings"], metrics["ignored_pairs"])
    lines = _format_counts(*counts, split=f"{metrics['split']} split: ")
    lines += _format_scores({KIND_LABELS[kind]: metrics[kind] for kind in KINDS})
    return _finish(lines, f"{metrics['headline']}. {describe_verdict(metrics)}")


def compare(
    one: QueryScores, other: QueryScores, codes: NDArray[Any], seed: int
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, float]]:
    """Return the gain of the second model: mean over queries, 95% interval, and p of no difference.

    By a paired bootstrap over buildings; p is twice the smaller share of resamples on one side of no difference, with
    (r + 1) / (R + 1) for a share (Davison and Hinkley, Bootstrap Methods, section 4.4.1).
    """
    differences = other.values() - one.values()  # (Q, 6)
    resampled = resample_means(differences, codes[one.query], seed, NUM_RESAMPLES)
    tails = np.stack([(resampled <= 0).sum(axis=0), (resampled >= 0).sum(axis=0)]).min(axis=0)
    p = np.minimum(1.0, 2 * (tails + 1) / (NUM_RESAMPLES + 1))
    gain = dict(zip(SCORE_KEYS, differences.mean(axis=0).tolist(), strict=True))
    return gain, percentile_intervals(resampled), dict(zip(SCORE_KEYS, p.tolist(), strict=True))


def format_models(scores: list[QueryScores], models: LabelledModels, seed: int) -> str:
    """Return the scores of one model as a table, or those of two and their difference."""
    names = [place.name for place in models.places]
    if len(names) > len(set(names)):
        names = [str(place) for place in models.places]
    codes, titles = models.codes, names if len(names) == 1 else ["A", "B"]
    found = summarize_kinds(dict(zip(titles, scores, strict=True)), codes, seed)
    lines = _format_counts(found["queries"], len(codes), len(np.unique(codes)), len(models.ignored.building_a))
    if len(names) == 1:
        own, (low, high) = found[names[0]], found[names[0]]["map_ci95"]
        verdict = (
            f"{names[0]} finds the building at first try for {own['recall_at_1']:.1%} of the queries "
            f"(mAP {own['map']:.3f}, 95% interval {low:.3f} to {high:.3f})."
        )
        return _finish([*lines, *_format_scores({names[0]: own})], verdict)
    gain, intervals, p = compare(scores[0], scores[1], codes, seed)
    low, high = intervals["map"]
    rows = {
        "B - A": [f"{gain[key]:+.3f}" for key in TABLE_KEYS],
        "95% from": [f"{intervals[key][0]:+.3f}" for key in TABLE_KEYS],
        "95% to": [f"{intervals[key][1]:+.3f}" for key in TABLE_KEYS],
        "p": [format_p(p[key]) for key in TABLE_KEYS],
    }
    lines += [f"A = {names[0]}", f"B = {names[1]}", *_format_scores({title: found[title] for title in titles})]
    lines += [_format_line(title, cells) for title, cells in rows.items()]
    verdict = (
        f"B ({names[1]}) {judge((low, high))} A ({names[0]}): mAP {gain['map']:+.3f}, "
        f"95% interval {low:+.3f} to {high:+.3f}, p = {format_p(p['map'])}; Recall@1 {gain['recall_at_1']:+.3f}."
    )
    return _finish(lines, *models.notes, verdict)


def _format_counts(queries: int, gallery: int, buildings: int, ignored_pairs: int, split: str = "") -> list[str]:
    return [
        f"{split}{queries:,} queries, gallery of {gallery:,} images, {buildings:,} buildings,",
        f"{ignored_pairs:,} pairs of buildings ignored; below each value its 95% interval",
        "",
    ]


def _format_scores(rows: Mapping[str, Scores]) -> list[str]:
    """Return a line of titles, and for each row a line of its scores and one of their intervals."""
    lines = [_format_line("", [SCORE_LABELS[key] for key in TABLE_KEYS])]
    for label, scores in rows.items():
        lines.append(_format_line(label[:13], [f"{scores[key]:.3f}" for key in TABLE_KEYS]))
        lines.append(_format_line("", ["{:.3f}-{:.3f}".format(*scores[f"{key}_ci95"]) for key in TABLE_KEYS]))
    return lines


def _format_line(label: str, cells: list[str]) -> str:
    return f"{label:<14}" + "".join(f"{cell:>13}" for cell in cells)


def _finish(lines: list[str], *paragraphs: str) -> str:
    for text in paragraphs:
        lines += ["", *textwrap.wrap(text, COLUMNS)]
    return "\n".join(lines)


def format_p(p: float) -> str:
    """Return p with four digits, or as smaller than the least p that the resamples can show."""
    least = 2 / (NUM_RESAMPLES + 1)
    return f"<{least:.4f}" if p <= least else f"{p:.4f}"


def describe_verdict(metrics: Mapping[str, Any]) -> str:
    """Compare the projector with each baseline: verdict, gain in mAP and its interval."""
    own = metrics["projector"]
    parts = [_compare(metrics, baseline) for baseline in BASELINES]
    return (
        f"The projector finds the building at first try for {own['recall_at_1']:.1%} of the queries "
        f"(mAP {own['map']:.3f}): it {', '.join(parts[:-1])}, and {parts[-1]}."
    )


def _compare(metrics: Mapping[str, Any], baseline: str) -> str:
    gain = metrics["projector_gain"][f"over_{baseline}"]
    low, high = gain["map_ci95"]
    return (
        f"{judge((low, high))} {KIND_LABELS[baseline]} ({metrics[baseline]['recall_at_1']:.1%}, "
        f"mAP {metrics[baseline]['map']:.3f}): mAP {gain['map']:+.3f}, 95% interval {low:+.3f} to {high:+.3f}"
    )
