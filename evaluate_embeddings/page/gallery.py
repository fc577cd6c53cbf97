"""Choose the queries that are worth looking at, look up their answers, and fetch the pictures."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evaluate_embeddings.page.photos import PhotoSource
from evaluate_embeddings.scores.metrics import Evaluation
from evaluate_embeddings.scores.pair_similarity import RECOMMENDED_RATE
from pipeline.errors import InputError, one_line
from pipeline.files.tables import open_parquet, reading
from pipeline.ids import dataset_name
from pipeline.retrieval.candidates import TIE_TOLERANCE, Candidates, RowGroups
from pipeline.retrieval.features import Features
from pipeline.retrieval.geography import distances_m
from pipeline.retrieval.scores import QueryScores, similarity_rows

NUM_NEIGHBORS = 5
NUM_EXAMPLES, NUM_SUSPECTS, NUM_BAND_EXAMPLES = 12, 24, 4
# Suspects are looked for among so many images: each costs a product with the whole split.
MAX_SUSPECT_QUERIES = 20_000
# Band examples are looked for among so many images, so that a file of millions of lists is not read to its end.
NUM_BAND_CANDIDATES = 200
DIFFICULTY_COLUMNS = ["target_coord_hash", "neighbor_building_ids", "neighbor_bands"]
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class RowNames:
    """The names under which the page shows the rows of a split."""

    features: Features

    def image(self, row: int) -> str:
        """Return an image's id."""
        return str(self.features.image_ids[row].as_py())

    def building(self, row: int) -> str:
        """Return the id of an image's building."""
        return str(self.features.building_ids[int(self.features.building_codes[row])].as_py())

    def describe(self, *rows: int) -> str:
        """Name images and their buildings."""
        return ", ".join(f"{self.image(row)} of building {self.building(row)}" for row in rows)

    def list_datasets(self, *rows: int) -> str:
        """Return the datasets of images, each once."""
        return " ".join(sorted({dataset_name(int(self.features.dataset_ids[row])) for row in rows}))


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


@dataclass(frozen=True)
class BandExample:
    """An image and, for each band, a row of a building that is its neighbour in that band."""

    anchor: int
    negatives: tuple[tuple[int, int], ...]  # (band, row), the hardest band first


@dataclass
class Gallery:
    """The examples of the page, chosen before any picture is read, so that all pictures share one budget."""

    evaluation: Evaluation
    failures: list[Example]
    successes: list[Example]
    suspects: list[ImagePair]
    bands: list[BandExample]
    bands_problem: str | None = None
    thumbnails: Mapping[int, str] = field(default_factory=dict)
    note: str = ""

    @property
    def names(self) -> RowNames:
        """The names of the rows."""
        return RowNames(self.evaluation.features)

    @property
    def suspects_sampled_from(self) -> int | None:
        """The size of the random sample in which suspects were looked for; None if that was the whole split."""
        return MAX_SUSPECT_QUERIES if len(self.evaluation.codes) > MAX_SUSPECT_QUERIES else None

    def relate(self, one: int, other: int) -> ImagePair:
        """Return how similar two images are, and how far apart."""
        return relate(self.evaluation, one, other)

    def shown_rows(self) -> list[int]:
        """Return the row of each picture, as often as it is shown."""
        examples = self.failures + self.successes
        rows = [row for one in examples for row in (one.query, *(answer.row for answer in one.answers))]
        rows += [row for suspect in self.suspects for row in suspect.rows]
        return rows + [row for band in self.bands for row in (band.anchor, *(row for _, row in band.negatives))]

    def take_pictures(self, photos: PhotoSource, max_characters: int) -> None:
        """Fetch the pictures, small enough to fit the limit together, and note what is missing."""
        if photos.problem is None:
            self.thumbnails = photos.read_thumbnails(self.shown_rows(), max_characters)
        if photos.problem:
            self.note = f"The pictures are left out: {photos.problem}."
        elif photos.num_missing:
            self.note = f"{photos.num_missing} pictures are left out: their tars are gone or have changed."


