"""Closed-form linear maps of embeddings: PCA-whitening, and whitening of the covariance within buildings.

All need one pass over the rows and memory for a few D x D numbers; sums are in float64.
Within-class whitening followed by the leading directions between classes is linear discriminant analysis with a
shrunk within-class covariance (Fukunaga, Introduction to Statistical Pattern Recognition, ch. 10; shrinkage toward a
multiple of the identity as in Ledoit and Wolf 2004). Sharpened whitening changes three of its exponents from the
theory's 1 or 0, because the covariance of few buildings is not the true one; docs/measurements.md has them.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.config import count_cores
from pipeline.inference.devices import full_precision
from pipeline.threads import map_in_order

# Numbers of one block in float64: 128 MiB.
_BLOCK_NUMBERS = 2**24
# A CPU multiplies rows this wide in float32, twice as fast, where there are so many per dimension, and adds up products
# of so many rows in float64. An entry of a scatter is then off by at most 3e-6 of its two channels' deviations, an
# eigenvalue by 1e-6 of the largest. With fewer rows float64 has to tell an empty direction from a rare one.
_SINGLE_WIDTH, _SINGLE_ROWS_A_DIMENSION, _SINGLE_ROWS = 256, 4, 2_048
# Threads that read blocks ahead, and blocks they hold.
_READERS = 4
# On real photographs (320 buildings, 5 folds, 2 seeds, Lite0) the mAP of unseen buildings was 0.743, 0.758, 0.774,
# 0.779, 0.780, 0.773, 0.742 at 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9.
DEFAULT_SHRINKAGE = 0.5
# Tried in this order: few buildings want a large one; 2,114 rendered ones have their best mAP at 0.1.
SHRINKAGES = (0.85, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
# Sharpened whitening: features to a power (0.8 tames the few large ones), each channel weighted by a power of its
# variance within buildings, and an exponent beyond the inverse. On the same photographs, 5 seeds x 5 folds, shrinkage
# 0.7: mAP +0.009 over whitening (worst fold -0.001); between halves of the city +0.010 (worst +0.007).
INPUT_POWER, CHANNEL_POWER, EXPONENT = 0.8, 0.4, 1.3
# So few buildings that they want this shrinkage want a larger exponent too: docs/measurements.md.
FEW_SHRINKAGE, FEW_EXPONENT = 0.85, 1.6
# Added share of the mean variance, so that a channel that never varies within a building keeps some weight.
_LEAST_VARIANCE = 1e-3

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
# Rows of whole buildings, one after the other, and the size of each building.
Block = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class LinearMap:
    """An affine map of features raised to a power with their signs kept, whose result is L2-normalised."""

    weight: Float32  # (k, D)
    bias: Float32  # (k,)
    input_power: float = 1.0

    def apply(self, embeddings: NDArray[Any]) -> Float32:
        """Return the mapped rows (N, k), L2-normalised; a row that maps to zero stays zero."""
        mapped = self.map_rows(embeddings)
        mapped /= np.maximum(np.linalg.norm(mapped, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return mapped

    def map_rows(self, embeddings: NDArray[Any], device: torch.device | None = None) -> Float32:
        """Return the mapped rows (N, k) before they are normalised; threads prepare blocks ahead.

        NumPy computes them, or torch on a device: the same up to rounding.
        """
        mapped = np.empty((len(embeddings), len(self.weight)), dtype=np.float32)
        step = max(1, _BLOCK_NUMBERS // max(1, embeddings.shape[1]))

        def read(start: int) -> Any:
            block = embeddings[start : start + step]
            if device is not None:
                return copy_rows(block, pinned=device.type == "cuda")
            rows = np.asarray(block, dtype=np.float32)
            return rows if self.input_power == 1.0 else np.copysign(np.abs(rows) ** self.input_power, rows)

        starts, cores = range(0, len(embeddings), step), count_cores()
        with closing(map_in_order(read, starts, cores, in_flight=max(_READERS, cores))) as blocks:
            for start, rows in zip(starts, blocks, strict=True):
                product = rows @ self.weight.T + self.bias if device is None else self._map_on(device, rows)
                mapped[start : start + step] = product
        return mapped

    def _map_on(self, device: torch.device, rows: torch.Tensor) -> Float32:
        weight, bias = (torch.from_numpy(part).to(device) for part in (self.weight, self.bias))
        moved = _raise(rows.to(device, non_blocking=True).float(), self.input_power)
        with full_precision():
            return np.asarray(torch.addmm(bias, moved, weight.T).cpu().numpy())

    def take_leading(self, count: int) -> "LinearMap":
        return replace(self, weight=self.weight[:count], bias=self.bias[:count])


@dataclass(frozen=True)
class Scatter:
    """The mean of rows, and their covariance in two parts: within buildings and between them."""

    mean: Float64  # (D,)
    within: Float64  # (D, D) of the rows around their building's mean
    between: Float64  # (D, D) of the buildings' means around the mean, each weighted by its rows
    num_rows: int
    num_buildings: int
    input_power: float = 1.0  # the rows were raised to
    device: torch.device | None = None  # decomposes matrices; None is the CPU

    @cached_property
    def within_axes(self) -> tuple[Float64, Float64]:
        """The within-building variances, ascending (D,), and their axes as columns (D, D)."""
        values, vectors = decompose(self.within, self.device)
        return np.maximum(values, 0.0), vectors

    @cached_property
    def between_on_axes(self) -> Float64:
        """The covariance between buildings (D, D), seen along the within-building axes."""
        axes = self.within_axes[1]
        return axes.T @ self.between @ axes

    @cached_property
    def channel_weights(self) -> Float64:
        """The channels' weights (D,) in sharpened whitening: their variances within buildings to a power."""
        variances = np.diag(self.within)
        mean = variances.mean()
        return (variances / mean + _LEAST_VARIANCE) ** (CHANNEL_POWER / 2) if mean > 0 else np.ones_like(variances)

    @cached_property
    def weighted(self) -> "Scatter":
        """The scatter of the rows times `channel_weights`."""
        weights = self.channel_weights
        within, between = (weights[:, None] * matrix * weights for matrix in (self.within, self.between))
        return replace(self, mean=self.mean * weights, within=within, between=between)


