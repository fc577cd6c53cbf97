"""Principal components of fingerprints, streamed by all cores: the same to the last bit however the rows are cut."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.config import count_cores
from pipeline.threads import map_in_order

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
        with (
            threadpool_limits(1, user_api="blas"),
            closing(map_in_order(lambda blocks: list(map(self.project, blocks)), sources, count_cores())) as projected,
        ):
            return np.concatenate([points for source in projected for points in source])


def fit_pca(sources: Sequence[Iterable[np.ndarray]], width: int, num_components: int) -> Pca:
    """Fit the leading components of fingerprints in one pass over sources of blocks (B, width) uint8, such as files.

    Returns fewer components than asked for where fewer have any variance, but at least one. The largest entry of a
    component is positive.
    """
    from pipeline.retrieval.whitening import decompose  # torch, which a kept table does without

    count, mean, scatter = _sum_scatter(sources, width)
    values, vectors = decompose(scatter / max(count - 1, 1) / 255.0**2)
    values, vectors = values[::-1].clip(min=0.0), vectors[:, ::-1].T  # eigh sorts them ascending
    # Rounding alone gives null directions up to this share of the largest (the rule of numpy's matrix_rank).
    rank = int((values > values[0] * width * np.finfo(np.float64).eps).sum())
    kept = vectors[: max(1, min(num_components, rank))]
    largest = np.take_along_axis(kept, np.abs(kept).argmax(axis=1)[:, None], axis=1)
    components = np.rint(kept * np.sign(largest) * _COMPONENT_GRID) / _COMPONENT_GRID
    return Pca(np.rint(mean * _MEAN_GRID) / _MEAN_GRID, components)


def _sum_scatter(sources: Sequence[Iterable[np.ndarray]], width: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the count, the mean (D,) and the centred scatter matrix (D, D), summing up each source on a core."""

    def sum_up(blocks: Iterable[np.ndarray]) -> tuple[int, np.ndarray, np.ndarray]:
        count, sums, products = 0, np.zeros(width), np.zeros((width, width))
        for block in blocks:
            for start in range(0, len(block), _EXACT_ROWS):
                rows = block[start : start + _EXACT_ROWS].astype(np.float32) - _CENTRE
                products += rows.T @ rows  # one array twice: NumPy computes half of what is symmetric
                sums += rows.sum(axis=0)
                count += len(rows)
        return count, sums, products

    count, sums, products = sum_up([])
    num_workers = min(count_cores(), max(1, _MATRIX_BYTES // (12 * width * width)), max(1, len(sources)))
    # The cores that a few sources, or wide ones, leave idle help in the products.
    with (
        threadpool_limits(max(1, count_cores() // num_workers), user_api="blas"),
        closing(map_in_order(sum_up, sources, num_workers, num_workers)) as parts,
    ):
        for part_count, part_sums, part_products in parts:
            count, sums = count + part_count, sums + part_sums
            products += part_products
    shift = sums / max(count, 1)
    return count, shift + _CENTRE, products - np.outer(sums, shift)
