"""The GPU's search: half-precision tiles on the tensor cores find all points that can be near, exactly.

Half precision is twice as fast as TF32 with as many bits, and eight times as precise as bfloat16. The distance matrix
is never written: the first kernel notes the groups of points in which one can be near (triton_kernels.py), a second one
measures their points in float32.

Nothing near is missed. Let x be a query, t its squared threshold, X = |x|, and Y = X + sqrt(t), which no point y with
|x - y|² <= t exceeds in norm. Such a point has x.y - |y|²/2 >= (X² - t)/2. Rounding to half precision changes a
coordinate by at most u = 2^-11 of it, or by 2^-25 where it is subnormal: a vector v by e(|v|) = u |v| + 2^-25 sqrt(d).
So the product of the rounded vectors is off by at most X e(Y) + (Y + e(Y)) e(X). Products of halves are exact in
float32; adding d of them is off by at most (d + 8) 2^-21 X Y (1 + u)², eight times what Higham's bound (Accuracy and
Stability of Numerical Algorithms, section 3.1) gives for rounding to nearest, as tensor cores cut aligned terms off at
24 bits or more (Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores, 2021; NVIDIA documents no
bound). |y|²/2 and the last subtraction are in float32: 2^-22 (X + Y)² is more than they can lose. All this is taken
off the limit that scores are compared with (`_score_limits`).

The second kernel's distances are sums of squares, which float32 computes to (d + 3) 2^-24 of them.
"""

from dataclasses import dataclass

import torch
import triton
from torch.nn.functional import pad

from difficulty_metadata.neighbor_search.engines import SAMPLE_STRIDE, Found
from difficulty_metadata.neighbor_search.triton_kernels import measure_groups, note_groups
from pipeline.inference.devices import full_precision

# Points of a tile, and its groups. In the layout of the tensor cores' sums one thread holds a group's points, so that
# their maximum costs no exchange between threads.
TILE_POINTS = 128
TILE_GROUPS = 8
# A sample of at most so many points is searched as a whole.
DENSE_POINTS = 8_192
# Queries of a tile, and how its kernel is compiled: nothing spills, and four blocks of threads fit on a multiprocessor.
TILE_ROWS = 64
KERNEL_OPTIONS = {"num_warps": 4, "num_stages": 4, "maxnreg": 128}
# Groups of one query measured at a time.
GROUPS_AT_ONCE = 8
# Lists have so many times their expected length; a query whose list overflows is searched again.
_LIST_ROOM, _NEAR_ROOM = 2.5, 2.0
_HALF_ROUNDOFF, _HALF_SUBNORMAL = 2.0**-11, 2.0**-25
# The largest coordinate's exponent in half precision, so that few coordinates are subnormal.
_LARGEST_EXPONENT = 8
# Relative room for a float32 sum of up to 64 squared differences: (64 + 3) 2^-24 < 2^-17, and half of it to spare.
_SUM_ROOM = 2.0**-16
# Bytes of lists held at a time.
_MAX_LIST_BYTES = 1 << 31


@dataclass(frozen=True)
class _Level:
    """All points or a sample, padded to whole tiles."""

    points: torch.Tensor  # (M, D) float32, padding at infinity
    codes: torch.Tensor  # (M,) int32, -2 where padding
    halves: torch.Tensor  # (M, D) float16, scaled
    half_norms: torch.Tensor  # (M,) float32, |y|²/2 scaled, by the kernel's columns of a tile


