"""Write stage 9's page: what came out, how sure that is, and pictures of where the embeddings fail and succeed."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from evaluate_embeddings.gallery_page import build_galleries
from evaluate_embeddings.metrics import (
    BASELINES,
    KIND_LABELS,
    KINDS,
    SCORE_LABELS,
    Evaluation,
    describe_verdict,
)
from evaluate_embeddings.page import build_figure, build_key_table, build_page, build_section, build_table
from evaluate_embeddings.photos import PhotoSource
from evaluate_embeddings.plots import (
    Curve,
    plot_recall_curves,
    plot_similarities,
    plot_training,
    sample_similarities,
)
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.log import logger
from pipeline.tables import writing_to

ATTRIBUTION = (
    "If these pictures come from Google Street View: imagery © Google; "
    "do not publish this page without checking the terms."
)


def write_report(
    path: Path, evaluation: Evaluation, metrics: Mapping[str, Any], training: Mapping[str, Any], config: Config
) -> None:
    """Write the page in one piece; what cannot be shown (pictures, training curve) is left out and said so.

    `training` is what the checkpoint says of its metrics.
    """
    photos = PhotoSource(config.path("merged_dir") / "test.parquet", find_raw_dir(config))
    sections = [
        build_head(metrics),
        build_scores(metrics),
        build_figures(evaluation, training, config),
        build_conditions(metrics),
        build_datasets(metrics),
        *build_galleries(evaluation, photos),
        build_provenance(metrics),
        f'<footer class="soft">{escape(ATTRIBUTION)}</footer>',
    ]
    page = build_page("Building retrieval report", sections)
    with writing_to(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    logger.info("%s: %.1f MB", path.name, len(page) / 1e6)


def find_raw_dir(config: Config) -> Path | None:
    """Return the tars' folder where it is set: the page can do without."""
    try:
        return config.path("raw_dir")
    except ConfigError:
        return None


# ------------------------------------------------------------------------------------------------ numbers


def build_head(metrics: Mapping[str, Any]) -> str:
    """Return the title, the verdict and a tile for each kind of embedding."""
    intervals = [metrics["projector_gain"][f"over_{baseline}"]["map_ci95"] for baseline in BASELINES]
    mood = "good" if all(low > 0 for low, _ in intervals) else "bad" if any(high < 0 for _, high in intervals) else ""
    title = {
        "good": "The projector beats both baselines",
        "bad": "The projector is worse than a baseline",
        "": "The projector does not clearly beat both baselines",
    }[mood]
    tiles = "\n".join(
        f'<div class="card{" own" if kind == "projector" else ""}"><h3>{KIND_LABELS[kind]}</h3>'
        f'<div class="big">{metrics[kind]["recall_at_1"]:.1%}</div>'
        f'<div class="soft">right at first try<br>mAP {metrics[kind]["map"]:.3f}</div></div>'
        for kind in KINDS
    )
    verdict = f'<p class="verdict {mood}">{escape(describe_verdict(metrics))}</p>'
    return f'<header>\n<h1>{title}</h1>\n{verdict}\n<div class="tiles">\n{tiles}\n</div>\n</header>'


def build_scores(metrics: Mapping[str, Any]) -> str:
    """Return the table of all scores, and of what the projector gains, with intervals."""
    gains = [metrics["projector_gain"][f"over_{baseline}"] for baseline in BASELINES]
    header = ["", *KIND_LABELS.values(), *(f"gain over {KIND_LABELS[baseline]}" for baseline in BASELINES)]
    rows = [
        (
            "",
            [label, *(format_score(metrics[kind], key) for kind in KINDS), *(format_gain(gain, key) for gain in gains)],
        )
        for key, label in SCORE_LABELS.items()
    ]
    lead = (
        f"Each of {metrics['queries']:,} photographs of {metrics['buildings']:,} buildings queries the other "
        f"{metrics['gallery'] - 1:,} of the test split; the other photographs of its building are the right answers. "
        "Below each score its 95% interval, by resampling buildings."
    )
    if metrics["ignored_pairs"]:
        lead += f" {metrics['ignored_pairs']:,} pairs of buildings count as neither right nor wrong."
    return build_section("Scores", lead, build_table(header, rows))


