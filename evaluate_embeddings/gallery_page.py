"""The part of stage 9's page that shows pictures: queries with what they were answered with, right or wrong."""

from collections.abc import Mapping
from html import escape

from evaluate_embeddings.gallery import Answer, Example, describe_examples, pick_failures, pick_hard_successes
from evaluate_embeddings.metrics import Evaluation
from evaluate_embeddings.page import build_section
from evaluate_embeddings.photos import PhotoSource

NUM_EXAMPLES = 12


def build_galleries(evaluation: Evaluation, photos: PhotoSource) -> list[str]:
    """Return the sections of the worst failures and of the best hard successes."""
    scores, raw = evaluation.scores["projector"], evaluation.scores["raw"]
    failures = describe_examples(evaluation, pick_failures(scores, evaluation.codes, NUM_EXAMPLES))
    successes = describe_examples(evaluation, pick_hard_successes(scores, raw, evaluation.codes, NUM_EXAMPLES))
    shown = [
        answer_row
        for example in failures + successes
        for answer_row in (example.query, example.match.row, *(answer.row for answer in example.neighbors))
    ]
    thumbnails = photos.read_thumbnails(shown) if photos.problem is None else {}
    note = ""
    if photos.problem:
        note = f"The pictures are left out: {photos.problem}."
    elif photos.num_missing:
        note = f"{photos.num_missing} pictures are left out: their tars are gone or have changed."
    return [
        _build_gallery(
            "Worst failures",
            "Queries whose right answer the projector ranks lowest, one a building, with their five nearest "
            "neighbours and, below each, the distance between the targets and the building's id. Targets are points "
            "on facades: a wrong answer a few metres away may be the same wall.",
            failures, evaluation, thumbnails, note,
        ),
        _build_gallery(
            "Hard successes",
            "Queries that the projector answers right and on which the raw backbone does worst.",
            successes, evaluation, thumbnails, note,
        ),
    ]  # fmt: skip


def _build_gallery(
    title: str, lead: str, examples: list[Example], evaluation: Evaluation, thumbnails: Mapping[int, str], note: str
) -> str:
    notes = [f'<p class="soft">{escape(note)}</p>'] if note else []
    if not examples:
        notes.append('<p class="card">There are none.</p>')
    return build_section(
        title, lead, *notes, *(_build_example(example, evaluation, thumbnails) for example in examples)
    )


def _build_example(example: Example, evaluation: Evaluation, thumbnails: Mapping[int, str]) -> str:
    features = evaluation.features
    image_id = escape(features.image_ids[example.query].as_py())
    tiles = [_build_tile("query", "query", [], example.query, evaluation, thumbnails)]
    tiles += [
        _build_answer(answer, "✓ right" if answer.is_right else "✗ wrong", evaluation, thumbnails)
        for answer in example.neighbors
    ]
    if all(answer.row != example.match.row for answer in example.neighbors):
        tiles.append(_build_answer(example.match, f"✓ true match, rank {example.match.rank:,}", evaluation, thumbnails))
    return (
        f'<article class="example"><h3>Query <code>{image_id}</code>: first right answer at rank '
        f'{example.match.rank:,} <span class="soft">(raw backbone: {example.raw_rank:,})</span></h3>\n'
        f'<div class="answers">\n{"".join(tiles)}</div></article>'
    )


def _build_answer(answer: Answer, label: str, evaluation: Evaluation, thumbnails: Mapping[int, str]) -> str:
    details = [f"cosine {answer.similarity:.3f}"]
    if not answer.is_right:
        details.append(f"{format_distance(answer.distance_m)} away")
    css = "right" if answer.is_right else "wrong"
    return _build_tile(css, label, details, answer.row, evaluation, thumbnails)


def _build_tile(
    css: str, label: str, details: list[str], row: int, evaluation: Evaluation, thumbnails: Mapping[int, str]
) -> str:
    features = evaluation.features
    building = features.building_ids[int(features.building_codes[row])].as_py()
    picture = '<div class="nothing">no picture</div>'
    if row in thumbnails:
        text = escape(f"{label}: image {features.image_ids[row].as_py()} of building {building}", quote=True)
        picture = f'<img alt="{text}" src="{thumbnails[row]}">'
    lines = [f"<b>{escape(label)}</b>", *(escape(line) for line in details), f"<code>{escape(building)}</code>"]
    return f'<figure class="answer {css}">{picture}<figcaption>{"<br>".join(lines)}</figcaption></figure>\n'


def format_distance(metres: float) -> str:
    """Return a distance as people say it."""
    return f"{metres:.0f} m" if metres < 1000 else f"{metres / 1000:,.1f} km"
