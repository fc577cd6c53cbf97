"""Find the exact nearest images of other buildings, the same by every engine, with ties broken by row."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import pad

from difficulty_metadata.neighbor_search.engines import BallTreeEngine, Engine, TiledEngine
from pipeline.errors import InputError, one_line
from pipeline.inference.devices import COMPILE_ERRORS, halve_until_it_fits
from pipeline.log import logger
from pipeline.retrieval.geography import distances_m, is_position

# Candidates beyond the neighbours wanted, in place of those of the own building or too near on the ground.
SPARE_CANDIDATES = 32
# How many times more candidates a repeated search asks for.
_GROWTH = 4
# Anchors searched at a time: on a GPU enough to keep every multiprocessor busy.
_BLOCK_ANCHORS = {"cpu": 4_096, "cuda": 65_536}
# The block is halved down to this where a GPU's memory runs out: a tile of float64 then takes 0.5 GB.
LEAST_BLOCK_ANCHORS = 1_024
# The GPU's fused kernel needs so many points; with fewer its preparation costs as much as the tiles.
_MIN_TRITON_POINTS = 65_536
# Wider points would not fit the shared memory of smaller GPUs (99 KiB), four tiles of them at a time.
_MAX_TRITON_DIMS = 64
# Ampere, the oldest architecture that Triton compiles the kernels for.
_TRITON_CAPABILITY = (8, 0)
# Candidates held at a time: cuts repeated searches with very many.
_MAX_CANDIDATES = 1 << 24
# Coordinates of candidates held at a time in float64: 8 MB on a CPU, to stay near the cache.
_MAX_COORDINATES = {"cpu": 1 << 20, "cuda": 1 << 26}


@dataclass(frozen=True)
class PointGroups:
    """Distinct points, in the order of their first rows, and the rows at each.

    Thousands of grey "no imagery" pictures are one point: as one candidate they cannot crowd out others.
    """

    points: np.ndarray  # (U, d) float32
    codes: np.ndarray  # (U,) int32, the building of all rows at the point, -1 where they are of several
    group_of_row: np.ndarray  # (N,) int64
    rows: np.ndarray  # (N,) int64, point by point, ascending within a point
    starts: np.ndarray  # (U + 1,) int64, where a point's rows begin


def group_points(points: np.ndarray, codes: np.ndarray) -> PointGroups:
    """Group the identical rows of `points` (N, d) float32; `codes` (N,) int32 are their buildings."""
    values = np.add(points, 0, dtype=np.float32, order="C")  # -0 becomes 0
    kind = pa.binary(values.itemsize * values.shape[1])
    keys = pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
    group_of_row = keys.dictionary_encode().indices.to_numpy().astype(np.int64)
    rows = np.argsort(group_of_row, kind="stable")
    starts = np.concatenate([[0], np.bincount(group_of_row).cumsum()])
    lowest, highest = (function.reduceat(codes[rows], starts[:-1]) for function in (np.minimum, np.maximum))
    group_codes = np.where(lowest == highest, lowest, -1).astype(np.int32)
    return PointGroups(values[rows[starts[:-1]]], group_codes, group_of_row, rows, starts)


@dataclass(frozen=True)
class Exclusion:
    """Tells which images' targets stand nearer than `within_m` to an anchor's; positions of all rows in degrees (N,).

    Raises InputError where one is none.
    """

    latitudes: np.ndarray
    longitudes: np.ndarray
    within_m: float

    def __post_init__(self) -> None:
        if not is_position(self.latitudes, self.longitudes).all():
            raise InputError(
                "target_lat, target_lon: no position for some images, which [difficulty].exclude_within_m needs: "
                "correct the fingerprint files, or set it to 0"
            )

    def is_near(self, anchors: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return whether rows `others` (A, m) are too near to the rows `anchors` (A,)."""
        own = self.latitudes[anchors][:, None], self.longitudes[anchors][:, None]
        return distances_m(*own, self.latitudes[others], self.longitudes[others]) < self.within_m


