"""Scores by what makes a query hard: few views of its building, a change of viewpoint, a distant camera."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from evaluate_embeddings.scores.metrics import Evaluation, summarize_kinds
from pipeline.files.tables import open_parquet, reading
from pipeline.retrieval.candidates import RowGroups

# The value of each image, the lower ends of the groups, and how a group is named.
Group = tuple[NDArray[Any], tuple[int, ...], Callable[[int, float], str]]
# Lower ends of the groups. Each group's last number belongs to the next; the last group is open.
VIEW_EDGES = (2, 3, 4, 6)
HEADING_EDGES = (0, 15, 30, 60, 90)  # degrees, 180 at most
DISTANCE_EDGES = (0, 10, 20, 30, 50)  # metres


def load_camera(split_path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return each image's heading in degrees and its distance in metres from camera to target, NaN where unknown.

    Return None if the split has no such columns, as one of another program may.
    """
    file, names = open_parquet(split_path), ["heading", "distance_m"]
    if not {*names} <= {*file.schema_arrow.names}:
        return None
    with reading(split_path):
        table = file.read(columns=names)
    heading, distance = (table[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in names)
    return heading, distance


def heading_changes(codes: NDArray[Any], headings: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N,): the smallest angle in degrees between an image's heading and another one's of its building.

    NaN where the building has no other image with a heading.
    """
    known = np.flatnonzero(np.isfinite(headings))
    # Around the circle of a building's headings, the nearest one is a neighbour.
    order = known[np.lexsort((headings[known] % 360, codes[known]))]
    ordered, places = codes[order], np.arange(len(order))
    first, end = (np.searchsorted(ordered, ordered, side) for side in ("left", "right"))
    smallest = np.full(len(headings), np.nan)
    for neighbor in (np.where(places + 1 < end, places + 1, first), np.where(places > first, places - 1, end - 1)):
        angles = np.abs((headings[order] - headings[order[neighbor]] + 180) % 360 - 180)
        smallest[order] = np.fmin(smallest[order], np.where(neighbor == places, np.nan, angles))
    return smallest


def summarize_breakdowns(evaluation: Evaluation, split_path: Path, seed: int) -> dict[str, Any]:
    """Return the scores by number of views, viewpoint change and distance; the last two None without a camera.

    Groups that no query is in are left out.
    """
    queries = next(iter(evaluation.scores.values())).query
    views, camera = RowGroups(evaluation.codes), load_camera(split_path)
    groups: dict[str, Group] = {"by_views": (views.sizes()[views.codes], VIEW_EDGES, name_count)}
    if camera is not None:
        groups["by_viewpoint_change"] = heading_changes(evaluation.codes, camera[0]), HEADING_EDGES, name_range
        groups["by_distance"] = camera[1], DISTANCE_EDGES, name_range
    found: dict[str, Any] = {"by_views": None, "by_viewpoint_change": None, "by_distance": None}
    for key, (values, edges, name) in groups.items():
        found[key] = {}
        for low, high in zip(edges, (*edges[1:], np.inf), strict=True):
            chosen = (values[queries] >= low) & (values[queries] < high)  # NaN is in no group
            if chosen.any():
                scores = {kind: one.take(chosen) for kind, one in evaluation.scores.items()}
                found[key][name(low, high)] = summarize_kinds(scores, evaluation.codes, seed)
    return found


def name_count(low: int, high: float) -> str:
    """Name a group of whole numbers: 2, 4-5, 6+."""
    if high == np.inf:
        return f"{low}+"
    return f"{low}" if high == low + 1 else f"{low}-{high - 1:g}"


def name_range(low: int, high: float) -> str:
    """Name a group of measures: 0-15, 90+."""
    return f"{low}+" if high == np.inf else f"{low}-{high:g}"
