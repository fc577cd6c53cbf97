"""Verify pairs of images by one threshold on the cosine: do both show the same building?

The equal-error rate is where as many pairs of two buildings pass as pairs of one building fail; the area under the
receiver operating characteristic is the chance that a pair of one building is more similar than a pair of two
(Fawcett, An introduction to ROC analysis, 2006).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.candidates import IgnoredPairs

NUM_SAME_PAIRS, NUM_DIFFERENT_PAIRS = 50_000, 200_000
# Above the threshold of the lowest rate lie 200 of the sampled pairs of two buildings.
FALSE_POSITIVE_RATES = (0.1, 0.01, 0.001)
# One in a thousand comparisons with other buildings passes the recommended threshold.
RECOMMENDED_RATE = 0.001
_BLOCK_PAIRS = 4096


@dataclass(frozen=True)
class PairSimilarities:
    """The cosines of sampled pairs of images, ascending."""

    same: NDArray[np.float32]  # (S,) of one building
    different: NDArray[np.float32]  # (T,) of two buildings

    def pass_rates(self, thresholds: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the shares of pairs of two buildings, and of one, that are at or above each threshold."""
        rates = [1 - np.searchsorted(values, thresholds) / len(values) for values in (self.different, self.same)]
        return rates[0], rates[1]

    def threshold_at(self, rate: float) -> float:
        """Return the lowest threshold that at most this share of the pairs of two buildings passes."""
        passing = int(rate * len(self.different))
        if passing >= len(self.different):
            return float(self.different[0])
        return float(np.nextafter(self.different[len(self.different) - 1 - passing], np.float32(np.inf)))

    def find_equal_error(self) -> tuple[float, float]:
        """Return the threshold where both error rates are equal, and that error rate."""
        thresholds = np.concatenate([self.same, self.different])
        thresholds.sort()
        false_positive, true_positive = self.pass_rates(thresholds)
        place = int(np.argmin(np.abs(false_positive - (1 - true_positive))))
        return float(thresholds[place]), float(false_positive[place] + 1 - true_positive[place]) / 2

    def area_under_curve(self) -> float:
        """Return the chance that a pair of one building is more similar than one of two, ties counting half."""
        below = np.searchsorted(self.different, self.same, "left") + np.searchsorted(self.different, self.same, "right")
        return float(below.mean()) / 2 / len(self.different)


def sample_similarities(
    embeddings: NDArray[np.float32], codes: NDArray[np.int32], ignored: IgnoredPairs, seed: int
) -> PairSimilarities:
    """Return the cosines of random pairs of images of one building, and of two buildings that are no ignored pair."""
    generator = np.random.default_rng(seed)
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    starts = np.cumsum(sizes) - sizes  # of each building in the order
    first = generator.choice(np.flatnonzero(sizes[codes] > 1), NUM_SAME_PAIRS)
    building = codes[first]
    place = np.empty(len(codes), np.int64)
    place[order] = np.arange(len(codes)) - starts[codes[order]]  # of each image in its building
    step = generator.integers(1, sizes[building])
    second = order[starts[building] + (place[first] + step) % sizes[building]]
    drawn = generator.integers(len(codes), size=(NUM_DIFFERENT_PAIRS, 2))
    a, b = codes[drawn].astype(np.int64).min(axis=1), codes[drawn].astype(np.int64).max(axis=1)
    known = ignored.building_a * len(sizes) + ignored.building_b  # smaller code first, as resolve_pairs has them
    drawn = drawn[(a != b) & ~np.isin(a * len(sizes) + b, known)]
    same, different = _cosines(embeddings, first, second), _cosines(embeddings, drawn[:, 0], drawn[:, 1])
    return PairSimilarities(np.sort(same), np.sort(different))


def _cosines(
    embeddings: NDArray[np.float32], first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.float32]:
    cosines = np.empty(len(first), np.float32)
    for start in range(0, len(first), _BLOCK_PAIRS):
        block = slice(start, start + _BLOCK_PAIRS)
        np.einsum("nd,nd->n", embeddings[first[block]], embeddings[second[block]], out=cosines[block])
    return cosines


def share_of_same_pairs(codes: NDArray[np.int32]) -> float:
    """Return the share of pairs that show one building, among all pairs of images."""
    sizes = np.bincount(codes).astype(np.float64)
    total = len(codes) * (len(codes) - 1)
    return float((sizes * (sizes - 1)).sum() / total)


def summarize_pairs(pairs: PairSimilarities, share_same: float) -> dict[str, Any] | None:
    """Return the equal-error point, the area, the recommended threshold and the scores at fixed false-positive rates.

    Precision is given twice: for equally many pairs of one building and of two, and for a share of `share_same`, as
    when everything is compared with everything. Return None if there are no two buildings.
    """
    if not len(pairs.different) or not len(pairs.same):
        return None
    threshold, rate = pairs.find_equal_error()
    rows = {}
    for wanted in FALSE_POSITIVE_RATES:
        cut = pairs.threshold_at(wanted)
        false_positive, recall = (float(value) for value in pairs.pass_rates(np.float32(cut)))
        rows[f"{wanted:g}"] = {
            "threshold": cut,
            "recall": recall,
            "precision_balanced": _precision(recall, false_positive, 0.5),
            "precision_in_split": _precision(recall, false_positive, share_same),
        }
    return {
        "area_under_curve": pairs.area_under_curve(),
        "equal_error_rate": rate,
        "equal_error_threshold": threshold,
        "recommended_threshold": rows[f"{RECOMMENDED_RATE:g}"]["threshold"],
        "at_false_positive_rate": rows,
    }


def _precision(recall: float, false_positive: float, share_same: float) -> float | None:
    right, wrong = recall * share_same, false_positive * (1 - share_same)
    return right / (right + wrong) if right + wrong else None
