"""Principal components of fingerprints, streamed, and the same to the last bit however the rows are cut."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.errors import InputError
from pipeline.retrieval.whitening import decompose

# The covariance of this width takes 1.2 GB and minutes; image_size 64 is four times the default.
MAX_WIDTH = 64 * 64 * 3
# Products of bytes are integers up to 255²: float32 adds 256 of them without rounding (255² x 256 < 2^24), and
# float64 any number of such sums (< 2^53). So neither the cut into blocks nor the threads of the BLAS show.
_EXACT_ROWS = 256
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
        projected = fingerprints.astype(np.float64) @ self.components.T
        points: np.ndarray = ((projected - self.components @ self.mean) / 255.0).astype(np.float32)
        return points


def fit_pca(blocks: Iterable[np.ndarray], width: int, num_components: int) -> Pca:
    """Fit the leading components of fingerprints that come in blocks (B, width) uint8, in one pass.

    Where there are fewer components with any variance than asked for, those there are come back, at least one.
    A component's sign is such that its largest entry is positive. Raises InputError if the fingerprints are too wide.
    """
    if width > MAX_WIDTH:
        raise InputError(
            f"fingerprints of {width} values are too wide for the PCA, at most {MAX_WIDTH}: "
            "set [fingerprints].image_size to 64 or less and run stage 4 again"
        )
    count, mean, scatter = _sum_scatter(blocks, width)
    values, vectors = decompose(scatter / max(count - 1, 1) / 255.0**2)
    values, vectors = values[::-1].clip(min=0.0), vectors[:, ::-1].T  # eigh sorts them ascending
    # Rounding alone gives null directions up to this share of the largest (the rule of numpy's matrix_rank).
    rank = int((values > values[0] * width * np.finfo(np.float64).eps).sum())
    kept = vectors[: max(1, min(num_components, rank))]
    largest = np.take_along_axis(kept, np.abs(kept).argmax(axis=1)[:, None], axis=1)
    components = np.rint(kept * np.sign(largest) * _COMPONENT_GRID) / _COMPONENT_GRID
    ratios = values[: len(components)] / (values.sum() or 1.0)
    return Pca(np.rint(mean * _MEAN_GRID) / _MEAN_GRID, components, ratios, rank)


def _sum_scatter(blocks: Iterable[np.ndarray], width: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the count, the mean (D,) and the centred scatter matrix (D, D).

    Sums are of differences from the first row, exact integers, so that identical rows have a scatter of exactly 0.
    """
    count = 0
    first: np.ndarray | None = None
    sums = np.zeros(width)
    products = np.zeros((width, width))
    for block in blocks:
        for start in range(0, len(block), _EXACT_ROWS):
            rows = block[start : start + _EXACT_ROWS].astype(np.float32)
            first = rows[0].copy() if first is None else first
            rows -= first
            sums += rows.sum(axis=0)
            products += rows.T @ rows
            count += len(rows)
    if first is None:
        return 0, np.zeros(width), products
    return count, first + sums / count, products - np.outer(sums, sums / count)
