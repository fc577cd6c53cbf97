"""Score embeddings by retrieval: each image queries all the others, the images of its building are the positives.

Recall@k is the share of queries with a positive among the k nearest candidates; average precision is the mean, over
a query's positives, of the precision at each one's rank, and mAP its mean over queries; MRR is the mean of
1 / rank of the nearest positive (Manning et al., Introduction to Information Retrieval, chapter 8).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

if TYPE_CHECKING:
    import torch

RECALL_RANKS = (1, 5, 10, 100)
SCORE_KEYS = (*(f"recall_at_{k}" for k in RECALL_RANKS), "map", "mrr")
# Resamples computed by one product, which reads the buildings' sums once and stays on one core.
RESAMPLES_AT_A_TIME = 16

Embeddings = NDArray[np.float32]
Codes = NDArray[np.int64]


@dataclass(frozen=True)
class QueryScores:
    """The result of each query that has a positive."""

    query: Codes  # (Q,) row indexes, ascending
    first_rank: Codes  # (Q,) rank of the nearest positive, 1 is the best
    average_precision: NDArray[np.float64]  # (Q,)

    def values(self) -> NDArray[np.float64]:
        """Return each query's share of the means, (Q, 6), in the order of SCORE_KEYS."""
        recalls = [self.first_rank <= k for k in RECALL_RANKS]
        return np.stack([*recalls, self.average_precision, 1.0 / self.first_rank], axis=1).astype(np.float64)

    def take(self, chosen: NDArray[Any]) -> "QueryScores":
        """Return the scores of some of the queries, by mask or position."""
        return QueryScores(self.query[chosen], self.first_rank[chosen], self.average_precision[chosen])


def normalise_rows(embeddings: NDArray[Any]) -> Embeddings:
    """Return rows of unit length, (N, D) float32.

    Raises InputError if a row is not finite or zero.
    """
    rows: Embeddings = np.asarray(embeddings, dtype=np.float32)
    return rows / _check_rows(rows)[:, None]


def _check_rows(rows: Embeddings) -> Embeddings:
    """Return the norms (N,); refuse NaN, which loses every comparison, and zero vectors, which tie with all."""
    norms: Embeddings = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(bad):
        raise InputError(
            f"embeddings: row {bad[0]} is not finite or all zero, and {len(bad) - 1} more of {len(rows)}: "
            "make the embeddings again, or train again if only the projector's are so"
        )
    return norms


def score_queries(embeddings: Embeddings, building_codes: NDArray[Any], **options: Any) -> QueryScores:
    """Score as `score_queries_twice` does, by one search among all candidates; the options are that function's."""
    return score_queries_twice(embeddings, building_codes, np.arange(len(building_codes)), **options)[0]


def score_queries_twice(
    embeddings: Embeddings,
    building_codes: NDArray[Any],
    panorama_ids: NDArray[Any],
    *,
    ignored: Codes | None = None,
    device: "torch.device | None" = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[QueryScores, QueryScores | None]:
    """Let each L2-normalised row (N, D) query all others by cosine, in float32, on the device (None: the CPU).

    The second result is without the candidates of the query's own panorama; None where no image has a positive of
    another one. Buildings that `ignored` (M, 2) pairs with the query's are no candidates; a row
    without a positive is no query. A negative that ties with a positive counts as nearer. `progress` hears how many
    queries were done since the last call. Raises InputError if a row is not finite or zero, or no row has a positive.
    """
    import torch  # which needs seconds to import

    from pipeline.retrieval.device_scores import rank_positives

    _check_rows(embeddings)
    pairs = np.empty((0, 2), np.int64) if ignored is None else np.concatenate([ignored, ignored[:, ::-1]])
    ranked = rank_positives(
        np.asarray(embeddings, np.float32), np.asarray(building_codes, np.int64), pairs, panorama_ids,
        device or torch.device("cpu"), progress,
    )  # fmt: skip
    whole, apart = (QueryScores(*one) for one in ranked)
    if not len(whole.query):
        raise InputError("no image has another image of its building to find: give more images or another split")
    return whole, apart if len(apart.query) else None


# ------------------------------------------------------------------------------------------------ means, intervals


def summarize_scores(scores: QueryScores, further_ranks: Iterable[int] = ()) -> dict[str, float]:
    """Return the mean over queries of each of SCORE_KEYS, and Recall@k at further k."""
    means = dict(zip(SCORE_KEYS, scores.values().mean(axis=0).tolist(), strict=True))
    return {f"recall_at_{k}": float((scores.first_rank <= k).mean()) for k in further_ranks} | means


def list_unreached(rows: Mapping[str, Mapping[str, float]], own: float, tolerance: float = 0.0) -> list[str]:
    """Return the rows of scores whose mAP a projector's `own` does not reach; NaN reaches none.

    Plain whitening may be ahead by its standard error (`map_error`), which validation buildings cannot resolve.
    """
    return [name for name, row in rows.items() if not own >= row["map"] - max(tolerance, row.get("map_error", 0.0))]


def resample_means(
    values: NDArray[np.float64], codes: NDArray[Any], seed: int | Sequence[int], num_resamples: int = 1000
) -> NDArray[np.float64]:
    """Return (R, K): the mean of `values` (Q, K) in each of R draws of all B buildings with replacement.

    The queries of one building are not independent, so buildings and not queries are drawn (the cluster bootstrap;
    Davison and Hinkley, Bootstrap Methods, section 3.8). Two sets of values of the same queries get the
    same draws from the same seed.
    """
    _, codes, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    num_buildings = len(sizes)
    columns = [np.bincount(codes, column, num_buildings) for column in values.T]
    sums = np.stack([sizes.astype(np.float64), *columns], axis=1)  # (B, 1 + K)
    generator = np.random.default_rng(seed)
    totals = np.empty((num_resamples, sums.shape[1]))
    times = np.empty((min(num_resamples, RESAMPLES_AT_A_TIME), num_buildings))
    for first in range(0, num_resamples, RESAMPLES_AT_A_TIME):
        block = totals[first : first + RESAMPLES_AT_A_TIME]
        for row in times[: len(block)]:
            row[:] = np.bincount(generator.integers(num_buildings, size=num_buildings), minlength=num_buildings)
        np.matmul(times[: len(block)], sums, out=block)
    return totals[:, 1:] / totals[:, :1]


def percentile_intervals(means: NDArray[np.float64]) -> dict[str, list[float]]:
    """Return the 95 % interval, from the 2.5th percentile, of each of SCORE_KEYS: the columns (R, 6) in that order."""
    return dict(zip(SCORE_KEYS, np.percentile(means, [2.5, 97.5], axis=0).T.tolist(), strict=True))
