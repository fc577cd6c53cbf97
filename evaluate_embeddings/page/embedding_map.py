"""A map of the embeddings along their two leading principal components: a mark an image, photographs on hover."""

from dataclasses import dataclass
from typing import NamedTuple

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


class Mark(NamedTuple):
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
    variance: tuple[float, float]  # share of the total along each component
    pictures: dict[str, str]
    width: int = WIDTH
    height: int = HEIGHT


def project_to_plane(
    embeddings: NDArray[np.float32], rows: NDArray[np.int64], generator: np.random.Generator
) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Return rows' coordinates (P, 2) along the two leading principal components, and the share of variance of each."""
    fitted = embeddings
    if len(embeddings) > MAX_FIT_ROWS:
        fitted = embeddings[np.sort(generator.choice(len(embeddings), MAX_FIT_ROWS, replace=False))]
    scatter = collect_scatters(fitted, np.zeros(len(fitted), np.int32))[0]
    values, vectors = decompose(scatter.within)
    axes = np.zeros((len(values), 2))
    axes[:, : min(2, len(values))] = vectors[:, ::-1][:, :2]
    axes *= np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0) < 0, -1, 1)  # sign is free
    total = max(float(values.sum()), np.finfo(np.float64).tiny)
    shares = [float(value) / total for value in (*values[::-1][:2], 0.0)]
    return (embeddings[rows] - scatter.mean) @ axes, (shares[0], shares[1])


def build_map(evaluation: Evaluation, photos: PhotoSource, max_characters: int, seed: int) -> Map:
    """Return the map of a random sample of the queries, its photographs small enough to fit the limit together."""
    generator, scores = np.random.default_rng(seed), evaluation.scores["projector"]
    chosen = np.arange(len(scores.query))
    if len(chosen) > MAX_POINTS:
        chosen = np.sort(generator.choice(chosen, MAX_POINTS, replace=False))
    rows = scores.query[chosen]
    coordinates, variance = project_to_plane(evaluation.embeddings["projector"], rows, generator)
    thumbnails = photos.read_thumbnails(rows.tolist(), max_characters, THUMBNAIL_SIDE)
    # Each axis is scaled by itself; an axis without spread lies in the middle.
    low, span = coordinates.min(axis=0), np.ptp(coordinates, axis=0)
    unit = np.where(span > 0, (coordinates - low) / np.where(span > 0, span, 1), 0.5)
    x, y = MARGIN + unit[:, 0] * (WIDTH - 2 * MARGIN), MARGIN + (1 - unit[:, 1]) * (HEIGHT - 2 * MARGIN)
    columns = rows.tolist(), x.round(1).tolist(), y.round(1).tolist(), (scores.first_rank[chosen] == 1).tolist()
    pictures = {str(number): thumbnails[row] for number, row in enumerate(rows.tolist()) if row in thumbnails}
    return Map([Mark(*mark) for mark in zip(*columns, strict=True)], len(rows) < len(scores.query), variance, pictures)
