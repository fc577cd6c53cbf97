"""Write stage 9's page: the scores with their intervals, and pictures of failures."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate_embeddings.page.gallery import make_gallery
from evaluate_embeddings.page.photos import PhotoSource
from evaluate_embeddings.scores.metrics import BASELINES, KIND_LABELS, SCORE_LABELS, Evaluation, judge
from evaluate_embeddings.scores.tables import describe_gains
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.files.workspace import writing_to
from pipeline.log import logger
from pipeline.pages import load_templates

TEMPLATES_DIR = Path(__file__).parent / "templates"


def format_distance(metres: float) -> str:
    """Return a distance in metres or kilometres."""
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


@dataclass(frozen=True)
class Curve:
    """A training run's validation mAP by epoch."""

    epochs: list[int]
    values: list[float]
    baselines: dict[str, float]  # the mAP of the other kinds on the same images
    published: tuple[int, float]  # the epoch, and the mAP of the interpolation between it and the start


def read_training_curve(training: Mapping[str, Any]) -> Curve | None:
    """Return the curve that the metrics of a checkpoint hold, None if they have none."""
    try:
        validated = [record for record in training["history"] if record["val"] is not None]
        epochs, values = [int(one["epoch"]) for one in validated], [float(one["val"]["map"]) for one in validated]
        baselines = {kind: float(training["val"][kind]["map"]) for kind in BASELINES}
        published = int(training["epoch"]), float(training["val"]["projector"]["map"])
    except (ValueError, KeyError, TypeError):  # not written by our stage 6
        return None
    return Curve(epochs, values, baselines, published) if values else None


def write_report(
    path: Path,
    evaluation: Evaluation,
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    config: Config,
) -> None:
    """Write the page in one piece; it names what it lacks (pictures, training curve).

    `training` holds the checkpoint's metrics.
    """
    photos = PhotoSource(config.path("merged_dir") / "test.parquet", _find_raw_dir(config))
    page = render(
        "report.html.j2", metrics=metrics, mood=choose_mood(metrics), verdict=describe_gains(metrics),
        kinds=KIND_LABELS, baselines=BASELINES, score_labels=SCORE_LABELS,
        curve=read_training_curve(training), gallery=make_gallery(evaluation, photos),
    )  # fmt: skip
    with writing_to(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    logger.info("%s: %.1f MB", path.name, path.stat().st_size / 1e6)


def _find_raw_dir(config: Config) -> Path | None:
    try:
        return config.path("raw_dir")
    except ConfigError:  # not set, or of an undefined variable: the page does without photographs
        return None


def render(name: str, **content: Any) -> str:
    """Return the HTML of a template of this page."""
    environment = load_templates(TEMPLATES_DIR)
    environment.filters |= FILTERS
    return environment.get_template(name).render(content)


def choose_mood(metrics: Mapping[str, Any]) -> str:
    """Return the verdict's class in the style sheet: good if all are beaten, bad if one is not or nobody can tell."""
    verdicts = {judge(metrics["projector_gain"][f"over_{baseline}"]["map_ci95"]) for baseline in BASELINES}
    if metrics["warning"] or "is worse than" in verdicts:
        return "bad"
    return "good" if verdicts == {"beats"} else ""
