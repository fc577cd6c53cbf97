"""Compare two models on the same images by a paired bootstrap."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.candidates import IgnoredPairs
from pipeline.retrieval.scores import SCORE_KEYS, Embeddings, QueryScores, percentile_intervals, resample_means

# The smallest p is then 0.0002.
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class LabelledModels:
    """One or two models and their embeddings of the same images, with the building of each image."""

    places: list[Path]  # where each model was read from
    embeddings: list[Embeddings]  # of each model (N, D), L2-normalised
    codes: NDArray[np.int32]  # (N,) of the building
    ignored: IgnoredPairs
    without_label: int = 0  # number of images left out
    notes: list[str] = field(default_factory=list)  # why the comparison may be unfair


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
