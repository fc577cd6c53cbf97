"""Scores by what makes a query hard: few views of its building, a change of viewpoint, a distant camera."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from evaluate_embeddings.scores.metrics import Evaluation, summarize_kinds
from pipeline.files.tables import open_parquet, reading

# Lower ends of the groups. Each group's end belongs to the next; the last group is open.
EDGES: dict[str, tuple[int, ...]] = {
    "by_views": (2, 3, 4, 6),
    "by_viewpoint_change": (0, 15, 30, 60, 90),  # degrees, 180 at most
    "by_distance": (0, 10, 20, 30, 50),  # metres
}


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
    camera = load_camera(split_path)
    values: dict[str, NDArray[Any]] = {"by_views": np.bincount(evaluation.codes)[evaluation.codes]}
    if camera is not None:
        values |= {"by_viewpoint_change": heading_changes(evaluation.codes, camera[0]), "by_distance": camera[1]}
    found: dict[str, Any] = dict.fromkeys(EDGES)
    for key in values:
        found[key], own = {}, values[key][queries]
        for low, high in pairwise((*EDGES[key], np.inf)):
            chosen = (own >= low) & (own < high)  # NaN is in no group
            if chosen.any():
                scores = {kind: one.take(chosen) for kind, one in evaluation.scores.items()}
                name = name_group(low, high - 1 if key == "by_views" else high)
                found[key][name] = summarize_kinds(scores, evaluation.codes, seed)
    return found


def name_group(low: float, last: float) -> str:
    """Name a group by its bounds: 2, 4-5, 90+."""
    return f"{low}+" if last == np.inf else f"{low}" if last == low else f"{low}-{last:g}"