class TritonEngine:
    """Filters tiles by a fused kernel in half precision, and measures what may be near in float32 (see above)."""

    def __init__(self, points: torch.Tensor, codes: torch.Tensor) -> None:
        """Take points (N, d) float32 and their buildings (N,) int32, on a GPU or, interpreted, on a CPU."""
        self._num_dims = points.shape[1]
        self._width = max(16, triton.next_power_of_2(self._num_dims))
        largest = float(points.abs().max())
        self._scale = 2.0 ** (_LARGEST_EXPONENT - torch.tensor(largest).frexp().exponent.item()) if largest else 1.0
        self._levels = [self._make_level(points, codes)]
        while len(points) > DENSE_POINTS or len(self._levels) == 1:
            points, codes = points[::SAMPLE_STRIDE], codes[::SAMPLE_STRIDE]
            self._levels.append(self._make_level(points, codes))

    def _make_level(self, points: torch.Tensor, codes: torch.Tensor) -> _Level:
        missing = -len(points) % TILE_POINTS
        wide = pad(points, (0, self._width - self._num_dims))
        half_norms = pad((points.double() * self._scale).square().sum(dim=1) / 2, (0, missing), value=torch.inf)
        by_column = half_norms.float().view(-1, TILE_GROUPS, TILE_POINTS // TILE_GROUPS).transpose(1, 2)
        return _Level(
            pad(wide, (0, 0, 0, missing), value=torch.inf),
            pad(codes, (0, missing), value=-2),
            pad((wide * self._scale).half(), (0, 0, 0, missing)),
            by_column.reshape(-1).contiguous(),
        )

    def search(self, queries: torch.Tensor, query_codes: torch.Tensor, num_candidates: int) -> Found:
        ranks = [num_candidates]
        for _ in self._levels[1:]:
            expected = ranks[-1] / SAMPLE_STRIDE
            ranks.append(int(expected + 4 * expected**0.5) + 1)  # four standard deviations, as in TiledEngine
        bytes_of_row = 4 * SAMPLE_STRIDE * ranks[1] * (_LIST_ROOM + 2 * _NEAR_ROOM)
        rows = max(1, int(_MAX_LIST_BYTES / bytes_of_row))
        found = [
            self._search_block(queries[start : start + rows], query_codes[start : start + rows], ranks)
            for start in range(0, len(queries), rows)
        ]
        candidates, bounds = (torch.cat(parts) for parts in zip(*found, strict=True))
        return candidates, bounds

    def _search_block(self, queries: torch.Tensor, query_codes: torch.Tensor, ranks: list[int]) -> Found:
        thresholds = self._guess_thresholds(queries, query_codes, ranks)
        near, squared, is_whole = self._collect(0, queries, query_codes, thresholds, ranks[1])
        count = min(ranks[0], near.shape[1])
        best, places = squared.topk(count, dim=1, largest=False)
        candidates = near.gather(1, places).masked_fill(best.isinf(), -1)
        bounds = thresholds.double()
        if count == ranks[0]:
            bounds = torch.minimum(bounds, best[:, -1].double() * (1 - _SUM_ROOM))
        return pad(candidates, (0, ranks[0] - count), value=-1), bounds.masked_fill(~is_whole, 0.0)

    def _guess_thresholds(self, queries: torch.Tensor, query_codes: torch.Tensor, ranks: list[int]) -> torch.Tensor:
        """Return squared distances (Q,) float32 within which about SAMPLE_STRIDE x ranks[1] points lie.

        The smallest sample is searched as a whole, and bounds the search in the next one.
        """
        thresholds = torch.cat([
            _nearest_squared(block, codes, self._levels[-1], ranks[-1])
            for block, codes in zip(queries.split(DENSE_POINTS), query_codes.split(DENSE_POINTS), strict=True)
        ])  # fmt: skip
        for index in range(len(self._levels) - 2, 0, -1):
            _, squared, _ = self._collect(index, queries, query_codes, thresholds, ranks[index + 1])
            rank = min(ranks[index], squared.shape[1])
            thresholds = torch.minimum(thresholds, squared.topk(rank, dim=1, largest=False).values[:, -1])
        return thresholds

    def _collect(
        self, index: int, queries: torch.Tensor, query_codes: torch.Tensor, thresholds: torch.Tensor, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the places (Q, m) in a level of all points within the thresholds, their squared distances, padded
        with inf, and whether the lists held them all (Q,); `rank` is the rank in the next level that was aimed at.
        """
        level, num_queries, device = self._levels[index], len(queries), queries.device
        padding = -num_queries % TILE_ROWS
        can_search = thresholds.isfinite()
        limits = self._score_limits(queries, thresholds).masked_fill(~can_search, torch.inf)
        limits = pad(limits, (0, padding), value=torch.inf)
        padded = torch.cat([queries, queries[-1:].expand(padding, -1)])
        wide = pad(padded, (0, self._width - self._num_dims))
        expected = SAMPLE_STRIDE * rank
        capacity = 16 * -(-int(_LIST_ROOM * expected / TILE_GROUPS) // 16)
        room = 16 * -(-int(_NEAR_ROOM * expected) // 16)
        notes = torch.empty((len(padded), TILE_GROUPS, capacity), dtype=torch.int32, device=device)
        counts = torch.empty((len(padded), TILE_GROUPS), dtype=torch.int32, device=device)
        note_groups[(len(padded) // TILE_ROWS,)](
            (wide * self._scale).half(), limits, level.halves, level.half_norms, len(level.points) // TILE_POINTS,
            notes, counts, self._width, TILE_ROWS, TILE_POINTS, TILE_GROUPS, capacity,
            **(KERNEL_OPTIONS if queries.is_cuda else {}),
        )  # fmt: skip
        near = torch.empty((num_queries, room), dtype=torch.int32, device=device)
        squared = torch.full((num_queries, room), torch.inf, device=device)
        num_near = torch.empty(num_queries, dtype=torch.int32, device=device)
        measure_groups[(num_queries,)](
            wide, query_codes, thresholds * (1 + _SUM_ROOM), level.points, level.codes, notes, counts, near, squared,
            num_near, self._width, TILE_GROUPS, TILE_POINTS // TILE_GROUPS, capacity, room, GROUPS_AT_ONCE,
        )  # fmt: skip
        is_whole = can_search & (counts[:num_queries] <= capacity).all(dim=1) & (num_near <= room)
        most = max(1, min(room, int(num_near.max())))
        return near[:, :most].long().masked_fill(squared[:, :most].isinf(), 0), squared[:, :most], is_whole

    def _score_limits(self, queries: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
        """Return the score (Q,) float32 that every point within the threshold reaches, as derived above."""
        norms = queries.double().square().sum(dim=1).sqrt() * self._scale
        squared = thresholds.double() * self._scale**2
        reaches = norms + squared.sqrt()
        norm_error, reach_error = (
            _HALF_ROUNDOFF * length + _HALF_SUBNORMAL * self._num_dims**0.5 for length in (norms, reaches)
        )
        rounded = norms * reach_error + (reaches + reach_error) * norm_error
        summed = (self._num_dims + 8) * 2.0**-21 * (norms + norm_error) * (reaches + reach_error)
        margins = rounded + summed + 2.0**-22 * (norms + reaches).square()
        limits: torch.Tensor = ((norms.square() - squared) / 2 - margins).float()
        return limits


def _nearest_squared(queries: torch.Tensor, query_codes: torch.Tensor, level: _Level, rank: int) -> torch.Tensor:
    """Return the approximate squared distance (Q,) of each query's `rank`-th point of another building in a level."""
    points = level.points[: int((level.codes != -2).sum()), : queries.shape[1]]
    with full_precision():
        scores = torch.addmm(points.square().sum(dim=1), queries, points.T, alpha=-2)  # (Q, M)
    scores.masked_fill_(level.codes[: len(points)] == query_codes[:, None], torch.inf)
    best: torch.Tensor = scores.topk(min(rank, len(points)), dim=1, largest=False).values[:, -1]
    return (best + queries.square().sum(dim=1)).clamp(min=0.0)