def choose_gallery(evaluation: Evaluation, difficulty_path: Path | None, seed: int) -> Gallery:
    """Choose the examples; without usable difficulty metadata the page does without bands."""
    scores, raw = evaluation.scores["projector"], evaluation.scores["raw"]
    failures = describe_examples(evaluation, pick_failures(scores, evaluation.codes, NUM_EXAMPLES))
    successes = describe_examples(evaluation, pick_hard_successes(scores, raw, evaluation.codes, NUM_EXAMPLES))
    gallery = Gallery(evaluation, failures, successes, find_suspects(evaluation, NUM_SUSPECTS, seed), [])
    if difficulty_path is None or not difficulty_path.is_file():
        gallery.bands_problem = "there is no difficulty metadata: [paths].difficulty_metadata_path names no file"
        return gallery
    try:
        gallery.bands = find_band_examples(difficulty_path, evaluation, NUM_BAND_EXAMPLES)
    except InputError as error:
        gallery.bands_problem = one_line(error)
    return gallery


def find_suspects(evaluation: Evaluation, limit: int, seed: int) -> list[ImagePair]:
    """Return the most similar pairs of images of two buildings, one for each pair of buildings that is not ignored.

    Only pairs above the recommended threshold are suspect: 1 in 1,000 pairs of two buildings passes it. If there are
    more than MAX_SUSPECT_QUERIES images, a random sample of them is compared with all the others.
    """
    embeddings, codes = evaluation.embeddings["projector"], evaluation.codes
    pairs = evaluation.pairs["projector"]
    if not len(pairs.different):
        return []
    threshold = pairs.threshold_at(RECOMMENDED_RATE)
    candidates = Candidates(codes, evaluation.ignored)
    queries = np.arange(len(codes))
    if len(queries) > MAX_SUSPECT_QUERIES:
        queries = np.sort(np.random.default_rng(seed).choice(queries, MAX_SUSPECT_QUERIES, replace=False))
    nearest, similarity = np.empty(len(queries), np.int64), np.empty(len(queries), np.float32)
    for place, (query, row) in enumerate(similarity_rows(embeddings, queries)):
        row[candidates.left_out(query)] = -np.inf
        row[candidates.positives(query)] = -np.inf
        nearest[place] = np.argmax(row)
        similarity[place] = row[nearest[place]]
    chosen: dict[tuple[int, int], ImagePair] = {}
    for place in np.argsort(-similarity, kind="stable").tolist():
        one, other = int(queries[place]), int(nearest[place])
        pair = (min(int(codes[one]), int(codes[other])), max(int(codes[one]), int(codes[other])))
        if similarity[place] < threshold or len(chosen) == limit:
            break
        if pair not in chosen:
            chosen[pair] = relate(evaluation, one, other)
    return list(chosen.values())


def relate(evaluation: Evaluation, one: int, other: int) -> ImagePair:
    """Return how similar two images are, and how far apart."""
    lat, lon = evaluation.features.target_lat, evaluation.features.target_lon
    raw, own = evaluation.embeddings["raw"], evaluation.embeddings["projector"]
    metres = float(distances_m(lat[one], lon[one], lat[other], lon[other]))
    return ImagePair((one, other), float(own[one] @ own[other]), float(raw[one] @ raw[other]), metres)


def pick_failures(scores: QueryScores, codes: NDArray[np.int32], limit: int) -> list[int]:
    """Return the positions among the queries of the worst failures, one a building, the worst first."""
    return _pick_worst(scores.first_rank, scores.first_rank > 1, codes[scores.query], limit)


def pick_hard_successes(
    scores: QueryScores, raw_scores: QueryScores, codes: NDArray[np.int32], limit: int
) -> list[int]:
    """Return the positions among the queries of right answers, one a building, where the raw embeddings fail worst."""
    wanted = (scores.first_rank == 1) & (raw_scores.first_rank > 1)
    return _pick_worst(raw_scores.first_rank, wanted, codes[scores.query], limit)


def _pick_worst(
    ranks: NDArray[np.int64], wanted: NDArray[np.bool_], buildings: NDArray[np.int32], limit: int
) -> list[int]:
    order = np.argsort(-ranks, kind="stable")
    order = order[wanted[order]]
    first = np.unique(buildings[order], return_index=True)[1]
    places: list[int] = order[np.sort(first)][:limit].tolist()
    return places


