"""Group unit vectors by average linkage: merge the most similar groups until none reach a mean cosine of a threshold.

The mean cosine between two groups is the dot product of their means, which stand for the groups: no matrix of pairs is
needed. Average linkage is reducible (a merged group is no more similar to another than its parts were), hence all
groups that are each other's most similar merge at once, and a pair below the threshold can be forgotten (Murtagh, A
survey of recent advances in hierarchical clustering algorithms, 1983).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import take_rows
from pipeline.errors import PipelineError
from pipeline.retrieval.geography import earth_centred_m
from publish_model.derived.geometry import GEO_KEY, GEOMETRY_COLUMN, VERSION

CLUSTER_COLUMN, ROW_COLUMN = "cluster", "row"
MADE_COLUMNS = (CLUSTER_COLUMN, "similarity", "is_medoid", ROW_COLUMN, GEOMETRY_COLUMN)
# These make a parquet with such a column of points a GeoParquet.
_POINTS = {GEOMETRY_COLUMN: {"encoding": "WKB", "geometry_types": ["Point"]}}
POINTS_METADATA = {
    GEO_KEY: json.dumps({"version": VERSION, "primary_column": GEOMETRY_COLUMN, "columns": _POINTS}).encode()
}

# Neighbours that are looked for at a time; a group that all of them may join is searched again after it has grown.
NUM_NEAREST = 64
# Of more rows faiss searches the nearest cells of an inverted file: all of them would take over an hour on two cores.
EXACT_ROWS = 500_000
NUM_PROBES, NUM_RECALL_QUERIES = 64, 1_000
# Products that are held at a time (of at least so many rows, or the product is slow), and pairs that are gathered.
_MAX_PRODUCTS, _MIN_ROWS, _BLOCK_PAIRS = 1 << 24, 64, 16_384
# How far an image without a position lies from the others.
_APART_M = 1e8
# A search's float32 product may differ by this from the one that decides.
_SLACK = 1e-5
# Smaller than any difference of two float32 near 1.
_LEAST_DIFFERENCE = 1e-9

Embeddings = NDArray[np.float32]
Points = NDArray[np.float64]
Rows = NDArray[np.int64]
Found = tuple[Rows, Rows, Rows]  # pairs (E,), (E,), and the groups that have more


@dataclass
class Groups:
    """What stands for each of the groups (G,)."""

    means: Embeddings  # (G, D)
    centres: Points  # (G, 3) metres, all zero without positions
    counts: Rows  # (G,)

    def compare(self, left: Rows, right: Rows, max_distance_m: float) -> NDArray[np.float64]:
        """Return the mean cosines of pairs of groups (E,), -1 where they are too far apart."""
        is_far = np.linalg.norm(self.centres[left] - self.centres[right], axis=1) > max_distance_m
        return np.where(is_far, -1.0, multiply_rows(self.means, left, self.means, right))

    def add(self, into: Rows, other: Rows) -> None:
        """Add groups to others, no group twice."""
        self.counts[into] += self.counts[other]
        weights = (self.counts[other] / self.counts[into])[:, None]
        for values in (self.means, self.centres):
            values[into] += weights * (values[other] - values[into])


def group_images(
    embeddings: Embeddings, threshold: float, positions: Points | None = None, max_distance_m: float = 150.0
) -> tuple[Rows, float]:
    """Group L2-normalised rows (N, D) by average linkage, cut at a mean cosine; group 0 is the largest.

    Return the group of each row, and the recall of the search for pairs, 1 where it is exact.

    With positions (N, 2) in degrees only pairs within `max_distance_m` are compared, and groups whose centres are
    farther apart stay apart; a row without a position (NaN) stays alone.
    """
    points = np.zeros((len(embeddings), 3))
    if positions is not None:
        nowhere = _APART_M * np.arange(1, len(embeddings) + 1)[:, None]
        points = np.where(np.isfinite(positions).all(axis=1, keepdims=True), earth_centred_m(*positions.T), nowhere)
    # Copies are one point, or thousands of them would fill each other's neighbours.
    keys = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in (embeddings, points)], axis=1)
    groups = np.unique(keys.view(f"V{keys.shape[1]}")[:, 0], return_inverse=True)[1]
    del keys
    means, centres = average_groups(embeddings, points, groups=groups)
    merged = Groups(means, centres, np.bincount(groups))
    asked, recall = np.arange(len(merged.counts)), 1.0
    while len(asked):
        if positions is None:
            index = _train_index(merged.means) if len(merged.means) > EXACT_ROWS else None
            found = _search_all(merged.means, asked, threshold - _SLACK, index)
            recall = min(recall, _measure_recall(merged.means, asked, threshold - _SLACK, index))
        else:
            found = _search_places(merged, asked, threshold - _SLACK, max_distance_m)
        left, right, crowded = (np.concatenate(parts) for parts in zip(*found, strict=True))
        target = _merge(merged, left, right, threshold, max_distance_m)
        kept, numbers = np.unique(target, return_inverse=True)
        asked = np.unique(numbers[crowded]) if len(kept) < len(target) else crowded[:0]
        groups = numbers[groups]
        merged = Groups(merged.means[kept], merged.centres[kept], merged.counts[kept])
    return number_by_size(groups), recall


def make_table(
    columns: pa.Table, embeddings: Embeddings, groups: Rows, positions: Points | None, rows: Rows
) -> pa.Table:
    """Return the columns of images (N,) with what was found, sorted by group and then by cosine to the medoid.

    A medoid is the image most similar to all of its group as a mean, of equal ones the first. `rows` (N,) are the
    images' rows of the dataset.
    """
    numbers = np.arange(len(groups))
    to_mean = multiply_rows(embeddings, numbers, average_groups(embeddings, groups=groups)[0], groups)
    ranked = np.lexsort((-to_mean, groups))
    medoids = ranked[np.flatnonzero(np.diff(groups[ranked], prepend=-1))]  # (G,)
    is_medoid = medoids[groups] == numbers
    similarity = np.minimum(multiply_rows(embeddings, numbers, embeddings[medoids], groups), np.float32(1))
    order = np.lexsort((numbers, -similarity, ~is_medoid, groups))
    table = pa.Table.from_arrays(
        [take_rows(column.combine_chunks(), order) for column in columns.columns], schema=columns.schema
    )
    for name, values in zip(MADE_COLUMNS, (groups, similarity, is_medoid, rows), strict=False):
        table = table.append_column(name, pa.array(values[order]))
    if positions is None:
        return table
    points = shapely.to_wkb(shapely.points(positions[order, ::-1]), byte_order=1)
    unknown = np.isnan(positions[order]).any(axis=1)
    return table.append_column(GEOMETRY_COLUMN, pa.array(points, pa.binary(), mask=unknown))


def multiply_rows(some: Embeddings, rows: Rows, others: Embeddings, places: Rows) -> Embeddings:
    """Return the dot products of rows of `some` with rows of `others` (E,), gathered block by block."""
    products = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _BLOCK_PAIRS):
        block = slice(start, start + _BLOCK_PAIRS)
        np.einsum("ed,ed->e", some[rows[block]], others[places[block]], out=products[block])
    return products


def count_pairs(num_rows: int, positions: Points | None, max_distance_m: float) -> int:
    """Return how many pairs of rows `group_images` compares."""
    if positions is None:
        return num_rows * (num_rows - 1) // 2
    from scipy.spatial import cKDTree

    tree = cKDTree(earth_centred_m(*positions[np.isfinite(positions).all(axis=1)].T))
    return (int(tree.count_neighbors(tree, max_distance_m)) - tree.n) // 2 if tree.n else 0


def number_by_size(groups: Rows) -> Rows:
    """Return the groups numbered from the largest; of equal ones the one with the first row comes first."""
    _, firsts, codes, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    return np.argsort(np.lexsort((firsts, -sizes)))[codes]


def average_groups(*values: NDArray[Any], groups: Rows) -> list[NDArray[Any]]:
    """Return the means (G, K) of rows (N, K) by their groups, which are numbered from 0 without gaps."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sizes = np.diff(np.append(starts, len(order)))[:, None]
    return [np.divide(np.add.reduceat(part[order], starts), sizes, dtype=part.dtype) for part in values]


