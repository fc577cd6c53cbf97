"""Group unit vectors by average linkage: merge the most similar groups until none reach a mean cosine of a threshold.

The mean cosine between two groups is the dot product of their means, so sums stand for groups, and no matrix of pairs
is needed. Average linkage is reducible (a merged group is no more similar to another than its parts were), hence all
groups that are each other's most similar merge at once, and a pair below the threshold can be forgotten (Murtagh, A
survey of recent advances in hierarchical clustering algorithms, 1983).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.retrieval.geography import earth_centred_m

# Neighbours that are looked for at a time; a group that all of them may join is searched again after it has grown.
NUM_NEAREST = 64
# Of more rows faiss searches the nearest cells of an inverted file: all of them would take over an hour on two cores.
EXACT_ROWS = 500_000
NUM_PROBES, NUM_RECALL_QUERIES = 64, 1_000
# Products that are held at a time, and pairs whose numbers are gathered.
_MAX_PRODUCTS, _BLOCK_PAIRS = 1 << 23, 16_384
_TILE = 1_024, 8_192
# A search's float32 product may differ by this from the one that decides.
_SLACK = 1e-5

Embeddings = NDArray[np.float32]
Points = NDArray[np.float64]
Rows = NDArray[np.int64]
Found = tuple[Rows, Rows, Rows]  # pairs (E,), (E,), and the groups that may have more


@dataclass
class Sums:
    """What stands for each of the groups (G,)."""

    embeddings: Embeddings  # (G, D)
    points: Points | None  # (G, 3) metres
    counts: NDArray[np.int64]  # (G,)

    @property
    def means(self) -> Embeddings:
        return np.divide(self.embeddings, self.counts[:, None], dtype=np.float32)

    @property
    def centres(self) -> Points | None:
        return None if self.points is None else self.points / self.counts[:, None]

    def compare(self, left: Rows, right: Rows, max_distance_m: float) -> NDArray[np.float64]:
        """Return the mean cosines of pairs of groups (E,), -1 where they are too far apart."""
        products = multiply_rows(self.embeddings, left, self.embeddings, right)
        cosines = products / (self.counts[left] * self.counts[right])
        if (centres := self.centres) is not None:
            cosines[np.linalg.norm(centres[left] - centres[right], axis=1) > max_distance_m] = -1
        return cosines

    def add(self, into: Rows, other: Rows) -> None:
        """Add groups to others, no group twice."""
        self.embeddings[into] += self.embeddings[other]
        self.counts[into] += self.counts[other]
        if self.points is not None:
            self.points[into] += self.points[other]

    def take(self, rows: Rows) -> "Sums":
        return Sums(self.embeddings[rows], None if self.points is None else self.points[rows], self.counts[rows])


def group_images(
    embeddings: Embeddings, threshold: float, positions: Points | None = None, max_distance_m: float = 150.0
) -> tuple[Rows, float]:
    """Group L2-normalised rows (N, D) by average linkage, cut at a mean cosine; group 0 is the largest.

    Return the group of each row, and the recall of the search for pairs, 1 where it is exact.

    With positions (N, 2) in degrees only pairs within `max_distance_m` are compared, and groups whose centres are
    farther apart stay apart; a row without a position (NaN) stays alone.
    """
    num_rows = len(embeddings)
    groups, points = np.full(num_rows, -1, np.int64), None
    rows = np.arange(num_rows)
    if positions is not None:
        rows = np.flatnonzero(np.isfinite(positions).all(axis=1))
        points = earth_centred_m(*positions[rows].T)
    recall = 1.0
    # Copies are one point, or thousands of them would fill each other's neighbours.
    groups[rows] = _find_copies(embeddings[rows], points)
    sums = sum_groups(embeddings[rows], points, groups[rows])
    asked = np.arange(len(sums.counts))
    while len(asked):
        left, right, capped, found = _search(sums, asked, threshold - _SLACK, max_distance_m)
        recall = min(recall, found)
        target = _merge(sums, left, right, threshold, max_distance_m)
        kept, numbers = np.unique(target, return_inverse=True)
        asked = np.unique(numbers[capped]) if len(kept) < len(target) else capped[:0]
        groups[rows] = numbers[groups[rows]]
        sums = sums.take(kept)
    alone = groups < 0
    groups[alone] = len(sums.counts) + np.arange(alone.sum())
    return number_by_size(groups), recall


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

    points = earth_centred_m(*positions[np.isfinite(positions).all(axis=1)].T)
    if not len(points):
        return 0
    tree = cKDTree(points)
    return (int(tree.count_neighbors(tree, max_distance_m)) - len(points)) // 2


def number_by_size(groups: Rows) -> Rows:
    """Return the groups numbered from the largest; of equal ones the one with the first row comes first."""
    _, firsts, codes, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    numbers = np.empty(len(sizes), np.int64)
    numbers[np.lexsort((firsts, -sizes))] = np.arange(len(sizes))
    return numbers[codes]


def _find_copies(embeddings: Embeddings, points: Points | None) -> Rows:
    """Return a number for each row (N,), the same for rows with the same bytes."""
    parts = [np.ascontiguousarray(part).view(np.uint8) for part in (embeddings, points) if part is not None]
    keys = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    return np.unique(keys.view(np.dtype((np.void, keys.shape[1])))[:, 0], return_inverse=True)[1].astype(np.int64)


def sum_groups(embeddings: Embeddings, points: Points | None, groups: Rows) -> Sums:
    """Return the sums of rows (N,) by their groups, which are numbered from 0 without gaps."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    if len(starts) == len(order):
        return Sums(embeddings[order], None if points is None else points[order], np.ones(len(order), np.int64))
    sums, places = (None if part is None else np.add.reduceat(part[order], starts) for part in (embeddings, points))
    assert sums is not None
    return Sums(sums, places, np.diff(np.append(starts, len(order))))


