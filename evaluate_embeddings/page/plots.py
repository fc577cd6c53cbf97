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

from evaluate_embeddings.scores.metrics import BASELINES, KIND_LABELS, KINDS, ScoresByKind

# Okabe and Ito's colours, which the colour-blind can tell apart; lines differ by dashes and markers too.
KIND_STYLES: dict[str, dict[str, Any]] = {
    "raw": {"color": "#8C8C8C", "linestyle": ":", "marker": "s"},
    "pca_whitened": {"color": "#E69F00", "linestyle": "--", "marker": "^"},
    "whitening": {"color": "#CC79A7", "linestyle": "-.", "marker": "D"},
    "projector": {"color": "#0084C8", "linestyle": "-", "marker": "o"},
}
# Drawn in a colour that nothing else has, then handed to the page's style sheet, for light and dark.
TEXT_COLOR = "#010203"
FIGURE_INCHES = (5.0, 3.5)
MAX_RANK = 100


@dataclass(frozen=True)
class Curve:
    """A training run's validation mAP by epoch."""

    epochs: list[int]
    values: list[float]
    baselines: dict[str, float]  # the mAP of the other kinds on the same images, as far as it is recorded
    published: tuple[int, float] | None = None  # the best epoch, and the mAP of the published interpolation


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


def _to_svg(figure: Figure, description: str) -> Markup:
    """Return the figure as an inline <svg> with an alternative text, without anything that names another file."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(TEXT_COLOR, "currentColor")
    head, _, body = text.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', head)
    label = escape(description, quote=True)
    return Markup(f'<svg {view_box[0] if view_box else ""} role="img" aria-label="{label}">{body}')


def plot_recall_curves(scores: ScoresByKind) -> Markup:
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


def plot_training(curve: Curve) -> Markup:
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
