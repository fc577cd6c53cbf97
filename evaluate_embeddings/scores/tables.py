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
    compare_kinds,
    judge,
    summarize_kinds,
)
from pipeline.retrieval.scores import SCORE_KEYS, Embeddings, QueryScores

COLUMNS = 80
# The scores that fit into so many columns.
TABLE_KEYS = tuple(key for key in SCORE_KEYS if key != "recall_at_100")


@dataclass(frozen=True)
class LabelledModels:
    """One or two models and their embeddings of the same images, with the building of each image."""

    places: list[Path]  # where each model was read from
    embeddings: list[Embeddings]  # of each model (N, D), L2-normalised
    codes: NDArray[np.int32]  # (N,) of the building
    ignored: NDArray[np.int64]  # (M, 2) pairs of buildings
    notes: list[str] = field(default_factory=list)  # why the comparison may be unfair


def format_metrics_table(metrics: Mapping[str, Any]) -> str:
    counts = (metrics["queries"], metrics["gallery"], metrics["buildings"], metrics["ignored_pairs"])
    lines = _format_counts(*counts, split=f"{metrics['split']} split: ")
    lines += _format_scores({KIND_LABELS[kind]: metrics[kind] for kind in KINDS})
    return _finish(lines, f"{metrics['headline']}. {describe_gains(metrics)}")


def format_models(scores: list[QueryScores], models: LabelledModels, seed: int) -> str:
    """Return the scores of one model as a table, or those of two and their difference."""
    names = [place.name for place in models.places]
    if len(names) > len(set(names)):
        names = [str(place) for place in models.places]
    codes, titles = models.codes, names if len(names) == 1 else ["A", "B"]
    by_title = dict(zip(titles, scores, strict=True))
    found = summarize_kinds(by_title, codes, seed)
    lines = _format_counts(found["queries"], len(codes), len(np.unique(codes)), len(models.ignored))
    if len(names) == 1:
        own, (low, high) = found[names[0]], found[names[0]]["map_ci95"]
        verdict = (
            f"{names[0]} finds the building at first try for {own['recall_at_1']:.1%} of the queries "
            f"(mAP {own['map']:.3f}, 95% interval {low:.3f} to {high:.3f})."
        )
        return _finish([*lines, *_format_scores({names[0]: own})], verdict)
    gain = compare_kinds(by_title, codes, seed)["over_A"]
    low, high = gain["map_ci95"]
    rows = {
        "B - A": [f"{gain[key]:+.3f}" for key in TABLE_KEYS],
        "95% from": [f"{gain[f'{key}_ci95'][0]:+.3f}" for key in TABLE_KEYS],
        "95% to": [f"{gain[f'{key}_ci95'][1]:+.3f}" for key in TABLE_KEYS],
    }
    lines += [f"A = {names[0]}", f"B = {names[1]}", *_format_scores({title: found[title] for title in titles})]
    lines += [_format_line(title, cells) for title, cells in rows.items()]
    verdict = (
        f"B ({names[1]}) {judge((low, high))} A ({names[0]}): mAP {gain['map']:+.3f}, "
        f"95% interval {low:+.3f} to {high:+.3f}; Recall@1 {gain['recall_at_1']:+.3f}."
    )
    return _finish(lines, *models.notes, verdict)


def _format_counts(queries: int, gallery: int, buildings: int, ignored_pairs: int, split: str = "") -> list[str]:
    return [
        f"{split}{queries:,} queries, gallery of {gallery:,} images, {buildings:,} buildings,",
        f"{ignored_pairs:,} pairs of buildings ignored; below each value its 95% interval",
        "",
    ]


def _format_scores(rows: Mapping[str, Scores]) -> list[str]:
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


def describe_gains(metrics: Mapping[str, Any]) -> str:
    parts = []
    for baseline in BASELINES:
        gain = metrics["projector_gain"][f"over_{baseline}"]
        low, high = gain["map_ci95"]
        parts.append(f"{gain['map']:+.3f} over {KIND_LABELS[baseline]} ({low:+.3f} to {high:+.3f})")
    return f"Its gain in mAP, with the 95% interval of the difference: {', '.join(parts)}."
