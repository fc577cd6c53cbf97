"""Exact search engines: each returns candidates and a proven lower bound on the distance of all other points.

An engine's rounding does not decide which neighbour is nearer: `neighbors` measures the candidates in float64 and asks
for more where the bound does not prove that the k nearest are among them.
"""

from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import pad

from pipeline.inference.devices import full_precision

# One point in so many is a sample, from which a query's threshold is guessed (16: 1.2 x slower).
SAMPLE_STRIDE = 32
# (queries, points) of a tile. On a CPU 256 x 4,096 float32 (4 MB) stays in the cache: 1.7 x faster than 16,384 wide.
CPU_TILE = (256, 4_096)
CUDA_TILE = (8_192, 65_536)
# Candidates held at a time; a very wide search cuts its block of queries.
_MAX_HITS = 1 << 25
# Candidates (Q, m) and what is known of all other points (Q,).
Found = tuple[torch.Tensor, torch.Tensor]


class Engine(Protocol):
    def search(self, queries: torch.Tensor, query_codes: torch.Tensor, num_candidates: int, /) -> Found:
        """Return candidates (Q, m) int64, padded with -1, and bounds (Q,) float64.

        All points of other buildings that are no candidates have squared distances of at least the bound. Candidates
        may be of the query's own building.
        """


class BallTreeEngine:
    """scikit-learn's BallTree, in float64: the reference."""

    def __init__(self, points: torch.Tensor) -> None:
        from sklearn.neighbors import BallTree

        self._points = points.double().numpy()
        self._tree = BallTree(self._points)
        # Rounding of the tree's own bounds, which are differences of distances across the whole cloud.
        self._margin = 1e-12 * float(np.linalg.norm(self._points, axis=1).max(initial=0.0))

    def search(self, queries: torch.Tensor, _query_codes: torch.Tensor, num_candidates: int) -> Found:
        count = min(num_candidates, len(self._points))
        distances, candidates = self._tree.query(queries.double().numpy(), k=count)
        bounds = (distances[:, -1] - self._margin).clip(min=0.0) ** 2
        if count == len(self._points):
            bounds[:] = np.inf
        return torch.from_numpy(candidates.astype(np.int64)), torch.from_numpy(bounds)


