"""Choose the queries that are worth looking at, look up their answers, and fetch the pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluate_embeddings.page.photos import read_thumbnails
from evaluate_embeddings.scores.metrics import Evaluation
from pipeline.retrieval.device_scores import TIE_TOLERANCE
from pipeline.retrieval.geography import distances_m

NUM_NEIGHBORS = 5
NUM_EXAMPLES = 12


@dataclass(frozen=True)
class Answer:
    row: int
    rank: int
    similarity: float  # cosine
    is_right: bool
    distance_m: float  # between the two targets


@dataclass(frozen=True)
class Example:
    """A query with its nearest neighbours; `match` is its nearest positive, which may lie further down the list."""

    query: int
    neighbors: tuple[Answer, ...]
    match: Answer
    raw_rank: int  # of the nearest positive by the raw embeddings


def make_gallery(evaluation: Evaluation, split_path: Path, raw_dir: Path | None) -> dict[str, Any]:
    """Choose the worst failures and fetch their pictures, data URIs by row, from the tars; note what is missing."""
    own = evaluation.scores["projector"]
    places = pick_failures(own.first_rank, evaluation.codes[own.query], NUM_EXAMPLES)
    failures = [describe_example(evaluation, place) for place in places]
    answers = [answer for one in failures for answer in (*one.neighbors, one.match)]
    rows = [*(one.query for one in failures), *(answer.row for answer in answers)]
    thumbnails, note = read_thumbnails(split_path, raw_dir, rows)
    return {"evaluation": evaluation, "failures": failures, "thumbnails": thumbnails, "note": note}


def pick_failures(ranks: NDArray[np.int64], buildings: NDArray[np.int32], limit: int) -> list[int]:
    """Return the positions (in `ranks`) of the queries of the highest ranks above 1, one a building, worst first."""
    order = np.argsort(-ranks, kind="stable")
    order = order[ranks[order] > 1]
    first = np.unique(buildings[order], return_index=True)[1]
    return [int(place) for place in order[np.sort(first)][:limit]]


def describe_example(evaluation: Evaluation, place: int) -> Example:
    scores, embeddings, codes = evaluation.scores["projector"], evaluation.embeddings["projector"], evaluation.codes
    query = int(scores.query[place])
    lat, lon = evaluation.features.target_lat, evaluation.features.target_lon
    similarities = embeddings @ embeddings[query]  # (N,)
    is_right = codes == codes[query]
    ordering = np.where(is_right, similarities - np.float32(TIE_TOLERANCE), similarities)  # as in the scores
    pairs = evaluation.ignored
    ordering[np.isin(codes, pairs[(pairs == codes[query]).any(axis=1)]) & ~is_right] = -np.inf
    ordering[query] = -np.inf
    match = int(np.argmax(np.where(is_right, ordering, -np.inf)))
    nearest = np.argsort(-ordering, kind="stable")[:NUM_NEIGHBORS]

    def answer(row: int, rank: int) -> Answer:
        metres = float(distances_m(lat[query], lon[query], lat[row], lon[row]))
        return Answer(row, rank, float(similarities[row]), bool(is_right[row]), metres)

    neighbors = [answer(row, rank) for rank, row in enumerate(nearest.tolist(), 1) if np.isfinite(ordering[row])]
    raw_rank = int(evaluation.scores["raw"].first_rank[place])
    return Example(query, tuple(neighbors), answer(match, int(scores.first_rank[place])), raw_rank)
