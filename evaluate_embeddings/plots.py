"""Draw the report's figures as SVG that takes the page's text colour."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from evaluate_embeddings.metrics import KIND_LABELS, KINDS, ScoresByKind
from pipeline.retrieval import IgnoredPairs

# Okabe and Ito's colours, which the colour-blind can tell apart; lines differ by dashes and markers too.
KIND_STYLES: dict[str, dict[str, Any]] = {
    "raw": {"color": "#8C8C8C", "linestyle": ":", "marker": "s"},
    "pca_whitened": {"color": "#E69F00", "linestyle": "--", "marker": "^"},
    "projector": {"color": "#0084C8", "linestyle": "-", "marker": "o"},
}
SAME_COLOR, DIFFERENT_COLOR = "#009E73", "#D55E00"
# Drawn in a colour that nothing else has, then handed to the page's style sheet, for light and dark.
TEXT_COLOR = "#010203"
FIGURE_INCHES = (5.0, 3.5)
MAX_RANK = 100
NUM_BINS = 40


@dataclass(frozen=True)
class Curve:
    """A training run's validation mAP by epoch."""

    epochs: list[int]
    values: list[float]
    baselines: dict[str, float]  # the mAP of the other kinds on the same images, as far as it is recorded


@contextmanager
def _figure(name: str) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure with the report's style; `name` makes the ids in its SVG its own, and the same every time."""
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


def plot_similarities(same: NDArray[np.float32], different: NDArray[np.float32], label: str) -> str:
    """Draw how the cosines of pairs of one building and of two buildings are distributed; either may be empty."""
    with _figure(f"similarity {label}") as (figure, axes):
        both = np.concatenate([same, different])
        bins = np.linspace(min(float(both.min()), 0.99), max(float(both.max()), 1.0), NUM_BINS + 1).tolist()
        described = []
        for values, name, color, hatch in (
            (different, "two buildings", DIFFERENT_COLOR, "///"),
            (same, "same building", SAME_COLOR, None),
        ):
            shares = np.full(len(values), 1 / max(1, len(values)))
            axes.hist(values, bins, weights=shares, color=color, alpha=0.55, hatch=hatch, label=name)
            described.append(f"{name} {np.median(values):.2f}" if len(values) else f"{name}: no pair")
        axes.set(xlabel=f"cosine similarity, {label}", ylabel="share of pairs", yticks=[])
        axes.legend(loc="best")
        return _to_svg(figure, f"Similarity of pairs of images, {label}, median of {' and of '.join(described)}.")


def plot_training(curve: Curve) -> str:
    """Draw validation mAP by epoch, with epoch 0 (before training), the best epoch and the baselines marked."""
    with _figure("training") as (figure, axes):
        best = int(np.argmax(curve.values))
        style = {key: value for key, value in KIND_STYLES["projector"].items() if key != "marker"}
        axes.plot(curve.epochs, curve.values, label="projector", **style)
        _mark(axes, curve, 0, "D", f"epoch {curve.epochs[0]}, before training: {curve.values[0]:.3f}")
        _mark(axes, curve, best, "*", f"best, epoch {curve.epochs[best]}: {curve.values[best]:.3f}")
        for kind, value in curve.baselines.items():
            style = {key: value for key, value in KIND_STYLES[kind].items() if key != "marker"}
            axes.axhline(value, label=f"{KIND_LABELS[kind]}: {value:.3f}", **style)
        axes.set(xlabel="epoch", ylabel="validation mAP")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best", fontsize=9)
        return _to_svg(
            figure,
            f"Validation mAP over {len(curve.epochs)} epochs: {curve.values[0]:.3f} before training, "
            f"best {curve.values[best]:.3f} at epoch {curve.epochs[best]}.",
        )


def _mark(axes: Axes, curve: Curve, place: int, marker: str, label: str) -> None:
    color = KIND_STYLES["projector"]["color"]
    axes.plot(curve.epochs[place], curve.values[place], marker, color=color, markersize=9, label=label)


def sample_similarities(
    embeddings: NDArray[np.float32], codes: NDArray[np.int32], ignored: IgnoredPairs, seed: int, num_pairs: int = 50_000
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the cosines of random pairs of images of one building, and of two buildings that are no ignored pair."""
    generator = np.random.default_rng(seed)
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    starts = np.cumsum(sizes) - sizes  # of each building in the order
    first = generator.choice(np.flatnonzero(sizes[codes] > 1), num_pairs)
    building = codes[first]
    place = np.empty(len(codes), np.int64)
    place[order] = np.arange(len(codes)) - starts[codes[order]]  # of each image in its building
    step = generator.integers(1, sizes[building])
    second = order[starts[building] + (place[first] + step) % sizes[building]]
    drawn = generator.integers(len(codes), size=(num_pairs, 2))
    a, b = codes[drawn].astype(np.int64).min(axis=1), codes[drawn].astype(np.int64).max(axis=1)
    known = ignored.building_a * len(sizes) + ignored.building_b  # smaller code first, as resolve_pairs has them
    drawn = drawn[(a != b) & ~np.isin(a * len(sizes) + b, known)]
    return _cosines(embeddings, first, second), _cosines(embeddings, drawn[:, 0], drawn[:, 1])


def _cosines(
    embeddings: NDArray[np.float32], first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the products of pairs of rows, a few thousand pairs at a time."""
    blocks = [
        np.einsum("nd,nd->n", embeddings[first[start : start + 4096]], embeddings[second[start : start + 4096]])
        for start in range(0, len(first), 4096)
    ]
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)