def format_score(scores: Mapping[str, Any], key: str) -> str:
    """Return a cell's HTML: a score and its interval."""
    low, high = scores[f"{key}_ci95"]
    return f"{scores[key]:.3f}<small>{low:.3f}–{high:.3f}</small>"


def format_gain(gain: Mapping[str, Any], key: str) -> str:
    """Return a cell's HTML: a signed difference and its interval."""
    low, high = gain[f"{key}_ci95"]
    return f"{gain[key]:+.3f}<small>{low:+.3f} to {high:+.3f}</small>"


def build_conditions(metrics: Mapping[str, Any]) -> str:
    """Return the scores without the query's panorama and at fixed gallery sizes."""
    rows = [("", ["the whole test split", f"{metrics['queries']:,}", *_short_scores(metrics)])]
    if metrics["without_same_panorama"]:
        found = metrics["without_same_panorama"]
        rows.append(("", ["without the query's own panorama", f"{found['queries']:,}", *_short_scores(found)]))
    for size, found in metrics["by_gallery_size"].items():
        rows.append(("", [f"gallery of {int(size):,} images", f"{found['queries']:,}", *_short_scores(found)]))
    lead = (
        "Photographs cut from one panorama share light and camera, which makes them easy: the second row leaves them "
        "out. Galleries of one size make splits comparable; those larger than the split are missing."
    )
    return build_section("Harder and fixed conditions", lead, build_table(_SHORT_HEADER, rows))


def build_datasets(metrics: Mapping[str, Any]) -> str:
    """Return the scores of each dataset's queries."""
    datasets = dict(metrics["by_dataset"])
    mean = datasets.pop("mean")
    rows = [("own", [f"mean of {len(datasets)}", "", *_short_scores(mean)])]
    rows += [
        ("", [f"{int(name):04d}", f"{found['queries']:,}", *_short_scores(found)]) for name, found in datasets.items()
    ]
    lead = (
        "Queries of each dataset (one raw tar, a rectangle of a city) among the whole gallery; "
        "the mean counts each dataset alike."
    )
    return build_section("By dataset", lead, build_table(_SHORT_HEADER, rows))


_SHORT_HEADER = ["", "queries"] + [f"{score}, {KIND_LABELS[kind]}" for score in ("R@1", "mAP") for kind in KINDS]


def _short_scores(found: Mapping[str, Any]) -> list[str]:
    return [format_score(found[kind], key) for key in ("recall_at_1", "map") for kind in KINDS]


# ------------------------------------------------------------------------------------------------ figures


def build_figures(evaluation: Evaluation, training: Mapping[str, Any], config: Config) -> str:
    """Return the Recall@k curves, the training curve and the similarity histograms."""
    curve = read_training_curve(config.path("checkpoint_dir") / "metrics.jsonl", training)
    progress = '<p class="card soft">No training curve: neither metrics.jsonl nor the checkpoint has one.</p>'
    if curve is not None:
        progress = build_figure(plot_training(curve), "Training, on the validation split; the best epoch is kept.")
    recall = build_figure(
        plot_recall_curves(evaluation.scores), "Share of queries with a right answer among the first k."
    )
    histograms = []
    for kind in KINDS:
        same, different = sample_similarities(
            evaluation.embeddings[kind], evaluation.codes, evaluation.ignored, config.global_.seed
        )
        svg = plot_similarities(same, different, KIND_LABELS[kind])
        histograms.append(build_figure(svg, f"Pairs of images, {KIND_LABELS[kind]}: the less overlap, the better."))
    return build_section(
        "Curves",
        "How far down the list one has to look, how training went, and how well similarity tells buildings apart.",
        f'<div class="figures">{recall}{progress}</div>',
        f'<div class="figures three">{"".join(histograms)}</div>',
    )


def read_training_curve(path: Path, training: Mapping[str, Any]) -> Curve | None:
    """Return the validation mAP by epoch, of metrics.jsonl or else of the checkpoint; None where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        records = [json.loads(line) for line in lines] or training["history"]
        epochs, values = [int(record["epoch"]) for record in records], [float(r["val"]["map"]) for r in records]
        baselines = {kind: float(training["val"][kind]["map"]) for kind in BASELINES if kind in training.get("val", {})}
    except (OSError, ValueError, KeyError, TypeError):  # an older run's files: the page can do without
        return None
    return Curve(epochs, values, baselines) if epochs else None


# ------------------------------------------------------------------------------------------------ provenance


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