class TiledEngine:
    """Tiles of the distance matrix by matrix product, on CPU or CUDA, in float32 or float64.

    Of each tile it keeps the points below a query's threshold, which is guessed from a sample. A guess that is too low
    gives fewer candidates and a lower bound, but never a wrong one.
    """

    def __init__(self, points: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        # (y, |y|²), so that one product with (-2x, 1) gives |x - y|² - |x|², which orders as the distance does.
        norms = points.double().square().sum(dim=1, keepdim=True)
        self._points = torch.cat([points.to(dtype), norms.to(dtype)], dim=1)  # (N, d + 1)
        self._codes = codes
        self._tile = CUDA_TILE if points.is_cuda else CPU_TILE
        self._dtype = dtype
        self._sample = self._points[::SAMPLE_STRIDE].contiguous(), codes[::SAMPLE_STRIDE].contiguous()

    def search(self, queries: torch.Tensor, query_codes: torch.Tensor, num_candidates: int) -> Found:
        # The number of wanted points in the sample, plus four standard deviations.
        expected = num_candidates / SAMPLE_STRIDE
        sample_rank = int(expected + 4 * expected**0.5) + 1
        rows = min(self._tile[0], max(1, _MAX_HITS // (4 * num_candidates)))
        found = []
        # One buffer for all tiles: fresh pages cost a CPU more than the product.
        size = min(rows, len(queries)) * min(self._tile[1], len(self._points))
        buffer = torch.empty(size, dtype=self._dtype, device=queries.device)
        with full_precision():
            for start in range(0, len(queries), rows):
                extended = pad(-2 * queries[start : start + rows].to(self._dtype), (0, 1), value=1.0)  # (-2x, 1)
                codes = query_codes[start : start + rows]
                found.append(self._search_tiles(extended, codes, num_candidates, sample_rank, buffer))
        candidates, limits = (torch.cat(parts) for parts in zip(*found, strict=True))
        squared = limits.double() + queries.double().square().sum(dim=1)
        return candidates, bound_unseen(squared, queries, self._dtype)

    def _search_tiles(
        self,
        queries: torch.Tensor,
        query_codes: torch.Tensor,
        num_candidates: int,
        sample_rank: int,
        buffer: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return candidates (Q, m) below a guessed threshold, and the score that all others reach."""
        thresholds = self._guess_thresholds(queries, query_codes, sample_rank)  # (Q, 1)
        hits = []
        for start in range(0, len(self._points), self._tile[1]):
            tile = slice(start, min(start + self._tile[1], len(self._points)))
            scores = buffer[: len(queries) * (tile.stop - start)].view(len(queries), -1)
            torch.mm(queries, self._points[tile].T, out=scores)
            rows, columns, values = _find_below(scores, thresholds)
            hits.append((rows, columns + start, values))
        rows, columns, values = (torch.cat(parts) for parts in zip(*hits, strict=True))
        values.masked_fill_(self._codes[columns] == query_codes[rows], torch.inf)
        scores, places = _gather_by_row(rows, columns, values, len(queries))
        count = min(num_candidates, scores.shape[1])
        best, order = scores.topk(count, dim=1, largest=False)
        limits = thresholds[:, 0]
        if count == num_candidates:
            limits = torch.minimum(limits, best[:, -1])  # points cut off are no nearer than the last one kept
        found = places.gather(1, order).masked_fill(best.isinf(), -1)
        return pad(found, (0, num_candidates - count), value=-1), limits

    def _guess_thresholds(self, queries: torch.Tensor, query_codes: torch.Tensor, rank: int) -> torch.Tensor:
        """Return the score (Q, 1) of each query's `rank`-th sampled point of another building, inf without so many."""
        points, codes = self._sample
        if rank > len(points):
            return torch.full((len(queries), 1), torch.inf, dtype=self._dtype, device=queries.device)
        scores = queries @ points.T
        scores.masked_fill_(codes[None] == query_codes[:, None], torch.inf)
        return scores.topk(rank, dim=1, largest=False).values[:, -1:]


def bound_unseen(squared: torch.Tensor, queries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a computed squared distance that all unseen points reach into a proven bound on the true one.

    |x|² - 2xy + |y|² computed in `dtype` is off by at most (d + 4) u (|x| + |y|)² in any order of summation, u being
    the unit roundoff (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). An unseen point truly
    nearer than r has |y| < |x| + r, so its true squared distance is at least r² - (d + 4) u (2 |x| + r)².
    """
    roundoff = torch.finfo(dtype).eps / 2
    reach = 2 * queries.double().square().sum(dim=1).sqrt() + squared.clamp(min=0.0).sqrt()
    margin = (queries.shape[1] + 4) * 1.01 * roundoff * reach.square()  # 1.01: terms of second order
    return torch.where(squared.isinf(), squared, (squared - margin).clamp(min=0.0))


def _find_below(scores: torch.Tensor, thresholds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rows, columns and values of the scores (Q, T) below their row's threshold (Q, 1), row by row."""
    if scores.is_cuda:
        rows, columns = (scores < thresholds).nonzero(as_tuple=True)
        return rows, columns, scores[rows, columns]
    # On a CPU numpy finds the few in a large mask ten times faster than torch.
    flat = np.flatnonzero((scores < thresholds).numpy().reshape(-1))
    flat_rows = flat // scores.shape[1]
    flat_columns = flat - flat_rows * scores.shape[1]
    values = scores.numpy().reshape(-1)[flat]
    return torch.from_numpy(flat_rows), torch.from_numpy(flat_columns), torch.from_numpy(values)


def _gather_by_row(
    rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay (row, column, value) triples out as (num_rows, widest) values, padded with inf, and columns, with -1."""
    rows, order = rows.sort(stable=True)
    counts = rows.bincount(minlength=num_rows)
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    widest = max(int(counts.max()), 1)
    laid_values = torch.full((num_rows, widest), torch.inf, dtype=values.dtype, device=values.device)
    laid_columns = torch.full((num_rows, widest), -1, dtype=torch.int64, device=values.device)
    laid_values[rows, places] = values[order]
    laid_columns[rows, places] = columns[order]
    return laid_values, laid_columns
