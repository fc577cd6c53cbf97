"""Principal components of fingerprints, streamed by all cores: the same to the last bit however the rows are cut."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.config import count_cores
from pipeline.errors import InputError
from pipeline.retrieval.whitening import decompose

Result = TypeVar("Result")

# The covariance of this width takes 1.2 GB and minutes; image_size 64 is four times the default.
MAX_WIDTH = 64 * 64 * 3
# Products of bytes less 128 are integers up to 2^14: float32 adds 1,024 of them without rounding (2^14 x 2^10 = 2^24),
# and float64 any number of such sums (< 2^53). So neither the cut into blocks nor the order of the threads shows.
_CENTRE, _EXACT_ROWS = 128, 1_024
# Rows projected at a time: in float64 they stay in a core's cache.
_PROJECTED_ROWS = 512
# Bytes that the threads may hold in matrices of the width: each has one of float32, and one of float64.
_MATRIX_BYTES = 2 << 30
# Components are rounded to a grid finer than float32 points show, the mean (a mere shift) to 1/256 of a grey level.
# Projections are then sums without rounding (8 + 8 + 26 + 10 bits): identical fingerprints become identical points.
_COMPONENT_GRID = 2.0**26
_MEAN_GRID = 2.0**8


@dataclass(frozen=True)
class Pca:
    """A projection of fingerprints / 255 to their principal components."""

    mean: np.ndarray  # (D,) float64, of bytes, to 1/256 of a grey level
    components: np.ndarray  # (d, D) float64, orthonormal rows, the largest variance first
    explained_variance_ratio: np.ndarray  # (d,) float64
    rank: int  # how many components have any variance

    def project(self, fingerprints: np.ndarray) -> np.ndarray:
        """Return the points (N, d) float32 of the fingerprints (N, D) uint8."""
        points = np.empty((len(fingerprints), len(self.components)), dtype=np.float32)
        shift = self.components @ self.mean
        for start in range(0, len(fingerprints), _PROJECTED_ROWS):
            rows = fingerprints[start : start + _PROJECTED_ROWS].astype(np.float64)
            points[start : start + len(rows)] = (rows @ self.components.T - shift) / 255.0
        return points

    def project_all(self, sources: Sequence[Iterable[np.ndarray]]) -> np.ndarray:
        """Return the points (N, d) float32 of all sources' fingerprints, in their order, each source on a core."""

        def project_source(blocks: Iterable[np.ndarray]) -> list[np.ndarray]:
            return [self.project(block) for block in blocks]

        with threadpool_limits(1, user_api="blas"):
            projected = _map_sources(project_source, sources, count_cores())
        return np.concatenate([points for source in projected for points in source])


def fit_pca(sources: Sequence[Iterable[np.ndarray]], width: int, num_components: int) -> Pca:
    """Fit the leading components of fingerprints in one pass over sources of blocks (B, width) uint8, such as files.

    Where there are fewer components with any variance than asked for, those there are come back, at least one.
    A component's sign is such that its largest entry is positive. Raises InputError if the fingerprints are too wide.
    """
    if width > MAX_WIDTH:
        raise InputError(
            f"fingerprints of {width} values are too wide for the PCA, at most {MAX_WIDTH}: "
            "set [fingerprints].image_size to 64 or less and run stage 4 again"
        )
    count, mean, scatter = _sum_scatter(sources, width)
    values, vectors = decompose(scatter / max(count - 1, 1) / 255.0**2)
    values, vectors = values[::-1].clip(min=0.0), vectors[:, ::-1].T  # eigh sorts them ascending
    # Rounding alone gives null directions up to this share of the largest (the rule of numpy's matrix_rank).
    rank = int((values > values[0] * width * np.finfo(np.float64).eps).sum())
    kept = vectors[: max(1, min(num_components, rank))]
    largest = np.take_along_axis(kept, np.abs(kept).argmax(axis=1)[:, None], axis=1)
    components = np.rint(kept * np.sign(largest) * _COMPONENT_GRID) / _COMPONENT_GRID
    ratios = values[: len(components)] / (values.sum() or 1.0)
    return Pca(np.rint(mean * _MEAN_GRID) / _MEAN_GRID, components, ratios, rank)


def _sum_scatter(sources: Sequence[Iterable[np.ndarray]], width: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the count, the mean (D,) and the centred scatter matrix (D, D), each source summed up by one core.

    Sums are of differences from the first row, exact integers, so that identical rows have a scatter of exactly 0.
    """
    total = _Sums(width)
    num_workers = min(count_cores(), max(1, _MATRIX_BYTES // (12 * width * width)), max(1, len(sources)))
    # The cores that a few sources, or wide ones, leave idle help in the products.
    with threadpool_limits(max(1, count_cores() // num_workers), user_api="blas"):
        firsts = [first for first in _map_sources(total.add, sources, num_workers) if first is not None]
    return total.finish(firsts[0] if firsts else np.zeros(width))


def _map_sources(
    function: Callable[[Iterable[np.ndarray]], Result], sources: Sequence[Iterable[np.ndarray]], num_workers: int
) -> list[Result]:
    """Return `function(source)` for each source, by threads; an interrupt or an error ends all sources at a block."""
    ended = threading.Event()

    def stream(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            if ended.is_set():
                return
            yield block

    with ThreadPoolExecutor(num_workers) as pool:
        try:
            return list(pool.map(function, map(stream, sources)))
        finally:
            ended.set()


class _Sums:
    """Sums of rows less _CENTRE, to which threads add."""

    def __init__(self, width: int) -> None:
        self._count = 0
        self._sums = np.zeros(width)
        self._products = np.zeros((width, width))
        self._lock = threading.Lock()

    def add(self, blocks: Iterable[np.ndarray]) -> np.ndarray | None:
        """Add the rows of blocks (B, D) uint8, and return the first of them."""
        first: np.ndarray | None = None
        count, sums, products = 0, np.zeros_like(self._sums), np.zeros_like(self._products)
        product = np.empty(products.shape, dtype=np.float32)
        for block in blocks:
            for start in range(0, len(block), _EXACT_ROWS):
                rows = block[start : start + _EXACT_ROWS].astype(np.float32)
                first = rows[0].astype(np.float64) if first is None else first
                rows -= _CENTRE
                np.matmul(rows.T, rows, out=product)  # one array twice: NumPy computes half of what is symmetric
                products += product
                sums += rows.sum(axis=0)
                count += len(rows)
        with self._lock:
            self._count += count
            self._sums += sums
            self._products += products
        return first

    def finish(self, origin: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the count, the mean (D,) and the centred scatter (D, D), by way of sums around a row of bytes."""
        if not self._count:
            return 0, np.zeros_like(origin), self._products
        count, shift = self._count, origin - _CENTRE
        products = self._products - np.outer(shift, self._sums) - np.outer(self._sums, shift)
        products += count * np.outer(shift, shift)
        sums = self._sums - count * shift
        return count, origin + sums / count, products - np.outer(sums, sums / count)
