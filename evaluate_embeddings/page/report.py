"""Write stage 9's page: what came out, how sure that is, and pictures of where the embeddings fail and succeed."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from evaluate_embeddings.page.embedding_map import build_map
from evaluate_embeddings.page.figure_sections import build_recall, build_training, build_verification
from evaluate_embeddings.page.gallery_page import build_galleries, choose_gallery
from evaluate_embeddings.page.layout import (
    build_contents,
    build_key_table,
    build_page,
    build_section,
    build_table,
)
from evaluate_embeddings.page.ledger import find_path, read_ledger
from evaluate_embeddings.page.page_script import SCRIPT
from evaluate_embeddings.page.photos import PhotoSource
from evaluate_embeddings.page.score_sections import (
    build_breakdowns,
    build_conditions,
    build_datasets,
    build_head,
    build_scores,
)
from evaluate_embeddings.scores.metrics import Evaluation
from pipeline.cli import StageResult
from pipeline.config import Config
from pipeline.files.writing import writing_to
from pipeline.log import logger

ATTRIBUTION = (
    "If these pictures come from Google Street View: imagery © Google; "
    "do not publish this page without checking the terms."
)
# The page has to pass through mail: under 15 MB in all. A data URI has a character for each byte of the page.
MAX_GALLERY_CHARACTERS, MAX_MAP_CHARACTERS = 7_500_000, 4_500_000


def write_report(
    path: Path,
    evaluation: Evaluation,
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    config: Config,
    *,
    images: bool = True,
) -> None:
    """Write the page in one piece; what cannot be shown (pictures, training curve) is left out and said so.

    `training` is what the checkpoint says of its metrics; without `images` the page has no photograph.
    """
    seed = config.global_.seed
    photos = PhotoSource(config.path("merged_dir") / "test.parquet", find_path(config, "raw_dir"), wanted=images)
    gallery = choose_gallery(evaluation, find_path(config, "difficulty_metadata_path"), seed)
    numbers = [
        build_scores(metrics),
        build_recall(evaluation, metrics),
        build_verification(evaluation, metrics),
        build_breakdowns(metrics),
        build_conditions(metrics),
        build_datasets(metrics),
        build_training(training, config),
    ]
    pictures = [*build_galleries(gallery, photos, MAX_GALLERY_CHARACTERS)]
    pictures.insert(0, build_map(evaluation, photos, MAX_MAP_CHARACTERS, seed))
    origin = [build_ledger(read_ledger(config), metrics), build_provenance(metrics)]
    page = build_page(
        "Building retrieval report",
        [
            build_head(metrics),
            build_contents(numbers + pictures + origin),
            *numbers,
            build_filter(evaluation),
            *pictures,
            *origin,
            f'<footer class="soft">{escape(ATTRIBUTION)}</footer>',
        ],
        SCRIPT,
    )
    with writing_to(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    logger.info("%s: %.1f MB", path.name, path.stat().st_size / 1e6)


def build_filter(evaluation: Evaluation) -> str:
    """Return the controls that choose among marks and examples; the page's script shows them."""
    datasets = sorted({f"{dataset_id:04d}" for dataset_id in np.unique(evaluation.features.dataset_ids).tolist()})
    options = "".join(f"<option>{name}</option>" for name in datasets)
    return (
        '<div id="filter" role="search" hidden>'
        '<input id="filter-words" type="search" placeholder="image or building id" aria-label="image or building id">'
        f'<select id="filter-dataset" aria-label="dataset"><option value="">all datasets</option>{options}</select>'
        '<select id="filter-answer" aria-label="answer"><option value="">right and wrong</option>'
        '<option value="1">found at first try</option><option value="0">not found at first try</option></select>'
        '<span id="filter-count" class="soft" role="status"></span></div>'
    )


def build_ledger(results: list[StageResult], metrics: Mapping[str, Any]) -> str:
    """Return what became of every row, stage by stage."""
    own = StageResult("evaluate", metrics["gallery"], metrics["gallery"])
    rows = [
        ("", [
            result.stage, f"{len(result.kept):,}" if result.kept else "",
            *(f"{count:,}" for count in (result.rows_in, result.rows_out, result.rejected, result.dropped)),
            escape(", ".join(f"{reason} {count:,}" for reason, count in sorted(result.reasons.items()))),
        ])
        for result in (*results, own)
    ]  # fmt: skip
    lead = (
        "No row vanishes: in = out + rejected + dropped, as the files of each stage say of their own making. "
        "Stages whose files are not here are left out."
    )
    return build_section(
        "Ledger", lead, build_table(["stage", "files", "in", "out", "rejected", "dropped", "why"], rows)
    )


def build_provenance(metrics: Mapping[str, Any]) -> str:
    """Return what the numbers were made from."""
    provenance = metrics["provenance"]
    values: dict[str, object] = {
        key.replace("_", " "): value if value is not None else "unknown"
        for key, value in provenance.items()
        if key not in ("inputs", "settings", "training_settings")
    }
    for item in provenance["inputs"]:
        content = item.get("footer") or item.get("hash") or "-"
        values[f"input {item['name']}"] = f"{item['size']:,} bytes, content {content}"
    for section, settings in provenance["training_settings"].items():
        values[f"training: {section}"] = json.dumps(settings, sort_keys=True, default=str)
    return build_section("Provenance and settings", "What these numbers were made from.", build_key_table(values))
