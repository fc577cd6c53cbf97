"""Rank every image's positives among all other images, by tiles of a matrix product, on a CPU or a GPU.

Similarities are symmetric: a tile counts for the queries of its rows and for those of its columns, which halves the
products. Only positives that a tile's largest similarity to their query reaches are compared with the tile. Images are
sorted by the size of their building, so that a tile's queries have equally many positives.
"""

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.inference.devices import full_precision, halve_until_it_fits, needing_memory
from pipeline.threads import map_in_order

# Rows and columns of a tile: on a CPU one of 4 MB stays in the cache, on a GPU it takes 1 GiB and its mask a quarter.
# A power of two, from 8 on.
BLOCK_ROWS = {"cpu": 1024, "cuda": 16_384}
# Numbers of the embeddings copied to the device at a time.
_COPIED_NUMBERS = 2**26
# Zeros and ones that are added up in one byte each.
_LANE_SUMS = 128
_NO_RANK = 2**62
# Similarities nearer than this are a tie: equal vectors differ by a few 1e-7 with the order in which a matrix
# product adds up, so an exact comparison would break ties by chance.
TIE_TOLERANCE = 1e-6
# Above this share of a tile's positives all of them are compared, which takes no copy.
_MOST_BUSY = 0.2
# A block is multiplied by the rows of its buildings in so many parts, of at least so many rows.
_PARTS, _LEAST_PART = 16, 64

Codes = NDArray[np.int64]
# The rows that have a positive (Q,), the nearest one's rank, and the average precision.
Ranked = tuple[Codes, Codes, NDArray[np.float64]]


