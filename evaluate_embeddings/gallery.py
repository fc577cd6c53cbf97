"""Choose the queries that are worth looking at, and find what they were answered with."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluate_embeddings.metrics import Evaluation
from pipeline.geography import distances_m
from pipeline.retrieval import TIE_TOLERANCE, QueryScores, Search

NUM_NEIGHBORS = 5


@dataclass(frozen=True)
class Answer:
    """One picture that a query was answered with."""

    row: int
    rank: int
    similarity: float  # cosine
    is_right: bool
    distance_m: float  # between the two targets


@dataclass(frozen=True)
class Example:
    """A query with its nearest neighbours; `match` is its nearest positive, also where that is not among them."""

    query: int
    neighbors: tuple[Answer, ...]
    match: Answer
    raw_rank: int  # of the nearest positive by the raw embeddings


def pick_failures(scores: QueryScores, codes: NDArray[np.int32], limit: int) -> list[int]:
    """Return the places, among the queries, of the worst failures, one a building, the worst first."""
    return _first_of_each_building(
        np.argsort(-scores.first_rank, kind="stable"), scores.first_rank > 1, scores, codes, limit
    )


def pick_hard_successes(
    scores: QueryScores, raw_scores: QueryScores, codes: NDArray[np.int32], limit: int
) -> list[int]:
    """Return the places, among the queries, of those answered right that the raw embeddings fail worst on."""
    wanted = (scores.first_rank == 1) & (raw_scores.first_rank > 1)
    return _first_of_each_building(np.argsort(-raw_scores.first_rank, kind="stable"), wanted, scores, codes, limit)


def _first_of_each_building(
    order: NDArray[np.int64], wanted: NDArray[np.bool_], scores: QueryScores, codes: NDArray[np.int32], limit: int
) -> list[int]:
    order = order[wanted[order]]
    first = np.unique(codes[scores.query[order]], return_index=True)[1]
    places: list[int] = order[np.sort(first)][:limit].tolist()
    return places


def describe_examples(evaluation: Evaluation, places: list[int]) -> list[Example]:
    """Look up the projector's answers to the queries at these places."""
    search = Search(evaluation.codes, evaluation.ignored)
    return [_describe_example(evaluation, search, place) for place in places]


def _describe_example(evaluation: Evaluation, search: Search, place: int) -> Example:
    lat, lon = evaluation.features.target_lat, evaluation.features.target_lon
    scores, embeddings = evaluation.scores["projector"], evaluation.embeddings["projector"]
    query = int(scores.query[place])
    similarities = embeddings @ embeddings[query]  # (N,)
    positives = search.positives(query)
    match = int(positives[np.argmax(similarities[positives])])
    ordering = similarities.copy()
    ordering[positives] -= np.float32(TIE_TOLERANCE)  # as the scores: in a tie the wrong answer comes first
    ordering[search.left_out(query)] = -np.inf
    nearest = np.argsort(-ordering, kind="stable")[:NUM_NEIGHBORS]

    def answer(row: int, rank: int) -> Answer:
        metres = float(distances_m(lat[query], lon[query], lat[row], lon[row]))
        return Answer(row, rank, float(similarities[row]), row in positives, metres)

    neighbors = [answer(row, rank) for rank, row in enumerate(nearest.tolist(), 1) if np.isfinite(ordering[row])]
    raw_rank = int(evaluation.scores["raw"].first_rank[place])
    return Example(query, tuple(neighbors), answer(match, int(scores.first_rank[place])), raw_rank)
