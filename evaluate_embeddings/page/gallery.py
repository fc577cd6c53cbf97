"""Choose the queries that are worth looking at, and find what they were answered with."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluate_embeddings.scores.metrics import Evaluation
from evaluate_embeddings.scores.pair_similarity import RECOMMENDED_RATE
from pipeline.retrieval.geography import distances_m
from pipeline.retrieval.scores import TIE_TOLERANCE, QueryScores, Search, similarity_rows

NUM_NEIGHBORS = 5
# Images whose nearest wrong answer is looked for: each costs a product with the whole split.
MAX_SUSPECT_QUERIES = 20_000


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


@dataclass(frozen=True)
class Suspect:
    """Two images of different ids that look almost equal to the projector."""

    rows: tuple[int, int]
    similarity: float  # cosine of the projector's embeddings
    raw_similarity: float
    distance_m: float  # between the two targets


def find_suspects(evaluation: Evaluation, limit: int, seed: int) -> list[Suspect]:
    """Return the most similar pairs of images of two buildings, one for each pair of buildings, ignored pairs left out.

    Only pairs that pass the recommended threshold, as 1 in 1,000 of two buildings do, are suspect. Of more than
    MAX_SUSPECT_QUERIES images a random sample is compared with all the others.
    """
    embeddings, codes = evaluation.embeddings["projector"], evaluation.codes
    pairs = evaluation.pairs["projector"]
    if not len(pairs.different):
        return []
    threshold = pairs.threshold_at(RECOMMENDED_RATE)
    search = Search(codes, evaluation.ignored)
    queries = np.arange(len(codes))
    if len(queries) > MAX_SUSPECT_QUERIES:
        queries = np.sort(np.random.default_rng(seed).choice(queries, MAX_SUSPECT_QUERIES, replace=False))
    nearest, similarity = np.empty(len(queries), np.int64), np.empty(len(queries), np.float32)
    for place, (query, row) in enumerate(similarity_rows(embeddings, queries)):
        row[search.left_out(query)] = -np.inf
        row[search.positives(query)] = -np.inf
        nearest[place] = np.argmax(row)
        similarity[place] = row[nearest[place]]
    chosen: dict[tuple[int, int], Suspect] = {}
    for place in np.argsort(-similarity, kind="stable").tolist():
        one, other = int(queries[place]), int(nearest[place])
        pair = (min(int(codes[one]), int(codes[other])), max(int(codes[one]), int(codes[other])))
        if similarity[place] < threshold or len(chosen) == limit:
            break
        if pair not in chosen:
            chosen[pair] = _describe_suspect(evaluation, one, other, float(similarity[place]))
    return list(chosen.values())


def _describe_suspect(evaluation: Evaluation, one: int, other: int, similarity: float) -> Suspect:
    lat, lon = evaluation.features.target_lat, evaluation.features.target_lon
    raw = evaluation.embeddings["raw"]
    metres = float(distances_m(lat[one], lon[one], lat[other], lon[other]))
    return Suspect((one, other), similarity, float(raw[one] @ raw[other]), metres)


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