def _merge(sums: Sums, left: Rows, right: Rows, threshold: float, max_distance_m: float) -> Rows:
    """Merge groups along pairs (E,) that may pass, and return for each group the one (G,) that holds its sums now."""
    num_groups = len(sums.counts)
    target = np.arange(num_groups)
    pairs = np.unique(np.minimum(left, right) * num_groups + np.maximum(left, right))
    left, right = np.divmod(pairs, num_groups)
    cosines = sums.compare(left, right, max_distance_m)
    while True:
        passing = cosines >= threshold
        left, right, cosines = left[passing], right[passing], cosines[passing]
        if not len(left):
            return target
        best = _find_best(left, right, cosines, num_groups)
        mutual = (best[left] == right) & (best[right] == left)
        into, gone = left[mutual], right[mutual]
        sums.add(into, gone)
        moved = np.arange(num_groups)
        moved[gone] = into
        target = moved[target]
        has_grown = np.zeros(num_groups, dtype=bool)
        has_grown[into] = True
        a, b = moved[left], moved[right]
        keys, firsts = np.unique(np.minimum(a, b) * num_groups + np.maximum(a, b), return_index=True)
        left, right = np.divmod(keys, num_groups)
        cosines = cosines[firsts]
        cosines[left == right] = -1
        again = np.flatnonzero((has_grown[left] | has_grown[right]) & (left != right))
        cosines[again] = sums.compare(left[again], right[again], max_distance_m)


def _find_best(left: Rows, right: Rows, cosines: NDArray[np.float64], num_groups: int) -> Rows:
    """Return each group's most similar partner (G,), -1 without one.

    Of equal ones a hash of the pair decides: by number, thousands would choose the same partner, and one pair merge.
    """
    ends, others = np.concatenate([left, right]), np.concatenate([right, left])
    # A step of a multiplicative hash by the golden ratio (Knuth).
    mixed = (left * num_groups + right).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    order = np.lexsort((np.concatenate([mixed, mixed]), -np.concatenate([cosines, cosines]), ends))
    firsts = order[np.flatnonzero(np.diff(ends[order], prepend=-1))]
    best = np.full(num_groups, -1, np.int64)
    best[ends[firsts]] = others[firsts]
    return best


# ------------------------------------------------------------------------------------------------ candidates


def _search(sums: Sums, asked: Rows, threshold: float, max_distance_m: float) -> tuple[Rows, Rows, Rows, float]:
    """Return pairs of groups whose means reach the threshold, up to NUM_NEAREST for each group that is asked.

    Then the groups that may have more, and the recall.
    """
    recall = 1.0
    if sums.points is not None:
        found = list(_search_places(sums, asked, threshold, max_distance_m))
    elif len(sums.counts) <= EXACT_ROWS:
        found = list(_search_all(sums.means, asked, threshold))
    else:
        means = sums.means
        index, found = _train_index(means), []
        for start in range(0, len(asked), _BLOCK_PAIRS):
            found.append(_search_index(index, means, asked[start : start + _BLOCK_PAIRS], threshold))
        spread = np.linspace(0, len(means) - 1, NUM_RECALL_QUERIES).astype(np.int64)
        exact, approximate = (
            np.unique(np.concatenate([left * len(means) + right for left, right, _ in pairs]))
            for pairs in (_search_all(means, spread, threshold), [_search_index(index, means, spread, threshold)])
        )
        recall = float(np.isin(exact, approximate).mean()) if len(exact) else 1.0
    left, right, capped = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return left, right, capped, recall