def _merge(groups: Groups, left: Rows, right: Rows, threshold: float, max_distance_m: float) -> Rows:
    """Merge groups along pairs (E,) that may pass, and return for each group the one (G,) that holds it now."""
    num_groups = len(groups.counts)
    target, into, cosines = np.arange(num_groups), left[:0], np.full(len(left), np.nan)  # not compared yet
    while True:
        keys = np.minimum(left, right) * num_groups + np.maximum(left, right)
        keys, firsts = np.unique(keys, return_index=True)
        left, right = np.divmod(keys, num_groups)
        cosines = cosines[firsts]
        is_new = np.isnan(cosines) | np.isin(left, into) | np.isin(right, into)
        again = np.flatnonzero(is_new & (left != right))
        cosines[again] = groups.compare(left[again], right[again], max_distance_m)
        passing = (cosines >= threshold) & (left != right)
        left, right, cosines = left[passing], right[passing], cosines[passing]
        if not len(left):
            return target
        best = _find_best(left, right, cosines, num_groups)
        mutual = (best[left] == right) & (best[right] == left)
        into, gone = left[mutual], right[mutual]
        groups.add(into, gone)
        moved = np.arange(num_groups)
        moved[gone] = into
        target, left, right = moved[target], moved[left], moved[right]


def _find_best(left: Rows, right: Rows, cosines: NDArray[np.float64], num_groups: int) -> Rows:
    """Return each group's most similar partner (G,), -1 without one.

    Chance decides between equal ones: by number, thousands would choose the same partner, and one pair merge.
    """
    ends, others = np.concatenate([left, right]), np.concatenate([right, left])
    ranks = _LEAST_DIFFERENCE * np.random.default_rng(0).random(len(left)) - cosines
    order = np.lexsort((np.concatenate([ranks, ranks]), ends))
    firsts = order[np.flatnonzero(np.diff(ends[order], prepend=-1))]
    best = np.full(num_groups, -1, np.int64)
    best[ends[firsts]] = others[firsts]
    return best


