"""Draw the figures of stage 9's page as SVG that takes the page's text colour."""

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluate_embeddings.scores.metrics import BASELINES, KIND_LABELS, KINDS, Evaluation, ScoresByKind
from evaluate_embeddings.scores.pair_similarity import PairSimilarities

BREAKDOWNS = {
    "by_views": "images of the building",
    "by_viewpoint_change": "change of heading, degrees",
    "by_distance": "distance of the camera, metres",
}
# Okabe and Ito's colours, which the colour-blind can tell apart; lines differ by dashes and markers too.
KIND_STYLES: dict[str, dict[str, Any]] = {
    "raw": {"color": "#8C8C8C", "linestyle": ":", "marker": "s"},
    "pca_whitened": {"color": "#E69F00", "linestyle": "--", "marker": "^"},
    "whitening": {"color": "#CC79A7", "linestyle": "-.", "marker": "D"},
    "projector": {"color": "#0084C8", "linestyle": "-", "marker": "o"},
}
SAME_COLOR, DIFFERENT_COLOR = "#009E73", "#D55E00"
# Drawn in a colour that nothing else has, then handed to the page's style sheet, for light and dark.
TEXT_COLOR = "#010203"
FIGURE_INCHES = (5.0, 3.5)
MAX_RANK = 100
NUM_BINS = 40
LOWEST_RATE = 1e-4
LEGEND_ABOVE: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "fontsize": 9, "columnspacing": 1.0}


@dataclass(frozen=True)
class Curve:
    """A training run's validation mAP by epoch."""

    epochs: list[int]
    values: list[float]
    baselines: dict[str, float]  # the mAP of the other kinds on the same images, as far as it is recorded
    published: tuple[int, float] | None = None  # the best epoch, and the mAP of the published interpolation


def draw_figures(evaluation: Evaluation, metrics: Mapping[str, Any], curve: Curve | None) -> dict[str, Any]:
    """Return the page's drawings by name; None if there is nothing to draw."""
    found, pairs = metrics["verification"], evaluation.pairs
    galleries = {f"{int(size):,}": group for size, group in metrics["by_gallery_size"].items()}
    return {
        "recall": Markup(plot_recall_curves(evaluation.scores)),
        "galleries": Markup(plot_groups(galleries, "gallery size")) if len(galleries) > 1 else None,
        "similarities": {
            kind: Markup(plot_similarities(one, found[kind], KIND_LABELS[kind])) for kind, one in pairs.items()
        },
        "roc": Markup(plot_roc(pairs, found)) if all(found[kind] for kind in pairs) else None,
        "breakdowns": {
            key: Markup(plot_groups(metrics[key], label)) for key, label in BREAKDOWNS.items() if metrics[key]
        },
        "training": Markup(plot_training(curve)) if curve else None,
    }


def read_training_curve(path: Path, training: Mapping[str, Any]) -> Curve | None:
    """Return the validation mAP by epoch, from metrics.jsonl or else from the checkpoint; None if neither has one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        records = [json.loads(line) for line in lines] or training["history"]
        validated = [record for record in records if record["val"] is not None]
        epochs, values = [int(one["epoch"]) for one in validated], [float(one["val"]["map"]) for one in validated]
        baselines = {kind: float(training["val"][kind]["map"]) for kind in BASELINES if kind in training.get("val", {})}
        own = training.get("val", {}).get("projector")
        published = (int(training["epoch"]), float(own["map"])) if own and "epoch" in training else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not written by our stage 6
        return None
    return Curve(epochs, values, baselines, published) if epochs else None


@contextmanager
def _figure(name: str) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure in the report's style; `name` makes the ids in its SVG unique and repeatable."""
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 11,
        "text.color": TEXT_COLOR, "axes.edgecolor": TEXT_COLOR, "axes.labelcolor": TEXT_COLOR,
        "xtick.color": TEXT_COLOR, "ytick.color": TEXT_COLOR, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#8C8C8C", "grid.alpha": 0.25, "legend.frameon": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
        yield figure, figure.add_subplot()


