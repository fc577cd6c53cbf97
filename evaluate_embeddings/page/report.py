"""Write stage 9's page: the scores with their intervals, and pictures of failures."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluate_embeddings.page.gallery import make_gallery
from evaluate_embeddings.scores.metrics import BASELINES, KIND_LABELS, SCORE_LABELS, Evaluation
from evaluate_embeddings.scores.tables import describe_gains
from pipeline.pages import load_templates
from pipeline.workspace import writing_to

TEMPLATES_DIR = Path(__file__).parent / "templates"


def format_distance(metres: float) -> str:
    return f"{metres:.0f} m" if metres < 1000 else f"{metres / 1000:,.1f} km"


FILTERS: dict[str, Callable[..., str]] = {
    "anchor": lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"),  # the id of the section of this title
    "as_json": lambda value: json.dumps(value, sort_keys=True, default=str),
    "decimal": "{:.3f}".format,
    "distance": format_distance,
    "percent": "{:.1%}".format,
    "signed": "{:+.3f}".format,
    "thousands": "{:,}".format,
}


def write_report(
    path: Path, evaluation: Evaluation, metrics: Mapping[str, Any], split_path: Path, raw_dir: Path | None
) -> None:
    gallery = make_gallery(evaluation, split_path, raw_dir)
    environment = load_templates(TEMPLATES_DIR)
    environment.filters |= FILTERS
    page = environment.get_template("report.html.j2").render(
        metrics=metrics, verdict=describe_gains(metrics), kinds=KIND_LABELS,
        baselines=BASELINES, score_labels=SCORE_LABELS, gallery=gallery,
    )  # fmt: skip
    with writing_to(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
