"""Choose the queries that are worth looking at, look up their answers, and fetch the pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluate_embeddings.page.photos import PhotoSource
from evaluate_embeddings.scores.metrics import Evaluation
from pipeline.retrieval.candidates import TIE_TOLERANCE
from pipeline.retrieval.geography import distances_m

NUM_NEIGHBORS = 5
NUM_EXAMPLES, NUM_SUSPECTS = 12, 24
# Suspects are looked for among so many images: each costs a product with the whole split.
MAX_SUSPECT_QUERIES = 20_000
# Similarities held at a time: 2^25 float32 are 128 MiB.
BLOCK_VALUES = 2**25


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


@dataclass(frozen=True)
class ImagePair:
    """Two images of different buildings."""

    rows: tuple[int, int]
    similarity: float  # cosine of the projector's embeddings
    raw_similarity: float
    distance_m: float  # between the two targets


@dataclass
class Gallery:
    """The examples of the page."""

    evaluation: Evaluation
    failures: list[Example] = field(default_factory=list)
    suspects: list[ImagePair] = field(default_factory=list)
    thumbnails: Mapping[int, str] = field(default_factory=dict)
    note: str = ""

    @property
    def suspects_sampled_from(self) -> int | None:
        """The size of the random sample in which suspects were looked for; None if that was the whole split."""
        return MAX_SUSPECT_QUERIES if len(self.evaluation.codes) > MAX_SUSPECT_QUERIES else None

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
        rows += [row for suspect in self.suspects for row in suspect.rows]
        self.thumbnails = photos.read_thumbnails(rows)
        if photos.problem:
            self.note = f"The pictures are left out: {photos.problem}."
        elif photos.num_missing:
            self.note = f"{photos.num_missing} pictures are left out: their tars are gone or have changed."


def choose_gallery(evaluation: Evaluation, threshold: float, seed: int) -> Gallery:
    """Choose the examples: the worst failures, and suspects."""
    own = evaluation.scores["projector"]
    failures = pick_failures(own.first_rank, evaluation.codes[own.query], NUM_EXAMPLES)
    suspects = find_suspects(evaluation, threshold, NUM_SUSPECTS, seed)
    return Gallery(evaluation, [describe_example(evaluation, place) for place in failures], suspects)


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
    ordering[np.isin(codes, evaluation.ignored.partners_of(codes[query]))] = -np.inf
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


def find_suspects(evaluation: Evaluation, threshold: float, limit: int, seed: int) -> list[ImagePair]:
    """Return the most similar pairs of images of two buildings, one for each pair of buildings that is not ignored.

    Only pairs that reach the threshold are suspect. If there are more than MAX_SUSPECT_QUERIES images, a random sample
    of them is compared with all the others.
    """
    raw, own, codes = evaluation.embeddings["raw"], evaluation.embeddings["projector"], evaluation.codes
    queries = np.random.default_rng(seed).permutation(len(codes))[:MAX_SUSPECT_QUERIES]
    found = []
    for block in np.array_split(queries, 1 + len(queries) * len(codes) // BLOCK_VALUES):
        for query, row in zip(block.tolist(), own[block] @ own.T, strict=True):
            row[np.isin(codes, [codes[query], *evaluation.ignored.partners_of(codes[query])])] = -np.inf
            found.append((float(row.max()), query, int(row.argmax())))
    chosen: dict[frozenset[int], ImagePair] = {}
    for similarity, one, other in sorted(found, reverse=True):
        if similarity < max(threshold, -1) or len(chosen) == limit:
            break
        pair = ImagePair((one, other), similarity, float(raw[one] @ raw[other]), _metres(evaluation, one, other))
        chosen.setdefault(frozenset((int(codes[one]), int(codes[other]))), pair)
    return list(chosen.values())