def _to_svg(figure: Figure, description: str) -> str:
    """Return the figure as an inline <svg> with an alternative text, without anything that names another file."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(TEXT_COLOR, "currentColor")
    head, _, body = text.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', head)
    label = escape(description, quote=True)
    return f'<svg {view_box[0] if view_box else ""} role="img" aria-label="{label}">{body}'


def plot_recall_curves(scores: ScoresByKind) -> str:
    """Draw Recall@k by k, on a logarithmic axis, for each kind of embedding."""
    with _figure("recall") as (figure, axes):
        num_queries = len(next(iter(scores.values())).query)
        ranks = np.unique(np.geomspace(1, MAX_RANK, 40).astype(int))
        described = []
        for kind in KINDS:
            shares = [float((scores[kind].first_rank <= rank).mean()) for rank in ranks]
            axes.plot(ranks, shares, label=KIND_LABELS[kind], markevery=6, markersize=5, **KIND_STYLES[kind])
            described.append(f"{KIND_LABELS[kind]} {shares[0]:.3f} at 1 and {shares[-1]:.3f} at {ranks[-1]}")
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="k, nearest candidates looked at", ylabel="Recall@k")
        axes.legend(loc="lower right")
        return _to_svg(figure, f"Recall at k of {num_queries} queries: {'; '.join(described)}.")


def plot_similarities(pairs: PairSimilarities, summary: Mapping[str, Any] | None, label: str) -> str:
    """Draw the distributions of the cosines of pairs of one building and of two; the latter may be missing."""
    with _figure(f"similarity {label}") as (figure, axes):
        both = np.concatenate([pairs.same, pairs.different])
        bins = np.linspace(min(float(both.min()), 0.99), max(float(both.max()), 1.0), NUM_BINS + 1).tolist()
        described = []
        for values, name, color, hatch in (
            (pairs.different, "two buildings", DIFFERENT_COLOR, "///"),
            (pairs.same, "same building", SAME_COLOR, None),
        ):
            shares = np.full(len(values), 1 / max(1, len(values)))
            axes.hist(values, bins, weights=shares, color=color, alpha=0.55, hatch=hatch, label=name)
            described.append(f"{name} {np.median(values):.2f}" if len(values) else f"{name}: no pair")
        text = f"Similarity of pairs of images, {label}, median of {' and of '.join(described)}."
        if summary is not None:
            equal, rate = summary["equal_error_threshold"], summary["equal_error_rate"]
            recommended = summary["recommended_threshold"]
            axes.axvline(equal, color=TEXT_COLOR, linestyle=":", label=f"equal error: {rate:.1%} at {equal:.2f}")
            axes.axvline(recommended, color=TEXT_COLOR, linestyle="-", label=f"recommended: {recommended:.2f}")
            text += f" Equal error {rate:.1%} at {equal:.3f}; recommended threshold {recommended:.3f}."
        axes.set(xlabel=f"cosine similarity, {label}", ylabel="share of pairs", yticks=[])
        axes.legend(**LEGEND_ABOVE, ncols=2)
        return _to_svg(figure, text)


def plot_roc(pairs: Mapping[str, PairSimilarities], summaries: Mapping[str, Any]) -> str:
    """Draw the share of pairs of one building that pass, by the share of pairs of two that do (logarithmic)."""
    with _figure("roc") as (figure, axes):
        described = []
        rates = np.geomspace(LOWEST_RATE, 1, 200)
        for kind, one in pairs.items():
            recalls = one.pass_rates(np.array([one.threshold_at(rate) for rate in rates], np.float32))[1]
            area = summaries[kind]["area_under_curve"]
            label = f"{KIND_LABELS[kind]}, area {area:.3f}"
            axes.plot(rates, recalls, label=label, markevery=25, markersize=5, **KIND_STYLES[kind])
            described.append(label)
        axes.set_xscale("log")
        axes.set(xlabel="share of pairs of two buildings that pass", ylabel="share of pairs of one building", ylim=0)
        axes.legend(loc="upper left", fontsize=9)
        return _to_svg(figure, f"Receiver operating characteristic: {'; '.join(described)}.")


def plot_groups(groups: Mapping[str, Any], axis_label: str) -> str:
    """Draw Recall@1 of each kind of embedding, with its interval, group by group."""
    with _figure(f"groups {axis_label}") as (figure, axes):
        described = []
        for number, kind in enumerate(KINDS):
            places = np.arange(len(groups)) + 0.14 * (number - (len(KINDS) - 1) / 2)
            values = np.array([group[kind]["recall_at_1"] for group in groups.values()])
            limits = np.array([group[kind]["recall_at_1_ci95"] for group in groups.values()])  # (G, 2)
            errors = np.abs(limits.T - values)
            style = KIND_STYLES[kind] | {"linestyle": "none"}
            axes.errorbar(places, values, errors, label=KIND_LABELS[kind], capsize=3, markersize=6, **style)
        for name, group in groups.items():
            described.append(f"{name}: {group['projector']['recall_at_1']:.3f}")
        ticks = [f"{name}\n{group['queries']:,}" for name, group in groups.items()]
        axes.set_xticks(range(len(groups)), ticks)
        axes.set(xlabel=f"{axis_label}; below, queries", ylabel="Recall@1", ylim=(0, 1.02))
        axes.legend(**LEGEND_ABOVE, ncols=len(KINDS))
        return _to_svg(figure, f"Recall@1 by {axis_label}, of the projector {', '.join(described)}.")


def plot_training(curve: Curve) -> str:
    """Draw validation mAP by epoch, with epoch 0 (before training), what is published and the baselines marked."""
    with _figure("training") as (figure, axes):
        best = int(np.argmax(curve.values))
        epoch, own = curve.published or (curve.epochs[best], curve.values[best])
        style = {key: value for key, value in KIND_STYLES["projector"].items() if key != "marker"}
        axes.plot(curve.epochs, curve.values, label="projector", **style)
        first = curve.epochs[0], curve.values[0]
        color = style["color"]
        axes.plot(*first, "D", color=color, markersize=9, label=f"epoch {first[0]}, before training: {first[1]:.3f}")
        axes.plot(epoch, own, "*", color=color, markersize=9, label=f"published, of epoch {epoch}: {own:.3f}")
        for kind, value in curve.baselines.items():
            style = {key: value for key, value in KIND_STYLES[kind].items() if key != "marker"}
            axes.axhline(value, label=f"{KIND_LABELS[kind]}: {value:.3f}", **style)
        axes.set(xlabel="epoch", ylabel="validation mAP")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best", fontsize=9)
        return _to_svg(
            figure,
            f"Validation mAP over {len(curve.epochs)} epochs: {curve.values[0]:.3f} before training, "
            f"best {curve.values[best]:.3f} at epoch {curve.epochs[best]}, published {own:.3f} of epoch {epoch}.",
        )