def _search_all(means: Embeddings, asked: Rows, threshold: float) -> Iterator[Found]:
    """Yield what `_search` returns by comparing groups with all, tile by tile."""
    for start in range(0, len(asked), _TILE[0]):
        own = asked[start : start + _TILE[0]]
        queries, tiles = means[own], []
        for first in range(0, len(means), _TILE[1]):
            others = np.arange(first, min(first + _TILE[1], len(means)))
            tiles.append(_list_passing(own, others, queries @ means[others[0] : others[-1] + 1].T, threshold))
        yield _join(own, tiles)


def _list_passing(
    own: Rows, others: Rows, cosines: Embeddings, threshold: float, handicaps: Points | None = None
) -> tuple[Rows, Rows, Embeddings]:
    """Return the places in `own` (Q,), the others and the cosines of the pairs that pass in a tile (Q, R).

    If most pass, those are the NUM_NEAREST of each row, by cosine less the handicaps.
    """
    cosines[own[:, None] == others] = -np.inf
    flat = np.flatnonzero(cosines >= threshold)
    if len(flat) > NUM_NEAREST * len(own) and len(others) > NUM_NEAREST:
        ranks = -cosines if handicaps is None else handicaps - cosines
        best = np.argpartition(ranks, NUM_NEAREST - 1, axis=1)[:, :NUM_NEAREST]
        flat = (np.arange(len(own))[:, None] * len(others) + best).ravel()
        flat = flat[cosines.ravel()[flat] >= threshold]
    rows, columns = np.divmod(flat, len(others))
    return rows, others[columns], cosines.ravel()[flat]


def _join(own: Rows, tiles: list[tuple[Rows, Rows, Embeddings]]) -> Found:
    """Return the pairs of tiles with the same rows `own`, NUM_NEAREST at most for each, and the rows with as many."""
    rows, others, cosines = (np.concatenate(parts) for parts in zip(*tiles, strict=True))
    order = np.lexsort((-cosines, rows))
    counts = np.bincount(rows, minlength=len(own))
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = order[places < NUM_NEAREST]
    return own[rows[kept]], others[kept], own[counts >= NUM_NEAREST]


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


def _search_index(index: Any, means: Embeddings, own: Rows, threshold: float) -> Found:
    cosines, others = index.search(means[own], NUM_NEAREST + 1)
    rows, columns = np.nonzero((cosines >= threshold) & (others != own[:, None]) & (others >= 0))
    return _join(own, [(rows, others[rows, columns], cosines[rows, columns])])


def _search_places(sums: Sums, asked: Rows, threshold: float, max_distance_m: float) -> Iterator[Found]:
    """Yield what `_search` returns for the groups of one cell of the ground after another."""
    from scipy.spatial import cKDTree
    from scipy.spatial.distance import cdist

    means, centres = sums.means, sums.centres
    assert centres is not None
    tree = cKDTree(centres)
    cells = np.floor(centres[asked] / max_distance_m).astype(np.int64)
    order = np.lexsort(cells.T)
    starts = np.flatnonzero(np.r_[True, np.diff(cells[order], axis=0).any(axis=1)])
    reach = max_distance_m * (1 + 3**0.5 / 2)  # from a cell's centre
    for first, last in zip(starts, np.append(starts[1:], len(order)), strict=True):
        corner = cells[order[first]] * max_distance_m
        near = np.sort(np.asarray(tree.query_ball_point(corner + max_distance_m / 2, reach), np.int64))
        step, others = max(1, _MAX_PRODUCTS // len(near)), means[near]
        for start in range(first, last, step):
            own = asked[order[start : min(start + step, last)]]
            distances = cdist(centres[own], centres[near])
            cosines = means[own] @ others.T
            cosines[distances > max_distance_m] = -np.inf
            # Of copies the nearest: all would choose the same ones.
            yield _join(own, [_list_passing(own, near, cosines, threshold, distances * 1e-9)])