def describe_examples(evaluation: Evaluation, places: list[int]) -> list[Example]:
    """Look up the projector's answers to the queries at these positions."""
    candidates = Candidates(evaluation.codes, evaluation.ignored)
    return [_describe_example(evaluation, candidates, place) for place in places]


def _describe_example(evaluation: Evaluation, candidates: Candidates, place: int) -> Example:
    lat, lon = evaluation.features.target_lat, evaluation.features.target_lon
    scores, embeddings = evaluation.scores["projector"], evaluation.embeddings["projector"]
    query = int(scores.query[place])
    similarities = embeddings @ embeddings[query]  # (N,)
    positives = candidates.positives(query)
    match = int(positives[np.argmax(similarities[positives])])
    ordering = similarities.copy()
    ordering[positives] -= np.float32(TIE_TOLERANCE)  # as the scores: in a tie the wrong answer comes first
    ordering[candidates.left_out(query)] = -np.inf
    nearest = np.argsort(-ordering, kind="stable")[:NUM_NEIGHBORS]

    def answer(row: int, rank: int) -> Answer:
        metres = float(distances_m(lat[query], lon[query], lat[row], lon[row]))
        return Answer(row, rank, float(similarities[row]), row in positives, metres)

    neighbors = [answer(row, rank) for rank, row in enumerate(nearest.tolist(), 1) if np.isfinite(ordering[row])]
    raw_rank = int(evaluation.scores["raw"].first_rank[place])
    return Example(query, tuple(neighbors), answer(match, int(scores.first_rank[place])), raw_rank)


def find_band_examples(path: Path, evaluation: Evaluation, limit: int) -> list[BandExample]:
    """Return up to `limit` images of different buildings, those with most bands first.

    Only buildings of the split are negatives here, since only their pictures can be found. The metadata name buildings,
    not images: the image that the projector finds most similar stands for its building.
    Raises InputError if the file is missing, damaged or lacks a column.
    """
    rows_of_images = {name: row for row, name in enumerate(evaluation.features.image_ids.to_pylist())}
    buildings = {name: code for code, name in enumerate(evaluation.features.building_ids.to_pylist())}
    groups, embeddings = RowGroups(evaluation.codes), evaluation.embeddings["projector"]
    found: dict[int, BandExample] = {}  # by the anchor's building
    for image_id, neighbor_ids, bands in _read_neighbors(path, evaluation.features.image_ids):
        anchor = rows_of_images[image_id]
        nearest: dict[int, int] = {}
        for building_id, band in zip(neighbor_ids, bands, strict=True):
            # A building has neighbours in several bands: each is shown once.
            if building_id in buildings and band not in nearest and buildings[building_id] not in nearest.values():
                nearest[band] = buildings[building_id]
        negatives = []
        for band, building in sorted(nearest.items()):
            rows = groups.rows_of(building)
            negatives.append((band, int(rows[np.argmax(embeddings[rows] @ embeddings[anchor])])))
        own = int(evaluation.codes[anchor])
        if len(negatives) > len(found[own].negatives if own in found else ()):
            found[own] = BandExample(anchor, tuple(negatives))
    return sorted(found.values(), key=lambda example: (-len(example.negatives), example.anchor))[:limit]


def _read_neighbors(path: Path, image_ids: pa.StringArray) -> Iterator[tuple[str, list[str], list[int]]]:
    """Yield id, neighbours and bands of the file's first NUM_BAND_CANDIDATES images of the split."""
    file = open_parquet(path)
    if not {*DIFFICULTY_COLUMNS} <= {*file.schema_arrow.names}:
        raise InputError(f"{path}: not difficulty metadata: make it with stage 5")
    left = NUM_BAND_CANDIDATES
    with reading(path):
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=DIFFICULTY_COLUMNS):
            chosen = batch.filter(pc.is_in(batch.column(0), value_set=image_ids)).slice(0, left)
            left -= chosen.num_rows
            yield from zip(*(column.to_pylist() for column in chosen.columns), strict=True)
            if left <= 0:
                return
