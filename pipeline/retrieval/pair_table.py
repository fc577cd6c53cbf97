"""Find the cosine at which to group images without labels, by pairs of validation images.

A table says how many pairs reach a cosine, of two buildings and of one, and how good the groups are that average
linkage makes there. For other images precision follows the number of wrong partners that an image has by chance (a rate
a pair, times the number of images), recall the cosine. All cosines are those of centred embeddings: the images of a
place share a direction that tells no building from another.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.geography import earth_centred_m
from pipeline.retrieval.group_scores import measure_groups

# Wrong partners that an image has by chance: the rows of the table. Beyond them so many rows up to a cosine of 1 follow
# the line through the last decade of rates; a decade takes at least this cosine.
PARTNERS, NUM_BEYOND, LEAST_DECADE = 2.0 ** np.arange(9, -10.5, -0.5), 10, 0.02
# Pairs that stand nearer than this are counted by themselves: they are the candidates where positions are known.
NEAR_M = 150.0
# So many images stand for all; those whose cosine reaches COPIES count once. A building has about four.
SAMPLE_IMAGES, COPIES, BUILDING_IMAGES = 2_000, 0.8, 4.0
# The cosines of two datasets are compared where an image has so many wrong partners: right ones hardly count there.
COMPARED_PARTNERS, MAX_SHIFT = 12, 0.2
# A threshold is the middle of those whose B-cubed F1 is this near the best.
PLATEAU = 0.01
Embeddings = NDArray[np.float32]


def centre(embeddings: Embeddings) -> Embeddings:
    """Subtract the rows' mean (N, D), or the part of it that is not by chance, and L2-normalise them again."""
    sample, _ = _sample(embeddings)
    weights = 1 / np.maximum(1, (sample @ sample.T >= COPIES).sum(axis=1))
    mean = (weights @ sample / weights.sum()).astype(np.float32)
    by_chance = BUILDING_IMAGES / weights.sum()  # the squared length of the mean of independent unit vectors
    mean *= 1 - by_chance / max(float(mean @ mean), by_chance)
    centred: Embeddings = embeddings - mean
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    return centred


def describe_pairs(
    embeddings: Embeddings, buildings: NDArray[Any], positions: NDArray[np.float64] | None = None
) -> dict[str, list[dict[str, float]]]:
    """Return a table of all pairs of images (N,) and, with positions (N, 2) in degrees, one of those that stand near.

    Each row has a cosine, the share of the pairs of two buildings that reach it (`false_rate`), an image's wrong and
    right ones (`partners`, `right_partners`), and the scores of average linkage that is cut there. Ascending by cosine;
    empty without pairs of both kinds.
    """
    from scipy.spatial.distance import pdist

    embeddings = centre(embeddings)
    rows, columns = np.triu_indices(len(embeddings), 1)
    cosines = (embeddings @ embeddings.T)[rows, columns]  # (P,)
    is_same = buildings[rows] == buildings[columns]
    tables = {"all": _tabulate(cosines, is_same, buildings)}
    if positions is not None:
        is_near = pdist(earth_centred_m(*positions.T)) <= NEAR_M
        # A pair that is no candidate parts its groups.
        tables["near"] = _tabulate(np.where(is_near, cosines, -1), is_same, buildings, is_near)
    return tables


