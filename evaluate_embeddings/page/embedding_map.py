"""A map of the embeddings along their two leading principal components: a mark an image, photographs on hover."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluate_embeddings.page.photos import PhotoSource
from evaluate_embeddings.scores.metrics import Evaluation
from pipeline.retrieval.whitening import collect_scatters, decompose

MAX_POINTS = 1_500
# The principal components are fitted on a sample of this size.
MAX_FIT_ROWS = 50_000
THUMBNAIL_SIDE = 96
WIDTH, HEIGHT, MARGIN = 1000, 640, 14


def place_points(
    evaluation: Evaluation, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], tuple[float, float]]:
    """Project a random sample of the queries onto the two leading principal components of the projector's output.

    Returns their places (P,) among the queries, ascending, their coordinates (P, 2), and the share of the total
    variance along each component.
    """
    generator = np.random.default_rng(seed)
    embeddings, scores = evaluation.embeddings["projector"], evaluation.scores["projector"]
    fitted = embeddings
    if len(embeddings) > MAX_FIT_ROWS:
        fitted = embeddings[np.sort(generator.choice(len(embeddings), MAX_FIT_ROWS, replace=False))]
    scatter = collect_scatters(fitted, np.zeros(len(fitted), np.int32))[0]
    values, vectors = decompose(scatter.within)
    chosen = np.arange(len(scores.query))
    if len(chosen) > MAX_POINTS:
        chosen = np.sort(generator.choice(chosen, MAX_POINTS, replace=False))
    axes = np.zeros((len(values), 2))
    axes[:, : min(2, len(values))] = vectors[:, ::-1][:, :2]
    axes *= np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0) < 0, -1, 1)  # sign is free
    total = max(float(values.sum()), np.finfo(np.float64).tiny)
    shares = [float(value) / total for value in (*values[::-1][:2], 0.0)]
    return chosen, (embeddings[scores.query[chosen]] - scatter.mean) @ axes, (shares[0], shares[1])


@dataclass(frozen=True)
class Mark:
    """An image on the map, in pixels of the drawing."""

    row: int
    x: float
    y: float
    is_right: bool


@dataclass(frozen=True)
class Map:
    """The marks that the page draws, and their pictures by the mark's number, as text."""

    marks: list[Mark]
    is_sampled: bool
    variance: tuple[float, float]
    pictures: dict[str, str]
    width: int = WIDTH
    height: int = HEIGHT


def build_map(evaluation: Evaluation, photos: PhotoSource, max_characters: int, seed: int) -> Map:
    """Return the map with its photographs, small enough to fit the limit together."""
    chosen, coordinates, variance = place_points(evaluation, seed)
    scores = evaluation.scores["projector"]
    rows, is_right = scores.query[chosen].tolist(), (scores.first_rank[chosen] == 1).tolist()
    thumbnails = photos.read_thumbnails(rows, max_characters, THUMBNAIL_SIDE) if photos.problem is None else {}
    # Each axis is scaled by itself; an axis without spread lies in the middle.
    low, span = coordinates.min(axis=0), np.ptp(coordinates, axis=0)
    unit = np.where(span > 0, (coordinates - low) / np.where(span > 0, span, 1), 0.5)
    x, y = MARGIN + unit[:, 0] * (WIDTH - 2 * MARGIN), MARGIN + (1 - unit[:, 1]) * (HEIGHT - 2 * MARGIN)
    marks = zip(rows, x.round(1).tolist(), y.round(1).tolist(), is_right, strict=True)
    return Map(
        [Mark(*mark) for mark in marks],
        len(rows) < len(scores.query),
        variance,
        {str(number): thumbnails[row] for number, row in enumerate(rows) if row in thumbnails},
    )