def rank_positives(
    embeddings: NDArray[np.float32],
    building_codes: Codes,
    ignored: Codes,
    panorama_codes: Codes,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> list[Ranked]:
    """Let each of the L2-normalised rows (N, D) query all others, and rank the rows of its building (N,).

    Buildings that `ignored` (M, 2), in both directions, pairs with the query's are no candidates. The second result
    leaves out the candidates of the query's own panorama (N,), positives too. Products are in float32; a negative that
    ties with a positive counts as nearer. `progress` is called with the number of finished queries.
    Raises DeviceMemoryError where the GPU's memory does not suffice.
    """
    rows = min(BLOCK_ROWS[device.type], max(8, 2 ** (len(embeddings) - 1).bit_length()))
    sizes = np.bincount(building_codes)[building_codes]
    order = np.lexsort((building_codes, sizes))
    codes = building_codes[order]
    firsts = np.flatnonzero(np.diff(codes, prepend=codes[:1] - 1))
    starts = np.repeat(firsts, np.diff(np.append(firsts, len(codes))))

    def move(values: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    def rank(block_rows: int) -> list[Ranked]:
        table = torch.empty((block_rows * -(-len(order) // block_rows), embeddings.shape[1]), device=device)
        table[len(order) :] = 0.0
        step = max(1, _COPIED_NUMBERS // max(1, embeddings.shape[1]))
        for first in range(0, len(order), step):
            part = embeddings[order[first : first + step]]
            table[first : first + len(part)] = move(part)
        labels = move(codes), move(panorama_codes[order])
        images = _Images(table, *labels, move(starts), move(sizes[order]), move(ignored))
        with full_precision():
            return _rank_blocks(images, np.argsort(order), block_rows, progress)

    with needing_memory(
        f"{embeddings.nbytes / 1e9:.1f} GB of embeddings and a tile of their scores",
        "or set [infrastructure].device to cpu",
    ):
        return halve_until_it_fits(rank, rows, 1024, "scores")[1]


@dataclass(frozen=True)
class _Images:
    """All images in the order of the search, on the device."""

    embeddings: torch.Tensor  # (N, D), padded with zeros to whole blocks
    buildings: torch.Tensor  # (N,) codes
    panoramas: torch.Tensor  # (N,) codes
    starts: torch.Tensor  # (N,) the first row of each row's building
    sizes: torch.Tensor  # (N,) the rows of each row's building
    ignored: torch.Tensor  # (M, 2) pairs of buildings


def _rank_blocks(images: _Images, back: Codes, block_rows: int, progress: Callable[[int], None] | None) -> list[Ranked]:
    """Compare each block of rows with itself and the later ones, and return the results in the rows' own order.

    On a CPU each core takes a tile of its own, in one thread.
    """
    device, own, lock = images.embeddings.device, threading.local(), threading.Lock()

    def compare(tile: Tile) -> Tile:
        block, other = tile
        if not hasattr(own, "scores"):  # fresh pages would cost more to fill
            shape = block_rows, block_rows
            own.scores = torch.empty(shape, device=device)
            own.mask = torch.empty(shape, dtype=torch.bool, device=device)
        scores, mask = own.scores, own.mask
        _multiply(block.rows, other.rows, scores)
        scores[:, other.count :] = -torch.inf
        for left_out in block.list_left_out(other):
            scores[left_out] = -torch.inf
        if any([block.add(scores, 1, mask, lock), other is not block and other.add(scores, 0, mask, lock)]):
            rows, columns = other.panoramas.find(block.panoramas.labels)
            similarities = scores[rows, columns]
            block.note_companions(rows, similarities, lock)
            if other is not block:
                other.note_companions(columns, similarities, lock)
        return tile

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        num_workers = 1 if device.type == "cuda" else num_threads
        with threadpool_limits(1, user_api="blas"):
            make = partial(_Block, images, block_rows)
            blocks = list(map_in_order(make, range(0, len(back), block_rows), num_workers))
            tiles = ((block, other) for place, block in enumerate(blocks) for other in blocks[place:])
            with closing(map_in_order(compare, tiles, num_workers)) as compared:
                for block, other in compared:
                    if progress is not None and other is blocks[-1] and block.num_queries:
                        progress(block.num_queries)
    finally:
        torch.set_num_threads(num_threads)
    found = []
    for results in zip(*(block.results() for block in blocks), strict=True):
        has_positive, ranks, precisions = (torch.cat(parts).cpu().numpy()[back] for parts in zip(*results, strict=True))
        queries = np.flatnonzero(has_positive)
        found.append((queries, ranks[queries], precisions[queries]))
    return found


class _Block:
    """Rows that follow one another in the order of the search, with their results as queries."""

    def __init__(self, images: _Images, block_rows: int, first: int) -> None:
        table, sizes = images.embeddings, images.sizes
        self.count = count = min(block_rows, len(sizes) - first)
        own = slice(first, first + count)
        self.rows = table[first : first + block_rows]  # (B, D), padded with zeros
        self._codes = _Labels(images.buildings[own])
        self.panoramas = _Labels(images.panoramas[own])
        self._first_code, self._last_code = int(images.buildings[first]), int(images.buildings[first + count - 1])
        pairs, self._paired_rows = self._codes.find(images.ignored[:, 0].contiguous())
        self._paired_codes = images.ignored[pairs, 1]
        self.num_queries = int((sizes[own] > 1).sum())
        places = images.starts[own, None] + torch.arange(int(sizes[own].max()), device=table.device)  # (count, S)
        numbers = torch.arange(first, first + count, device=table.device)[:, None]
        is_positive = (places < (images.starts + sizes)[own, None]) & (places != numbers)
        step = max(_LEAST_PART, block_rows // _PARTS)
        similarities = torch.cat([
            _multiply_within(part, table, places[start : start + step])
            for start, part in zip(range(0, count, step), self.rows[:count].split(step), strict=True)
        ])  # fmt: skip
        similarities = similarities.masked_fill(~is_positive, -torch.inf)
        nearest, order = similarities.sort(dim=1, descending=True)
        self.valid = nearest[:, :-1].isfinite().T  # (P, count), P the most positives that a query has
        thresholds = (nearest[:, :-1].float() - TIE_TOLERANCE).T.masked_fill(~self.valid, torch.inf)
        self.thresholds = torch.nn.functional.pad(thresholds, (0, block_rows - count), value=torch.inf).contiguous()
        self.nearer = torch.zeros(self.thresholds.shape, dtype=torch.int64, device=table.device)
        self._companions = torch.zeros_like(self.nearer)
        positives = places.gather(1, order)[:, :-1].clamp(max=len(images.panoramas) - 1)
        self._is_apart = self.valid & (images.panoramas[positives] != images.panoramas[own, None]).T

    def list_left_out(self, other: "_Block") -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return rows here and columns there that are no candidates of each other: of one building, or ignored."""
        found = []
        if self is other or self._last_code == other._first_code:
            found.append(other._codes.find(self._codes.labels))
        if len(self._paired_rows):
            pairs, columns = other._codes.find(self._paired_codes)
            found.append((self._paired_rows[pairs], columns))
        return found

    def add(self, scores: torch.Tensor, dim: int, mask: torch.Tensor, lock: threading.Lock) -> bool:
        """Count the candidates nearer than each positive along a dimension of a tile (B, B); return if any may be."""
        if not len(self.thresholds):
            return False
        # Most positives need no comparison: nothing in the tile reaches them.
        asked = (_find_largest(scores, dim) >= self.thresholds).nonzero()  # (A, 2)
        if len(asked) > _MOST_BUSY * self.thresholds.numel():
            for level, thresholds in enumerate(self.thresholds):
                _compare(scores, thresholds[:, None] if dim else thresholds, mask)
                counts = _count(mask, dim)
                with lock:
                    self.nearer[level] += counts
            return True
        for levels, queries in (part.T for part in asked.split(len(mask) // 4) if len(part)):
            few, thresholds = scores.index_select(1 - dim, queries), self.thresholds[levels, queries]
            counts = _count(few >= (thresholds[:, None] if dim else thresholds), dim)
            with lock:
                self.nearer[levels, queries] += counts
        return len(asked) > 0

    def note_companions(self, places: torch.Tensor, similarities: torch.Tensor, lock: threading.Lock) -> None:
        """Count the candidates of the queries' own panoramas: the queries' places (C,) and the similarities (C,)."""
        levels, pairs = (similarities >= self.thresholds[:, places]).nonzero(as_tuple=True)
        with lock:
            self._companions.index_put_((levels, places[pairs]), torch.ones_like(levels), accumulate=True)

    def results(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return what `_score` does for these rows, among all candidates and among those of other panoramas."""
        nearer = self.nearer[:, : self.count]
        return [_score(nearer, self.valid), _score(nearer - self._companions[:, : self.count], self._is_apart)]


Tile = tuple["_Block", "_Block"]


class _Labels:
    """Labels (B,) that can be looked up."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.labels = labels
        self._sorted, self._order = labels.sort(stable=True)

    def find(self, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every place in `wanted` (W,) and place here that hold one label."""
        low, high = (torch.searchsorted(self._sorted, wanted, right=right) for right in (False, True))
        counts = high - low
        places = torch.arange(len(wanted), device=wanted.device).repeat_interleave(counts)
        within = torch.arange(len(places), device=wanted.device) - (counts.cumsum(0) - counts)[places]
        return places, self._order[low[places] + within]


def _multiply(rows: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
    """Compute rows @ others.T; on a CPU by NumPy, whose threads can be limited to one."""
    if out.is_cuda:
        torch.mm(rows, others.T, out=out)
    else:
        np.matmul(rows.numpy(), others.numpy().T, out=out.numpy())


def _compare(scores: torch.Tensor, thresholds: torch.Tensor, out: torch.Tensor) -> None:
    """Compute scores >= thresholds; on a CPU by NumPy, which takes half of torch's time."""
    if out.is_cuda:
        torch.ge(scores, thresholds, out=out)
    else:
        np.greater_equal(scores.numpy(), thresholds.numpy(), out=out.numpy())


def _find_largest(scores: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the largest along a dimension; on a CPU that of each column by NumPy, in a fifth of torch's time."""
    return scores.amax(dim=dim) if dim or scores.is_cuda else torch.from_numpy(scores.numpy().max(axis=0))


def _multiply_within(rows: torch.Tensor, table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the products (R, S), in float64, of adjacent rows with the table's rows at `places` (R, S).

    The places are those of each row's building, whose rows are adjacent; places beyond the table's end give anything.
    """
    low, high = int(places[0, 0]), min(len(table), int(places[-1, -1]) + 1)
    return (rows.double() @ table[low:high].double().T).gather(1, (places - low).clamp(max=high - low - 1))


def _count(mask: torch.Tensor, dim: int) -> torch.Tensor:
    """Count the true values along a dimension of a mask, adding up eight bytes at a time where they allow it."""
    lanes = mask.view(torch.int64 if mask.shape[1] % 8 == 0 else torch.uint8)
    rows, width = lanes.shape
    shape = (rows, width // min(_LANE_SUMS, width), -1) if dim else (-1, min(_LANE_SUMS, rows), width)
    return lanes.view(shape).sum(dim=dim + 1, dtype=lanes.dtype).view(torch.uint8).sum(dim=dim)


def _score(nearer: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return whether each query (B,) has a positive, the nearest one's rank, and the average precision.

    `nearer` (P, B) counts the negatives nearer than each positive, in the order of the positives; only `valid` ones
    count.
    """
    places = valid.cumsum(0)
    ranks = nearer + places
    precisions = (places / ranks.double()).masked_fill(~valid, 0.0).sum(dim=0) / valid.sum(dim=0).clamp(min=1)
    # Ranks ascend, so the least is the nearest's; the padding row defines the minimum without any positive.
    first = torch.nn.functional.pad(ranks.masked_fill(~valid, _NO_RANK), (0, 0, 0, 1), value=_NO_RANK).amin(dim=0)
    return valid.any(dim=0), first, precisions