def _tabulate(
    cosines: NDArray[np.float32], is_same: NDArray[np.bool_], buildings: NDArray[Any],
    is_candidate: NDArray[np.bool_] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Return one of the tables of `describe_pairs`, of the candidates among the pairs (P,)."""
    from scipy.cluster.hierarchy import fcluster, linkage

    chosen = np.ones_like(is_same) if is_candidate is None else is_candidate
    different, same = (np.sort(cosines[chosen & kind]).astype(np.float64) for kind in (~is_same, is_same))
    counts = np.unique(np.rint(PARTNERS * len(buildings) / 2).astype(int))[::-1]
    counts = counts[(counts > 0) & (counts < len(different))]
    if not len(counts) or not len(same):
        return []
    cuts, firsts = np.unique(different[-counts], return_index=True)
    rates = counts[firsts] / len(different)
    (start, *_, end), (high, *_, low) = (values[rates <= 10 * rates[-1]][[0, -1]] for values in (cuts, rates))
    decade = max(LEAST_DECADE, (end - start) / np.log10(high / low)) if high > low else LEAST_DECADE
    beyond = np.linspace(end, max(1, end), NUM_BEYOND + 1)[1:]
    cuts, rates = np.append(cuts, beyond), np.append(rates, low * 10 ** ((end - beyond) / decade))
    tree = linkage(np.clip(1 - cosines.astype(np.float64), 0, 2), "average")
    return [
        {
            "cosine": float(cosine), "false_rate": float(rate),
            "partners": float(2 * rate * len(different) / len(buildings)),
            "right_partners": float(2 * (same >= cosine).sum() / len(buildings)),
        } | measure_groups(fcluster(tree, max(0, 1 - cosine), "distance"), buildings)
        for cosine, rate in zip(cuts, rates, strict=True)
    ]  # fmt: skip


@dataclass(frozen=True)
class PairTable:
    """What validation says of pairs of images, by cosine; columns are (T,), and `cosine` ascends."""

    columns: dict[str, NDArray[np.float64]]

    @classmethod
    def of(cls, rows: list[dict[str, float]]) -> "PairTable":
        """Return the table of rows as `describe_pairs` makes them, at least one."""
        return cls({name: np.array([float(row[name]) for row in rows]) for name in rows[0]})

    def threshold_at(self, rate: float) -> float:
        """Return the cosine that a share of the pairs of two buildings reaches."""
        return float(np.interp(-np.log(rate), -np.log(self.columns["false_rate"]), self.columns["cosine"]))

    def measure_shift(self, embeddings: Embeddings) -> float:
        """Return how much higher than in validation the cosines of pairs of two buildings are among centred rows."""
        sample, step = _sample(embeddings)
        others = step * len(sample) - 1  # without copies
        if len(sample) < 2 * COMPARED_PARTNERS:
            return 0.0
        cosines = np.sort((sample @ sample.T)[np.triu_indices(len(sample), 1)])[::-1]
        right = np.interp(cosines, self.columns["cosine"], self.columns["right_partners"]) / others
        rate = min(COMPARED_PARTNERS / others, 0.1)
        reached = np.arange(1, len(cosines) + 1) / len(cosines) - right >= rate
        shift = float(cosines[np.argmax(reached)]) - self.threshold_at(rate)
        return min(MAX_SHIFT, max(-MAX_SHIFT, shift))

    def choose_threshold(self, candidates: float, shift: float) -> float:
        """Return the cosine where B-cubed F1 is expected to be best, for images with so many candidates each."""
        cosines = np.linspace(self.columns["cosine"][0], self.columns["cosine"][-1], 500)
        precision = self._at_partners("bcubed_precision", self.partners_at(cosines, candidates, shift))
        recall = np.interp(cosines, self.columns["cosine"], self.columns["bcubed_recall"])
        scores = 2 * precision * recall / (precision + recall)
        return float(np.median(cosines[scores >= scores.max() - PLATEAU]))

    def partners_at(self, cosines: Any, candidates: float, shift: float) -> NDArray[np.float64]:
        """Return how many wrong partners by chance reach cosines, of an image with so many candidates."""
        rates = np.interp(cosines - shift, self.columns["cosine"], np.log(self.columns["false_rate"]))
        return np.asarray(candidates * np.exp(rates))

    def expect_wrong_share(self, threshold: float, candidates: float, shift: float) -> float:
        """Return the share of wrong pairs to expect in groups; right ones follow the cosine alone."""
        partners = self.partners_at(threshold, candidates, shift)
        share, seen = (float(self._at_partners(name, partners)) for name in ("wrong_pair_share", "pairwise_recall"))
        right = np.interp(threshold, self.columns["cosine"], self.columns["pairwise_recall"])
        return share * seen / max(share * seen + (1 - share) * right, 1e-12)

    def _at_partners(self, name: str, partners: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.interp(-np.log(partners), -np.log(self.columns["partners"]), self.columns[name])


def _sample(embeddings: Embeddings) -> tuple[Embeddings, int]:
    """Return every n-th row, without copies, and n."""
    step = -(-len(embeddings) // SAMPLE_IMAGES)
    return np.unique(embeddings[::step], axis=0), step
