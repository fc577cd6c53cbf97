"""Compute the numbers of metrics.json from the embeddings of one split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.features import Features
from pipeline.retrieval.scores import (
    SCORE_KEYS,
    Embeddings,
    QueryScores,
    percentile_intervals,
    resample_means,
    score_queries,
    summarize_scores,
)

if TYPE_CHECKING:
    import torch

# The embeddings that the projector has to beat; whitening is a closed form, without training.
BASELINES = ("raw", "pca_whitened", "whitening")
KINDS = (*BASELINES, "projector")
KIND_LABELS = {"raw": "raw", "pca_whitened": "PCA-whitened", "whitening": "whitening", "projector": "projector"}
SCORE_LABELS = {
    "recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "recall_at_10": "Recall@10", "recall_at_100": "Recall@100",
    "map": "mAP", "mrr": "MRR",
}  # fmt: skip
# Galleries of one size make splits of different sizes comparable.
GALLERY_SIZES = (1_000, 10_000, 100_000)

ScoresByKind = dict[str, QueryScores]
Scores = dict[str, Any]  # each of SCORE_KEYS and, under KEY_ci95, its interval


@dataclass(frozen=True)
class Evaluation:
    """A split, its embeddings of each kind, and the scores of every query."""

    features: Features
    embeddings: dict[str, Embeddings]  # (N, D of the kind), L2-normalised
    ignored: NDArray[np.int64]  # (M, 2) pairs of buildings
    scores: ScoresByKind
    apart: ScoresByKind | None = None  # among other panoramas; None if no query has a positive there
    device: "torch.device | None" = None  # for searching galleries, None is the CPU

    @property
    def codes(self) -> NDArray[np.int32]:
        return self.features.building_codes


def sample_gallery(codes: NDArray[Any], size: int, seed: int) -> NDArray[np.int64]:
    """Return `size` rows, ascending, of buildings in random order; only the last building may be cut.

    A building comes with all its images, so that queries keep their positives. Larger galleries contain smaller ones.
    """
    codes = np.unique(codes, return_inverse=True)[1]
    place = np.random.default_rng(seed).permutation(int(codes.max()) + 1)  # of each building in the order
    return np.sort(np.argsort(place[codes], kind="stable")[:size])


# ------------------------------------------------------------------------------------------------ summaries


def summarize_kinds(scores: ScoresByKind, codes: NDArray[Any], seed: int) -> dict[str, Any]:
    """Return the number of queries and of their buildings, and for each kind the scores with intervals."""
    queries = next(iter(scores.values())).query
    counts = {"queries": len(queries), "buildings": len(np.unique(codes[queries]))}
    resampled = _resample_kinds(scores, codes, seed)
    return counts | {
        kind: _with_intervals(summarize_scores(one), percentile_intervals(resampled[kind]))
        for kind, one in scores.items()
    }


def _resample_kinds(
    scores: ScoresByKind, codes: NDArray[Any], seed: int | Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """Return, for each kind, the means (R, 6) over the queries of R resamples of buildings, the same for all kinds."""
    values = np.concatenate([one.values() for one in scores.values()], axis=1)
    means = resample_means(values, codes[next(iter(scores.values())).query], seed)
    return dict(zip(scores, np.split(means, len(scores), axis=1), strict=True))


def _with_intervals(means: Mapping[str, float], intervals: Mapping[str, list[float]]) -> Scores:
    return {name: value for key in SCORE_KEYS for name, value in ((key, means[key]), (f"{key}_ci95", intervals[key]))}


def summarize_datasets(
    scores: ScoresByKind, codes: NDArray[Any], dataset_ids: NDArray[np.int64], seed: int
) -> dict[str, Any]:
    """Return, for each dataset, the scores of its queries among the whole gallery, and under `mean` their mean.

    The mean counts each dataset alike, whatever its size; its interval draws the buildings within each dataset.
    """
    first = next(iter(scores.values()))
    found: dict[str, Any] = {}
    resampled = []
    for dataset_id in np.unique(dataset_ids[first.query]).tolist():
        chosen = dataset_ids[first.query] == dataset_id
        own = {kind: one.take(chosen) for kind, one in scores.items()}
        found[str(dataset_id)] = summarize_kinds(own, codes, seed)
        resampled.append(_resample_kinds(own, codes, [seed, dataset_id]))
    mean: dict[str, Any] = {}
    for kind in scores:
        means = {key: float(np.mean([dataset[kind][key] for dataset in found.values()])) for key in SCORE_KEYS}
        mean[kind] = _with_intervals(means, percentile_intervals(np.mean([one[kind] for one in resampled], axis=0)))
    return found | {"mean": mean}


def summarize_galleries(evaluation: Evaluation, seed: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """Return the scores within galleries of GALLERY_SIZES, as far as the split is large enough."""
    found = {}
    for size in [one for one in GALLERY_SIZES if one <= len(evaluation.codes)]:
        rows = sample_gallery(evaluation.codes, size, seed)
        codes = evaluation.codes[rows]
        scores = {
            kind: score_queries(
                matrix[rows], codes, ignored=evaluation.ignored, device=evaluation.device, progress=progress
            )
            for kind, matrix in evaluation.embeddings.items()
        }
        found[str(size)] = summarize_kinds(scores, codes, seed)
    return found


def compare_kinds(scores: ScoresByKind, codes: NDArray[Any], seed: int) -> dict[str, Scores]:
    """Return the gain of the last kind over each other one, with intervals.

    Paired: each resample of buildings is scored for both, and the differences give the interval.
    """
    gains, resampled = {}, _resample_kinds(scores, codes, seed)
    *baselines, own = scores
    for baseline in baselines:
        differences = scores[own].values() - scores[baseline].values()
        means = dict(zip(SCORE_KEYS, differences.mean(axis=0).tolist(), strict=True))
        intervals = percentile_intervals(resampled[own] - resampled[baseline])
        gains[f"over_{baseline}"] = _with_intervals(means, intervals)
    return gains


def build_metrics(evaluation: Evaluation, seed: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """Return metrics.json without its provenance."""
    features, codes = evaluation.features, evaluation.codes
    whole = summarize_kinds(evaluation.scores, codes, seed)
    gains = compare_kinds(evaluation.scores, codes, seed)
    return {
        "split": "test",
        "queries": whole["queries"],
        "gallery": len(features),
        "buildings": len(features.building_ids),
        "ignored_pairs": len(evaluation.ignored),
        **{kind: whole[kind] for kind in KINDS},
        "projector_gain": gains,
        "headline": describe_headline(gains),
        "by_dataset": summarize_datasets(evaluation.scores, codes, features.dataset_ids, seed),
        "without_same_panorama": evaluation.apart and summarize_kinds(evaluation.apart, codes, seed),
        "by_gallery_size": summarize_galleries(evaluation, seed, progress),
    }


def judge(interval: Sequence[float]) -> str:
    """Return the verdict on one model beside another, by the 95% interval of the paired difference."""
    low, high = interval
    return "beats" if low > 0 else "is worse than" if high < 0 else "cannot be told from"


def describe_headline(gains: Mapping[str, Scores]) -> str:
    """Compare the projector's mAP with every baseline in one line; "beats" only if it beats them all."""
    groups: dict[str, list[str]] = {"is worse than": [], "cannot be told from": [], "beats": []}
    for baseline in BASELINES:
        groups[judge(gains[f"over_{baseline}"]["map_ci95"])].append(KIND_LABELS[baseline])
    beaten = groups.pop("beats")
    rest = " and ".join(f"{verb} {_enumerate(names)}" for verb, names in groups.items() if names)
    if not rest:
        return f"The projector beats {_enumerate(beaten)}"
    return f"The projector {rest}" + (f", though it is better than {_enumerate(beaten)}" if beaten else "")


def _enumerate(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
