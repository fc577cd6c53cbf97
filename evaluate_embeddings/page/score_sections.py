"""The sections of stage 9's page that are tables of scores."""

from collections.abc import Mapping
from html import escape
from typing import Any

from evaluate_embeddings.page.layout import build_figure, build_section, build_table
from evaluate_embeddings.page.plots import plot_groups
from evaluate_embeddings.scores.metrics import BASELINES, KIND_LABELS, KINDS, SCORE_LABELS, describe_verdict, judge

BREAKDOWNS = {
    "by_views": "images of the building",
    "by_viewpoint_change": "change of heading, degrees",
    "by_distance": "distance of the camera, metres",
}


def build_head(metrics: Mapping[str, Any]) -> str:
    """Return the title, the verdict and a tile for each kind of embedding."""
    verdicts = {judge(metrics["projector_gain"][f"over_{baseline}"]["map_ci95"]) for baseline in BASELINES}
    mood = "good" if verdicts == {"beats"} else "bad" if "is worse than" in verdicts else ""
    tiles = "\n".join(
        f'<div class="card{" own" if kind == "projector" else ""}"><h3>{KIND_LABELS[kind]}</h3>'
        f'<div class="big">{metrics[kind]["recall_at_1"]:.1%}</div>'
        f'<div class="soft">right at first try<br>mAP {metrics[kind]["map"]:.3f}</div></div>'
        for kind in KINDS
    )
    verdict = f'<p class="verdict {mood}">{escape(describe_verdict(metrics))}</p>'
    return f'<header>\n<h1>{metrics["headline"]}</h1>\n{verdict}\n<div class="tiles">\n{tiles}\n</div>\n</header>'


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


def build_breakdowns(metrics: Mapping[str, Any]) -> str:
    """Return the scores by number of views, viewpoint change and distance."""
    figures, parts = [], []
    for key, label in BREAKDOWNS.items():
        if not metrics[key]:
            continue
        figures.append(build_figure(plot_groups(metrics[key], label), f"Recall@1 by {label}, with 95% intervals."))
        rows = [("", [name, f"{found['queries']:,}", *_short_scores(found)]) for name, found in metrics[key].items()]
        parts.append(build_table([label, *_SHORT_HEADER[1:]], rows))
    lead = (
        "Queries by the number of images that their building has, by the smallest angle between their heading and "
        "another one's of the building, and by how far the camera stands from the target."
    )
    if not metrics["by_viewpoint_change"]:
        lead += " The split carries no camera columns: viewpoint and distance are left out."
    return build_section("What makes it hard", lead, f'<div class="figures">{"".join(figures)}</div>', *parts)
