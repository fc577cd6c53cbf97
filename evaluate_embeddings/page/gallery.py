"""Choose the queries that are worth looking at, look up their answers, and fetch the pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluate_embeddings.page.photos import PhotoSource
from evaluate_embeddings.scores.metrics import Evaluation
from pipeline.retrieval.device_scores import TIE_TOLERANCE
from pipeline.retrieval.geography import distances_m

NUM_NEIGHBORS = 5
NUM_EXAMPLES = 12


@dataclass(frozen=True)
class Answer:
    """An image among the answers to a query."""

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

    @property
    def answers(self) -> list[Answer]:
        """The pictures to show: the nearest neighbours, and the match if it is not among them."""
        is_among = any(answer.row == self.match.row for answer in self.neighbors)
        return [*self.neighbors, *([] if is_among else [self.match])]


@dataclass
class Gallery:
    """The examples of the page."""

    evaluation: Evaluation
    failures: list[Example] = field(default_factory=list)
    thumbnails: Mapping[int, str] = field(default_factory=dict)
    note: str = ""

    def image(self, row: int) -> str:
        """Return an image's id."""
        return str(self.evaluation.features.image_ids[row].as_py())

    def building(self, row: int) -> str:
        """Return the id of an image's building."""
        return str(self.evaluation.features.building_ids[int(self.evaluation.codes[row])].as_py())

    def describe(self, *rows: int) -> str:
        """Name images and their buildings."""
        return ", ".join(f"{self.image(row)} of building {self.building(row)}" for row in rows)

    def take_pictures(self, photos: PhotoSource) -> None:
        """Fetch the pictures, and note what is missing."""
        rows = [row for one in self.failures for row in (one.query, *(a.row for a in one.answers))]
        self.thumbnails = photos.read_thumbnails(rows)
        if photos.problem:
            self.note = f"The pictures are left out: {photos.problem}."
        elif photos.num_missing:
            self.note = f"{photos.num_missing} pictures are left out: their tars are gone or have changed."


def choose_gallery(evaluation: Evaluation) -> Gallery:
    """Choose the worst failures."""
    own = evaluation.scores["projector"]
    failures = pick_failures(own.first_rank, evaluation.codes[own.query], NUM_EXAMPLES)
    return Gallery(evaluation, [describe_example(evaluation, place) for place in failures])


def pick_failures(ranks: NDArray[np.int64], buildings: NDArray[np.int32], limit: int) -> list[int]:
    """Return the positions (in `ranks`) of the queries of the highest ranks above 1, one a building, worst first."""
    order = np.argsort(-ranks, kind="stable")
    order = order[ranks[order] > 1]
    first = np.unique(buildings[order], return_index=True)[1]
    places: list[int] = order[np.sort(first)][:limit].tolist()
    return places


def describe_example(evaluation: Evaluation, place: int) -> Example:
    """Look up the projector's answers to the query at a position."""
    scores, embeddings, codes = evaluation.scores["projector"], evaluation.embeddings["projector"], evaluation.codes
    query = int(scores.query[place])
    similarities = embeddings @ embeddings[query]  # (N,)
    is_right = codes == codes[query]
    ordering = np.where(is_right, similarities - np.float32(TIE_TOLERANCE), similarities)  # as in the scores
    pairs = evaluation.ignored
    ordering[np.isin(codes, pairs[(pairs == codes[query]).any(axis=1)]) & ~is_right] = -np.inf
    ordering[query] = -np.inf
    match = int(np.argmax(np.where(is_right, ordering, -np.inf)))
    nearest = np.argsort(-ordering, kind="stable")[:NUM_NEIGHBORS]

    def answer(row: int, rank: int) -> Answer:
        return Answer(row, rank, float(similarities[row]), bool(is_right[row]), _metres(evaluation, query, row))

    neighbors = [answer(row, rank) for rank, row in enumerate(nearest.tolist(), 1) if np.isfinite(ordering[row])]
    raw_rank = int(evaluation.scores["raw"].first_rank[place])
    return Example(query, tuple(neighbors), answer(match, int(scores.first_rank[place])), raw_rank)


def _metres(evaluation: Evaluation, one: int, other: int) -> float:
    lat: NDArray[Any] = evaluation.features.target_lat
    lon: NDArray[Any] = evaluation.features.target_lon
    return float(distances_m(lat[one], lon[one], lat[other], lon[other]))
