"""A map of the embeddings along their two leading principal components: a mark an image, photographs on hover."""

import json
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluate_embeddings.page.layout import build_section
from evaluate_embeddings.page.photos import PhotoSource
from evaluate_embeddings.scores.metrics import Evaluation
from pipeline.retrieval.whitening import collect_scatter, decompose

MAX_POINTS = 1_500
# The components are fitted on so many images at most.
MAX_FIT_ROWS = 50_000
THUMBNAIL_SIDE = 96
WIDTH, HEIGHT, MARGIN = 1000, 640, 14


@dataclass(frozen=True)
class MapPoints:
    """The images on the map."""

    row: NDArray[np.int64]  # (P,) ascending
    place: NDArray[np.float64]  # (P, 2) along the two components
    is_right: NDArray[np.bool_]  # (P,) the nearest image is of the same building
    variance: tuple[float, float]  # share that each component has of the whole


def place_points(evaluation: Evaluation, seed: int) -> MapPoints:
    """Project a random sample of the queries onto the two leading principal components of the projector's output."""
    generator = np.random.default_rng(seed)
    embeddings, scores = evaluation.embeddings["projector"], evaluation.scores["projector"]
    fitted = embeddings
    if len(embeddings) > MAX_FIT_ROWS:
        fitted = embeddings[np.sort(generator.choice(len(embeddings), MAX_FIT_ROWS, replace=False))]
    scatter = collect_scatter(fitted, np.zeros(len(fitted), np.int32))
    values, vectors = decompose(scatter.within)
    chosen = np.arange(len(scores.query))
    if len(chosen) > MAX_POINTS:
        chosen = np.sort(generator.choice(chosen, MAX_POINTS, replace=False))
    axes = np.zeros((len(values), 2))
    axes[:, : min(2, len(values))] = vectors[:, ::-1][:, :2]
    axes *= np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0) < 0, -1, 1)  # sign is free
    rows = scores.query[chosen]
    total = max(float(values.sum()), np.finfo(np.float64).tiny)
    shares = [float(value) / total for value in (*values[::-1][:2], 0.0)]
    place = (embeddings[rows] - scatter.mean) @ axes
    return MapPoints(rows, place, scores.first_rank[chosen] == 1, (shares[0], shares[1]))


def build_map(evaluation: Evaluation, photos: PhotoSource, max_characters: int, seed: int) -> str:
    """Return the section with the map; its photographs lie beside it as JSON, for the page's script."""
    points = place_points(evaluation, seed)
    rows = points.row.tolist()
    thumbnails = photos.read_thumbnails(rows, max_characters, THUMBNAIL_SIDE) if photos.problem is None else {}
    places = _to_pixels(points.place)
    marks = "\n".join(
        _draw_mark(evaluation, number, row, place, bool(points.is_right[number]))
        for number, (row, place) in enumerate(zip(rows, places, strict=True))
    )
    num_right = int(points.is_right.sum())
    text = (
        f"Map of {len(rows):,} images by the two leading principal components of the projector's embeddings: "
        f"{num_right:,} whose nearest image is of the same building, {len(rows) - num_right:,} whose is not."
    )
    drawing = (
        f'<svg id="map" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(text, quote=True)}">{marks}</svg>'
    )
    legend = (
        '<p class="legend"><span class="mark-right">●</span> nearest image is of the same building '
        '<span class="mark-wrong">▲</span> is of another one</p>'
    )
    sample = "" if len(rows) == len(evaluation.scores["projector"].query) else f"a random {len(rows):,} of "
    lead = (
        f"Where the projector puts {sample}the test images, seen along the two directions in which they differ most "
        f"({points.variance[0]:.0%} and {points.variance[1]:.0%} of the variance; what is near here may be far in the "
        "others). Point at a mark, or tap it."
    )
    return build_section("Map", lead, f'<div class="card map">{legend}{drawing}</div>', _embed(thumbnails, rows))


def _to_pixels(place: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Fit the places into the drawing, each axis by itself; equal ones lie in the middle."""
    low, span = place.min(axis=0), np.ptp(place, axis=0)
    unit = np.where(span > 0, (place - low) / np.where(span > 0, span, 1), 0.5)
    x, y = MARGIN + unit[:, 0] * (WIDTH - 2 * MARGIN), MARGIN + (1 - unit[:, 1]) * (HEIGHT - 2 * MARGIN)
    return list(zip(x.round(1).tolist(), y.round(1).tolist(), strict=True))


def _draw_mark(evaluation: Evaluation, number: int, row: int, place: tuple[float, float], is_right: bool) -> str:
    """Return a circle for a query that is answered right, a triangle for one that is not."""
    x, y = place
    attributes = describe_rows(evaluation, row) + f' data-mark="{number}" data-right="{int(is_right)}"'
    if is_right:
        return f'<circle class="mark-right" cx="{x}" cy="{y}" r="6" {attributes}/>'
    return f'<path class="mark-wrong" d="M{x} {y - 8:.1f}l7 13h-14z" {attributes}/>'


def name_row(evaluation: Evaluation, row: int) -> str:
    """Name an image and its building."""
    features = evaluation.features
    building = features.building_ids[int(features.building_codes[row])].as_py()
    return f"{features.image_ids[row].as_py()} of building {building}"


def describe_rows(evaluation: Evaluation, *rows: int) -> str:
    """Return the attributes by which the page's script filters and names what shows these images."""
    ids = escape(", ".join(name_row(evaluation, row) for row in rows), quote=True)
    datasets = sorted({f"{int(evaluation.features.dataset_ids[row]):04d}" for row in rows})
    return f'data-ids="{ids}" data-dataset="{" ".join(datasets)}"'


def _embed(thumbnails: dict[int, str], rows: list[int]) -> str:
    pictures: dict[str, Any] = {str(number): thumbnails[row] for number, row in enumerate(rows) if row in thumbnails}
    # A data URI holds nothing that could end the element.
    return f'<script type="application/json" id="map-pictures">{json.dumps(pictures)}</script>'