class NeighborSearch:
    """Finds, for rows of a table of points, the nearest rows of other buildings."""

    def __init__(
        self,
        points: np.ndarray,
        building_codes: np.ndarray,
        num_neighbors: int,
        backend: str,
        device: torch.device,
        exclusion: Exclusion | None = None,
    ) -> None:
        """Index `points` (N, d) float32 with their buildings (N,) int32; `backend` is as in `[difficulty]`."""
        self.backend = "torch" if backend == "auto" else backend
        self.num_redone = 0
        self._codes = building_codes
        self._num_neighbors = num_neighbors
        self._exclusion = exclusion
        self._groups = group_points(points, building_codes)
        self.device = device if self.backend == "torch" else torch.device("cpu")
        self._block_anchors = _BLOCK_ANCHORS[self.device.type]
        self._points = torch.from_numpy(self._groups.points).to(self.device)
        self._point_codes = torch.from_numpy(self._groups.codes).to(self.device)
        self._is_shared = torch.from_numpy(np.diff(self._groups.starts) > 1).to(self.device)
        self._first_rows = torch.from_numpy(self._groups.rows[self._groups.starts[:-1]]).to(self.device)
        self._building_sizes = np.bincount(building_codes)
        self._engine = self._make_engine()
        self._float64_engine: Engine | None = None

    def _make_engine(self) -> Engine:
        if self.backend == "balltree":
            return BallTreeEngine(self._points)
        is_gpu = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= _TRITON_CAPABILITY
        if is_gpu and len(self._points) >= _MIN_TRITON_POINTS and self._points.shape[1] <= _MAX_TRITON_DIMS:
            try:
                from triton.errors import TritonError

                from difficulty_metadata.neighbor_search.triton_filter import TritonEngine
            except ImportError:
                logger.info("triton is not installed: the GPU searches by torch's tiles, which is slower")
                return TiledEngine(self._points, self._point_codes)
            engine = TritonEngine(self._points, self._point_codes)
            try:  # its kernels are compiled here, by this machine's compiler and for its driver
                engine.search(self._points[:1], self._point_codes[:1], self._num_neighbors + SPARE_CANDIDATES)
            except (*COMPILE_ERRORS, TritonError, ValueError, TypeError, AttributeError, LookupError) as error:
                logger.warning("torch's tiles search, which is slower: the GPU's kernel: %s", one_line(error)[:1000])
            else:
                return engine
        return TiledEngine(self._points, self._point_codes)

    def find(
        self, anchors: np.ndarray, report: Callable[[int], None] = lambda _: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the neighbours of the rows `anchors` (A,), nearest first, and their Euclidean distances.

        Rows (A, k) int64 are padded with -1, distances (A, k) float32 with inf. `report` is called with the number of
        anchors of each finished block.
        """
        rows = np.empty((len(anchors), self._num_neighbors), dtype=np.int64)
        distances = np.empty(rows.shape, dtype=np.float32)
        done = 0
        while done < len(anchors):
            self._block_anchors, (found, squared) = halve_until_it_fits(
                lambda count: self._find_block(anchors[done : done + count]),  # noqa: B023 (called at once)
                self._block_anchors, LEAST_BLOCK_ANCHORS, "the search",
            )  # fmt: skip
            block = slice(done, done + len(found))
            rows[block], distances[block] = found.cpu().numpy(), squared.sqrt().float().cpu().numpy()
            report(len(found))
            done += len(found)
        return rows, distances

    def _find_block(self, anchors: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Search, and search again in float64 with more candidates until each anchor's answer is proven."""
        num_candidates = self._num_neighbors + SPARE_CANDIDATES
        rows, squared, is_proven = self._search(self._engine, anchors, num_candidates)
        while not is_proven.all():
            num_candidates *= _GROWTH
            # A float32 engine may never prove a dense cluster; float64's margins leave exact ties only.
            self._float64_engine = self._float64_engine or TiledEngine(self._points, self._point_codes, torch.float64)
            step = max(1, _MAX_CANDIDATES // min(num_candidates, len(self._points)))
            for again in (~is_proven).nonzero()[:, 0].split(step):
                self.num_redone += len(again)
                rows[again], squared[again], is_proven[again] = self._search(
                    self._float64_engine, anchors[again.cpu().numpy()], num_candidates
                )
        return rows, squared

    def _search(
        self, engine: Engine, anchors: np.ndarray, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rows (A, k), squared distances (A, k) float64 and whether they are proven to be the nearest (A,)."""
        own_points = torch.from_numpy(self._groups.group_of_row[anchors]).to(self.device)
        own_codes = torch.from_numpy(self._codes[anchors]).to(self.device)
        queries = self._points[own_points]
        candidates, bounds = engine.search(queries, own_codes, num_candidates)
        candidates, _ = candidates.sort(dim=1)  # by first row, so that ties go to the lower one
        squared = measure_squared(self._points, queries, candidates)
        squared.masked_fill_((candidates < 0) | (self._point_codes[candidates] == own_codes[:, None]), torch.inf)
        is_shared = self._is_shared[candidates] & squared.isfinite()
        if self._exclusion is not None:
            too_near = self._exclusion.is_near(anchors, self._first_rows[candidates].cpu().numpy())
            # The rows of a shared point are checked one by one below.
            squared.masked_fill_(torch.from_numpy(too_near).to(self.device) & ~is_shared, torch.inf)
        squared, order = squared.sort(dim=1, stable=True)
        candidates, is_shared = candidates.gather(1, order), is_shared.gather(1, order)
        nearest = squared[:, : self._num_neighbors]
        rows = self._first_rows[candidates[:, : self._num_neighbors]].masked_fill(nearest.isinf(), -1)
        missing = (0, self._num_neighbors - nearest.shape[1])
        rows, nearest = pad(rows, missing, value=-1), pad(nearest, missing, value=torch.inf)
        shared = is_shared[:, : self._num_neighbors].any(dim=1).nonzero()[:, 0]
        points = (values[shared].cpu().numpy() for values in (candidates, squared))
        expanded = [self._expand(*each) for each in zip(anchors[shared.cpu().numpy()], *points, strict=True)]
        if expanded:
            for values, found in zip((rows, nearest), zip(*expanded, strict=True), strict=True):
                values[shared] = torch.from_numpy(np.stack(found)).to(self.device)
        # Strictly nearer than all unseen points: not even a tie can be missing.
        return rows, nearest, (nearest[:, -1] < bounds) | bounds.isinf()

    def _expand(self, anchor: int, candidates: np.ndarray, squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return one anchor's neighbours (k,) and squared distances (k,), with all rows of shared points."""
        k, groups = self._num_neighbors, self._groups
        # A point's first k rows suffice, and as many more as the own building has.
        most = k + int(self._building_sizes[self._codes[anchor]]) if self._exclusion is None else None
        # Padding, which sorts behind all that is found.
        rows, distances = np.full(k, -1), np.full(k, np.inf)
        for point, distance in zip(candidates, squared, strict=True):
            if np.isinf(distance) or distance > distances[k - 1]:
                break
            members = groups.rows[groups.starts[point] : groups.starts[point + 1]][:most]
            members = members[self._codes[members] != self._codes[anchor]]
            if self._exclusion is not None:
                members = members[~self._exclusion.is_near(np.array([anchor]), members[None])[0]]
            rows = np.concatenate([rows, members])
            distances = np.concatenate([distances, np.full(len(members), distance)])
            first = np.lexsort((rows, distances))[:k]
            rows, distances = rows[first], distances[first]
        return rows, distances


def measure_squared(points: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Return the squared distances (Q, m) float64 of queries (Q, d) to candidates (Q, m) among points (N, d).

    Sums squared differences, so that nothing cancels, in one fixed order, so that every engine, device and cut of the
    work gives the same bits.
    """
    step = max(1, _MAX_COORDINATES[points.device.type] // (candidates.shape[1] * points.shape[1]))
    squared = torch.empty(candidates.shape, dtype=torch.float64, device=points.device)
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        terms = (points[candidates[rows]].double() - queries[rows].double()[:, None]).square_()  # (rows, m, d)
        while (width := terms.shape[2]) > 1:
            folded = terms[:, :, : width // 2] + terms[:, :, width // 2 : width // 2 * 2]
            terms = torch.cat([folded, terms[:, :, -1:]], dim=2) if width % 2 else folded
        squared[rows] = terms[:, :, 0]
    return squared
