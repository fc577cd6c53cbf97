"""Compare two models on the same images by a paired bootstrap, and format the scores as a table."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluate_embeddings.scores.metrics import (
    SCORE_LABELS,
    TABLE_KEYS,
    Scores,
    format_score_lines,
    judge,
    summarize_scores_with_intervals,
)
from pipeline.retrieval.candidates import IgnoredPairs
from pipeline.retrieval.scores import SCORE_KEYS, QueryScores, percentile_intervals, resample_means

# The smallest p is then 0.0002.
NUM_RESAMPLES = 10_000
COLUMNS = 80


@dataclass(frozen=True)
class LabelledImages:
    """The images on which one model is scored, or two."""

    codes: NDArray[np.int32]  # (N,) of the building
    ignored: IgnoredPairs
    without_label: int  # number of images left out


@dataclass(frozen=True)
class Comparison:
    """The gain of the second model: mean over queries, 95% interval, p of no difference."""

    scores: tuple[QueryScores, QueryScores]
    difference: dict[str, float]
    interval: dict[str, list[float]]
    p: dict[str, float]


def compare(one: QueryScores, other: QueryScores, codes: NDArray[Any], seed: int) -> Comparison:
    """Compare two models' scores of the same queries by a paired bootstrap over buildings.

    p is twice the smaller share of resamples on one side of no difference, with (r + 1) / (R + 1) for a share
    (Davison and Hinkley, Bootstrap Methods, section 4.4.1).
    """
    differences = other.values() - one.values()  # (Q, 6)
    resampled = resample_means(differences, codes[one.query], seed, NUM_RESAMPLES)
    tails = np.stack([(resampled <= 0).sum(axis=0), (resampled >= 0).sum(axis=0)]).min(axis=0)
    p = np.minimum(1.0, 2 * (tails + 1) / (NUM_RESAMPLES + 1))
    return Comparison(
        (one, other),
        dict(zip(SCORE_KEYS, differences.mean(axis=0).tolist(), strict=True)),
        percentile_intervals(resampled),
        dict(zip(SCORE_KEYS, p.tolist(), strict=True)),
    )


def format_one(name: str, scores: QueryScores, images: LabelledImages, seed: int) -> str:
    """Return the scores of one model as a table of at most 80 columns, the verdict last."""
    summary = summarize_scores_with_intervals(scores, images.codes, seed)
    verdict = (
        f"{name} finds the building at first try for {summary['recall_at_1']:.1%} of the queries "
        f"(mAP {summary['map']:.3f}, 95% interval {summary['map_ci95'][0]:.3f} to {summary['map_ci95'][1]:.3f})."
    )
    return "\n".join([*_describe(scores, images), *_table({name: summary}), "", *textwrap.wrap(verdict, COLUMNS)])


def format_two(names: tuple[str, str], found: Comparison, images: LabelledImages, seed: int, notes: list[str]) -> str:
    """Return the scores of two models and their difference, at most 80 columns wide, the verdict last."""
    summaries = {
        label: summarize_scores_with_intervals(scores, images.codes, seed)
        for label, scores in zip("AB", found.scores, strict=True)
    }
    lines = [
        *_describe(found.scores[0], images),
        *(f"{label} = {name}" for label, name in zip("AB", names, strict=True)),
    ]
    lines += [*_table(summaries), f"{'B - A':<14}" + "".join(f"{found.difference[key]:>+13.3f}" for key in TABLE_KEYS)]
    for name, end in (("95% from", 0), ("95% to", 1)):
        lines.append(f"{name:<14}" + "".join(f"{found.interval[key][end]:>+13.3f}" for key in TABLE_KEYS))
    lines.append(f"{'p':<14}" + "".join(f"{format_p(found.p[key]):>13}" for key in TABLE_KEYS))
    for text in [*notes, describe_comparison(names, found)]:
        lines += ["", *textwrap.wrap(text, COLUMNS)]
    return "\n".join(lines)


def _describe(scores: QueryScores, images: LabelledImages) -> list[str]:
    lines = [
        f"{len(scores.query):,} queries, gallery of {len(images.codes):,} images, "
        f"{len(np.unique(images.codes)):,} buildings,",
        f"{len(images.ignored.building_a):,} pairs of buildings ignored; below each value its 95% interval",
    ]
    if images.without_label:
        lines.append(f"{images.without_label:,} images have no label: left out of queries and gallery")
    return [*lines, ""]


def _table(summaries: Mapping[str, Scores]) -> list[str]:
    lines = [" " * 14 + "".join(f"{SCORE_LABELS[key]:>13}" for key in TABLE_KEYS)]
    for label, scores in summaries.items():
        lines += format_score_lines(label[:13], scores)
    return lines


def describe_comparison(names: tuple[str, str], found: Comparison) -> str:
    """Compare B with A: verdict by the interval of the difference, gain and p."""
    low, high = found.interval["map"]
    return (
        f"B ({names[1]}) {judge((low, high))} A ({names[0]}): mAP {found.difference['map']:+.3f}, "
        f"95% interval {low:+.3f} to {high:+.3f}, p = {format_p(found.p['map'])}; "
        f"Recall@1 {found.difference['recall_at_1']:+.3f}."
    )


def format_p(p: float) -> str:
    """Return p with four digits, or as smaller than the least p that the resamples can show."""
    least = 2 / (NUM_RESAMPLES + 1)
    return f"<{least:.4f}" if p <= least else f"{p:.4f}"
