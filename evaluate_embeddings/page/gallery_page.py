"""The part of stage 9's page that shows pictures: queries with what they were answered with, right or wrong."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from evaluate_embeddings.page.embedding_map import describe_rows, name_row
from evaluate_embeddings.page.gallery import (
    MAX_SUSPECT_QUERIES,
    Answer,
    Example,
    Suspect,
    describe_examples,
    find_suspects,
    pick_failures,
    pick_hard_successes,
)
from evaluate_embeddings.page.layout import build_section
from evaluate_embeddings.page.photos import PhotoSource
from evaluate_embeddings.scores.difficulty_bands import BandExample, find_band_examples
from evaluate_embeddings.scores.metrics import Evaluation
from pipeline.errors import InputError, one_line
from pipeline.retrieval.geography import distances_m

NUM_EXAMPLES = 12
NUM_SUSPECTS = 24
NUM_BAND_EXAMPLES = 4
BAND_WORDS = {0: "hardest", 6: "easiest"}


@dataclass
class Gallery:
    """What is shown, chosen before any picture is read, so that all pictures share one budget."""

    evaluation: Evaluation
    failures: list[Example]
    successes: list[Example]
    suspects: list[Suspect]
    bands: list[BandExample]
    bands_problem: str | None = None
    thumbnails: Mapping[int, str] = field(default_factory=dict)
    note: str = ""

    def shown_rows(self) -> list[int]:
        """Return the row of each picture, as often as it is shown."""
        rows = [
            row
            for example in self.failures + self.successes
            for row in (example.query, *(answer.row for answer in _answers(example)))
        ]
        rows += [row for suspect in self.suspects for row in suspect.rows]
        return rows + [row for band in self.bands for row in (band.anchor, *(row for _, row in band.negatives))]


def choose_gallery(evaluation: Evaluation, difficulty_path: Path | None, seed: int) -> Gallery:
    """Choose what is worth looking at."""
    scores, raw = evaluation.scores["projector"], evaluation.scores["raw"]
    failures = describe_examples(evaluation, pick_failures(scores, evaluation.codes, NUM_EXAMPLES))
    successes = describe_examples(evaluation, pick_hard_successes(scores, raw, evaluation.codes, NUM_EXAMPLES))
    gallery = Gallery(evaluation, failures, successes, find_suspects(evaluation, NUM_SUSPECTS, seed), [])
    if difficulty_path is None or not difficulty_path.is_file():
        gallery.bands_problem = "there is no difficulty metadata: [paths].difficulty_metadata_path names no file"
        return gallery
    try:
        gallery.bands = find_band_examples(difficulty_path, evaluation, NUM_BAND_EXAMPLES)
    except InputError as error:  # the page can do without
        gallery.bands_problem = one_line(error)
    return gallery


def build_galleries(gallery: Gallery, photos: PhotoSource, max_characters: int) -> list[str]:
    """Return the sections of failures, hard successes, suspected label errors and bands; all pictures fit the limit."""
    if photos.problem is None:
        gallery.thumbnails = photos.read_thumbnails(gallery.shown_rows(), max_characters)
    if photos.problem:
        gallery.note = f"The pictures are left out: {photos.problem}."
    elif photos.num_missing:
        gallery.note = f"{photos.num_missing} pictures are left out: their tars are gone or have changed."
    return [
        _build_section(
            gallery,
            "Worst failures",
            "Queries whose right answer the projector ranks lowest, one a building, with their five nearest "
            "neighbours and, below each, the distance between the targets and the building's id. Targets are points "
            "on facades: a wrong answer a few metres away may be the same wall.",
            (_build_example(example, gallery) for example in gallery.failures),
        ),
        _build_section(
            gallery,
            "Hard successes",
            "Queries that the projector answers right and on which the raw backbone does worst.",
            (_build_example(example, gallery) for example in gallery.successes),
        ),
        _build_section(
            gallery,
            "Suspected label errors",
            "Images of two ids that look almost equal to the projector (above the recommended threshold), the most "
            "similar first, one for each pair of buildings"
            + (f", out of a random {MAX_SUSPECT_QUERIES:,} images" if _is_sampled(gallery) else "")
            + ". A few metres apart they are probably one wall under two ids, which no embedding can tell apart; far "
            "apart they are alike, or wrongly placed. --ignore-pairs leaves such pairs out.",
            [f'<div class="pairs">{"".join(_build_suspect(suspect, gallery) for suspect in gallery.suspects)}</div>']
            if gallery.suspects
            else [],
        ),
        _build_section(
            gallery,
            "Difficulty bands",
            "An image with, of each band of its visual neighbours, a building of the test split: stage 5 finds them in "
            "thumbnails of a few pixels, band 0 the hardest to tell apart and 6 the easiest. Of the building the image "
            "is shown that the projector finds most similar.",
            (_build_bands(example, gallery) for example in gallery.bands),
            gallery.bands_problem,
        ),
    ]


def _is_sampled(gallery: Gallery) -> bool:
    return len(gallery.evaluation.codes) > MAX_SUSPECT_QUERIES


def _build_section(gallery: Gallery, title: str, lead: str, examples: Iterable[str], problem: str | None = None) -> str:
    notes = [f'<p class="soft">{escape(gallery.note)}</p>'] if gallery.note else []
    shown = list(examples)
    if not shown:
        nothing = f"Left out: {problem}." if problem else "There are none."
        notes.append(f'<p class="card">{escape(nothing)}</p>')
    return build_section(title, lead, *notes, *shown)


def _answers(example: Example) -> list[Answer]:
    """Return the answers that are shown: the nearest neighbours, and the true match where it is not among them."""
    extra = [] if any(answer.row == example.match.row for answer in example.neighbors) else [example.match]
    return [*example.neighbors, *extra]


def _build_example(example: Example, gallery: Gallery) -> str:
    tiles = [_build_tile("query", "query", [], example.query, gallery)]
    for place, answer in enumerate(_answers(example)):
        label = "✓ right" if answer.is_right else "✗ wrong"
        if place == len(example.neighbors):
            label = f"✓ true match, rank {answer.rank:,}"
        details = [f"cosine {answer.similarity:.3f}"]
        if not answer.is_right:
            details.append(f"{format_distance(answer.distance_m)} away")
        tiles.append(_build_tile("right" if answer.is_right else "wrong", label, details, answer.row, gallery))
    image_id = escape(gallery.evaluation.features.image_ids[example.query].as_py())
    heading = (
        f"Query <code>{image_id}</code>: first right answer at rank {example.match.rank:,} "
        f'<span class="soft">(raw backbone: {example.raw_rank:,})</span>'
    )
    right = f' data-right="{int(example.match.rank == 1)}"'
    return _build_article(gallery, (example.query,), heading, tiles, right)


def _build_suspect(suspect: Suspect, gallery: Gallery) -> str:
    heading = (
        f"{format_distance(suspect.distance_m)} apart "
        f'<span class="soft">cosine {suspect.similarity:.3f} (raw {suspect.raw_similarity:.3f})</span>'
    )
    tiles = [_build_tile("wrong", "", [], row, gallery) for row in suspect.rows]
    return _build_article(gallery, suspect.rows, heading, tiles)


def _build_bands(example: BandExample, gallery: Gallery) -> str:
    features, embeddings = gallery.evaluation.features, gallery.evaluation.embeddings["projector"]
    lat, lon = features.target_lat, features.target_lon
    tiles = [_build_tile("query", "anchor", [], example.anchor, gallery)]
    for band, row in example.negatives:
        label = f"band {band}" + (f", {BAND_WORDS[band]}" if band in BAND_WORDS else "")
        metres = float(distances_m(lat[example.anchor], lon[example.anchor], lat[row], lon[row]))
        cosine = float(embeddings[example.anchor] @ embeddings[row])
        details = [f"cosine {cosine:.3f}", f"{format_distance(metres)} away"]
        tiles.append(_build_tile("wrong", label, details, row, gallery))
    heading = f"Anchor <code>{escape(features.image_ids[example.anchor].as_py())}</code>"
    return _build_article(gallery, (example.anchor,), heading, tiles, css="example bands")


def _build_article(
    gallery: Gallery, rows: tuple[int, ...], heading: str, tiles: list[str], attributes: str = "", css: str = "example"
) -> str:
    return (
        f'<article class="{css}" {describe_rows(gallery.evaluation, *rows)}{attributes}><h3>{heading}</h3>\n'
        f'<div class="answers">\n{"".join(tiles)}</div></article>'
    )


def _build_tile(css: str, label: str, details: list[str], row: int, gallery: Gallery) -> str:
    features = gallery.evaluation.features
    building = features.building_ids[int(features.building_codes[row])].as_py()
    picture = '<div class="nothing">no picture</div>'
    if row in gallery.thumbnails:
        text = escape(f"{label or 'suspect'}: image {name_row(gallery.evaluation, row)}", quote=True)
        picture = f'<img alt="{text}" src="{gallery.thumbnails[row]}">'
    lines = [f"<b>{escape(label)}</b>"] if label else []
    lines += [*(escape(line) for line in details), f"<code>{escape(building)}</code>"]
    return f'<figure class="answer {css}">{picture}<figcaption>{"<br>".join(lines)}</figcaption></figure>\n'


def format_distance(metres: float) -> str:
    """Return a distance as people say it."""
    return f"{metres:.0f} m" if metres < 1000 else f"{metres / 1000:,.1f} km"