def collect_scatters(
    embeddings: NDArray[Any],
    building_codes: NDArray[np.int32],
    input_powers: Sequence[float] = (1.0,),
    device: torch.device | None = None,
) -> list[Scatter]:
    """Sum up rows (N, D) of any float type, raised to each of the powers, in one pass over blocks of whole buildings.

    Rows need not be grouped by building. The device computes the powers in float32 as the projector does (in float64
    for float64 rows), and the sums in float64, to which a CPU may add float32 products of _SINGLE_ROWS rows.
    """
    device = device or torch.device("cpu")
    sums = [_Sums(embeddings, power, device) for power in input_powers]

    def read(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        rows, sizes = block
        # A thread copies ahead, so that the device does not wait.
        return copy_rows(embeddings[rows], pinned=device.type == "cuda"), torch.from_numpy(sizes)

    blocks = _building_blocks(building_codes, max(1, _BLOCK_NUMBERS // embeddings.shape[1]))
    with closing(map_in_order(read, blocks, _READERS, in_flight=_READERS)) as parts:
        for rows, sizes in parts:
            moved, moved_sizes = rows.to(device, non_blocking=True), sizes.to(device)
            for each in sums:
                each.add(moved, moved_sizes)
    num_buildings = len(np.unique(building_codes))
    return [each.finish(len(embeddings), num_buildings) for each in sums]


def copy_rows(values: NDArray[Any], *, pinned: bool) -> torch.Tensor:
    """Return a copy of rows in memory that a GPU can copy from without a wait, if `pinned`."""
    copied = torch.empty(values.shape, dtype=torch.from_numpy(np.empty(0, values.dtype)).dtype, pin_memory=pinned)
    np.copyto(copied.numpy(), values)
    return copied


class _Sums:
    """The sums of `collect_scatters` for one power, on the device."""

    def __init__(self, embeddings: NDArray[Any], power: float, device: torch.device) -> None:
        width = embeddings.shape[1]
        self._power, self._device = power, device
        is_wide = width >= _SINGLE_WIDTH and len(embeddings) >= _SINGLE_ROWS_A_DIMENSION * width
        is_single = is_wide and embeddings.dtype != np.float64 and device.type == "cpu"
        self._dtype = torch.float32 if is_single else torch.float64
        self._within = torch.zeros((width, width), dtype=torch.float64, device=device)
        self._between, self._total = torch.zeros_like(self._within), torch.zeros_like(self._within[0])
        # Sums of squares around a fixed point near the data lose no digits to a large mean.
        first = torch.from_numpy(np.array(embeddings[: min(len(embeddings), 256)])).to(device)
        self._origin = _raise(first, power).double().mean(dim=0).to(self._dtype)

    def add(self, rows: torch.Tensor, sizes: torch.Tensor) -> None:
        """Add rows (B, D) of whole buildings, one after the other, of these sizes."""
        block = _raise(rows, self._power) - self._origin
        means = torch.segment_reduce(block, "mean", lengths=sizes, axis=0, unsafe=True)
        self._total += sizes.double() @ means.double()
        block -= means.repeat_interleave(sizes, dim=0, output_size=len(block))
        _add_gram(self._within, block)
        _add_gram(self._between, means.mul_(sizes.to(self._dtype).sqrt()[:, None]))

    def finish(self, num_rows: int, num_buildings: int) -> Scatter:
        """Return the scatter of all rows added."""
        mean, within, between, origin = (
            values.cpu().numpy() for values in (self._total, self._within, self._between, self._origin)
        )
        for total in (mean, within, between):
            np.divide(total, num_rows, out=total)
        between -= np.outer(mean, mean)
        return Scatter(mean + origin, within, between, num_rows, num_buildings, self._power, self._device)


def _raise(rows: torch.Tensor, power: float) -> torch.Tensor:
    """Return rows of any float type, raised to a power with their signs kept."""
    if power == 1.0:
        return rows
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows.abs().pow_(power).copysign_(rows)


def _add_gram(matrix: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows.T @ rows to a matrix (D, D) of float64, float32 rows part by part."""
    if matrix.is_cuda:
        matrix.addmm_(rows.T, rows)
        return
    values, total = rows.numpy(), matrix.numpy()
    step = len(values) if values.dtype == np.float64 else _SINGLE_ROWS
    for start in range(0, len(values), step):
        part = values[start : start + step]
        total += part.T @ part  # one array twice: NumPy computes half of what is symmetric


def _building_blocks(codes: NDArray[np.int32], block_rows: int) -> Iterator[Block]:
    """Yield the rows of whole buildings, about `block_rows` at a time."""
    order = np.argsort(codes, kind="stable")
    edges = np.append(np.flatnonzero(np.diff(codes[order], prepend=-1)), len(order))
    first = 0
    while first < len(edges) - 1:
        last = max(first + 1, int(np.searchsorted(edges, edges[first] + block_rows, side="right")) - 1)
        yield order[edges[first] : edges[last]], np.diff(edges[first : last + 1])
        first = last


def whiten_within_class(
    scatter: Scatter, output_dim: int = 256, shrinkage: float = DEFAULT_SHRINKAGE, exponent: float = 1.0
) -> LinearMap:
    """Return the map that makes the shrunk within-building covariance the identity, then keeps the leading directions.

    The shrunk covariance is (1 - shrinkage) * within + shrinkage * trace(within) / D * identity; the map applies its
    -exponent / 2th power, then keeps the directions in which buildings differ most, padded with rows of zeros to
    `output_dim`. The outputs have mean squared norm 1.
    """
    variances, axes = scatter.within_axes
    level = variances.mean()
    if level <= 0:  # every building's images coincide: nothing to whiten by
        level = max(float(np.trace(scatter.between)) / len(variances), np.finfo(np.float64).tiny)
    # Shrinking toward the identity moves the variances and leaves the axes.
    shrunk = (1 - shrinkage) * variances + shrinkage * level
    # Without shrinkage, fewer rows than dimensions leave directions of no variance, which cannot be whitened.
    root = np.where(shrunk > shrunk.max() * len(shrunk) * np.finfo(np.float64).eps, shrunk, np.inf)
    root = root ** (-exponent / 2)  # (D,)
    spread, directions = decompose(root[:, None] * scatter.between_on_axes * root, scatter.device)
    rank = min(_count_positive(spread), scatter.num_buildings - 1, output_dim)
    kept = (directions[:, ::-1][:, :rank].T * root) @ axes.T  # (rank, D)
    mean_square = float(np.einsum("ij,jk,ik->", kept, scatter.within + scatter.between, kept, optimize=True))
    padded = np.zeros((output_dim, kept.shape[1]))
    padded[:rank] = kept / np.sqrt(mean_square) if mean_square > 0 else kept
    return _as_map(padded, scatter)


def sharpen_whitening(scatter: Scatter, output_dim: int = 256, shrinkage: float = DEFAULT_SHRINKAGE) -> LinearMap:
    """Return sharpened whitening: channels weighted by their variance within buildings, then whitened.

    The exponent is EXPONENT, or FEW_EXPONENT from FEW_SHRINKAGE on. The scatter is of rows raised to INPUT_POWER if
    they are rectified, and of unchanged rows if they are signed.
    """
    exponent = EXPONENT if shrinkage < FEW_SHRINKAGE else FEW_EXPONENT
    fitted = whiten_within_class(scatter.weighted, output_dim, shrinkage, exponent)
    return replace(fitted, weight=(fitted.weight * scatter.channel_weights).astype(np.float32))


def whiten_by_pca(scatter: Scatter, output_dim: int = 256) -> LinearMap:
    """Return the leading min(output_dim, rank) components of all rows, each with variance 1."""
    values, vectors = decompose(scatter.within + scatter.between, scatter.device)
    rank = min(_count_positive(values), scatter.num_rows - 1, output_dim)
    if rank < 1:  # one row, or equal ones: any map will do
        return LinearMap(np.zeros((1, len(values)), np.float32), np.zeros(1, np.float32))
    return _as_map((vectors[:, ::-1][:, :rank] * values[::-1][:rank] ** -0.5).T, scatter)


def decompose(symmetric: Float64, device: torch.device | None = None) -> tuple[Float64, Float64]:
    """Return the eigenvalues (D,) of a symmetric matrix, ascending, and its eigenvectors as columns (D, D).

    On the CPU by one thread: the result is then the same on any number of cores. Several threads that wait for one
    another were ten times as slow on busy cores (1,280 dimensions: 4 s instead of 0.4 s).
    """
    if device is not None and device.type == "cuda":
        found = torch.linalg.eigh(torch.from_numpy(symmetric).to(device))
        return found.eigenvalues.cpu().numpy(), found.eigenvectors.cpu().numpy()
    with threadpool_limits(1, user_api="blas"):
        return np.linalg.eigh(symmetric)


def _count_positive(ascending: Float64) -> int:
    return int((ascending > max(ascending[-1], 0.0) * len(ascending) * np.finfo(np.float64).eps).sum())


def _as_map(rows: Float64, scatter: Scatter) -> LinearMap:
    """Make each row's largest entry positive, as eigenvectors leave the sign open, and centre."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    rows = np.where(largest < 0, -rows, rows)
    bias = (-rows @ scatter.mean).astype(np.float32)
    return LinearMap(rows.astype(np.float32), bias, scatter.input_power)
