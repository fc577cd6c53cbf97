"""Score a projector and its baselines by retrieval on the validation split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.log import logger
from pipeline.retrieval.features import Features, sample_buildings
from pipeline.retrieval.scores import Embeddings, QueryScores, list_unreached, score_queries, summarize_scores

CPU = torch.device("cpu")

Scores = dict[str, float]


@dataclass(frozen=True)
class ValidationSet:
    """The images that every epoch is scored on."""

    embeddings: Embeddings  # (N, D)
    building_codes: NDArray[np.int32]  # (N,)
    device: torch.device = CPU  # of the search
    recall_ranks: Sequence[int] = ()  # further k of Recall@k

    def summarize(self, scores: QueryScores) -> Scores:
        """Return recall_at_k, map and mrr: the means over queries."""
        return summarize_scores(scores, self.recall_ranks)

    def score_each(self, embeddings: Embeddings) -> QueryScores:
        """Return the score of each of these images that has a positive, by L2-normalised embeddings (N, k)."""
        return score_queries(embeddings, self.building_codes, device=self.device)

    def is_better(self, one: QueryScores, other: QueryScores) -> bool:
        """Tell whether the first mAP is higher by more than a standard error of the difference."""
        return bool((one.average_precision - other.average_precision).mean() > self.measure_error(one, other))

    def measure_error(self, one: QueryScores, other: QueryScores) -> float:
        """Return the standard error of the difference of two mAPs.

        It is over buildings, as a building's queries are not independent (linearised ratio estimator; Cochran,
        Sampling Techniques, section 9A.4).
        """
        gains = one.average_precision - other.average_precision
        around = np.bincount(self.building_codes[one.query], gains - gains.mean())
        return float(np.sqrt(np.square(around).sum()) / len(gains))


def choose_validation_set(
    features: Features, max_images: int, seed: int, device: torch.device = CPU, recall_ranks: Sequence[int] = ()
) -> ValidationSet:
    """Return the validation images, or whole buildings drawn from `seed` where there are more than `max_images`.

    At least two buildings are kept, or there would be nothing to mix up.
    """
    sizes = np.bincount(features.building_codes)
    drawn = np.random.default_rng(seed).permutation(len(sizes))  # as sample_buildings does
    count = int((np.cumsum(sizes[drawn]) <= max_images).sum())
    chosen = sample_buildings(features, max(2, count), seed)
    return ValidationSet(chosen.embeddings, chosen.building_codes, device, recall_ranks)


def measure_spread(embeddings: Embeddings) -> float:
    """Return 1 - |mean|^2 of unit vectors: their total variance, 1 where they fill the sphere, 0 where all coincide."""
    return float(1.0 - np.square(embeddings.astype(np.float64).mean(axis=0)).sum())


def log_verdict(rows: dict[str, Scores], best_epoch: int) -> None:
    """Log the scores, and whether the projector beats the baselines."""
    for name, row in rows.items():
        scores = (f"{key.replace('recall_at_', 'R@')} {row[key]:.4f}" for key in row if key != "map_error")
        logger.info("validation, %s: %s", name, ", ".join(scores))
    if ahead := list_unreached(rows, rows["projector"]["map"]):
        logger.warning(
            "the projector of epoch %d does NOT beat %s by validation mAP: do not publish it; more training images, "
            "a lower learning rate or init = whitening may help",
            best_epoch, " and ".join(ahead),
        )  # fmt: skip