def _search_all(means: Embeddings, asked: Rows, threshold: float, index: Any) -> Iterator[Found]:
    """Yield the pairs of groups whose means reach the threshold, up to NUM_NEAREST for each group that is asked.

    Blocks of groups are compared with all others, or with what an index of faiss finds.
    """
    num_blocks = -(-len(asked) // max(_MIN_ROWS, _MAX_PRODUCTS // len(means)))
    for own in np.array_split(asked, num_blocks):
        if index is None:
            yield _list_passing(own, np.arange(len(means)), means[own] @ means.T, threshold)
        else:
            cosines, others = index.search(means[own], NUM_NEAREST + 1)  # one is the group itself
            rows, columns = np.nonzero((cosines >= threshold) & (others != own[:, None]) & (others >= 0))
            yield own[rows], others[rows, columns], own[cosines[:, -1] >= threshold]


def _list_passing(
    own: Rows, others: Rows, cosines: Embeddings, threshold: float, handicaps: Points | float = 0.0
) -> Found:
    """Return the pairs that pass among the cosines (Q, R) of `own` (Q,) with `others` (R,), which hold them too.

    Of a row with over NUM_NEAREST they are the nearest, by cosine less the handicaps.
    """
    cosines[np.arange(len(own)), np.searchsorted(others, own)] = -np.inf
    rows, columns = np.divmod(np.flatnonzero(cosines >= threshold), len(others))
    crowded = np.flatnonzero(np.bincount(rows, minlength=len(own)) > NUM_NEAREST)
    if len(crowded):
        ranks = np.subtract(handicaps, cosines)[crowded]
        cosines[crowded[:, None], np.argpartition(ranks, NUM_NEAREST, axis=1)[:, NUM_NEAREST:]] = -np.inf
        rows, columns = np.nonzero(cosines >= threshold)
    return own[rows], others[columns], own[crowded]


def _train_index(means: Embeddings) -> Any:
    """Return faiss's inverted file of rows; raise PipelineError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise PipelineError(
            f"faiss: not installed, and over {EXACT_ROWS} images need it: pip install faiss-cpu (the extra `faiss`)"
        ) from None
    num_cells = int(4 * len(means) ** 0.5)
    index: Any = faiss.index_factory(means.shape[1], f"IVF{num_cells},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(means[:: max(1, len(means) // (64 * num_cells))])
    index.add(means)
    index.nprobe = NUM_PROBES
    return index


def _measure_recall(means: Embeddings, asked: Rows, threshold: float, index: Any) -> float:
    """Return the share of pairs that an index finds of those that `_search_all` finds without it."""
    if index is None:
        return 1.0
    spread = asked[:: max(1, len(asked) // NUM_RECALL_QUERIES)]
    exact, approximate = (
        np.concatenate([left * len(means) + right for left, right, _ in _search_all(means, spread, threshold, one)])
        for one in (None, index)
    )
    return float(np.isin(exact, approximate).mean()) if len(exact) else 1.0


def _search_places(groups: Groups, asked: Rows, threshold: float, max_distance_m: float) -> Iterator[Found]:
    """Yield the pairs of groups that are near too, from one cell of the ground after another."""
    from scipy.spatial import cKDTree
    from scipy.spatial.distance import cdist

    means, centres = groups.means, groups.centres
    tree = cKDTree(centres)
    cells = np.floor(centres[asked] / max_distance_m).astype(np.int64)
    order = np.lexsort(cells.T)
    starts = np.flatnonzero(np.diff(cells[order], axis=0).any(axis=1)) + 1
    reach = max_distance_m * (1 + 3**0.5 / 2)  # from a cell's centre
    for members in np.split(order, starts):
        near = np.sort(tree.query_ball_point((cells[members[0]] + 0.5) * max_distance_m, reach))
        others = means[near]
        for block in np.array_split(members, 1 + len(members) * len(near) // _MAX_PRODUCTS):
            own = asked[block]
            distances = cdist(centres[own], centres[near])
            cosines = means[own] @ others.T
            cosines[distances > max_distance_m] = -np.inf
            # Of copies the nearest: all would choose the same ones.
            yield _list_passing(own, near, cosines, threshold, distances * _LEAST_DIFFERENCE)
