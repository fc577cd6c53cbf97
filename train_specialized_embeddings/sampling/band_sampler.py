"""Draw batches of whole buildings, each with a banded negative, and tell who is whose positive and negative."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.log import logger
from pipeline.retrieval.features import Features
from pipeline.retrieval.geography import EARTH_RADIUS_M, earth_centred_m, is_position
from train_specialized_embeddings.sampling.neighbor_table import NUM_BANDS, Neighbors

# How often a negative that is not allowed is drawn again: by band, then among all training images.
MAX_TRIES = 20
RANDOM_BAND = NUM_BANDS
# Images in a group at most; a building with more is cut into even groups at random.
MAX_GROUP = 8


@dataclass(frozen=True)
class Groups:
    """Rows of training images, side by side in groups of one building's images."""

    rows: torch.Tensor  # (T,)
    ends: NDArray[np.int64]  # (G,) where each group ends, on the host

    def split(self, size: int) -> list["Groups"]:
        """Cut into parts of whole groups, each of at most `size` images unless a single group has more."""
        parts, group, start = [], 0, 0
        while group < len(self.ends):
            next_group = max(group + 1, int(np.searchsorted(self.ends, start + size, side="right")))
            stop = int(self.ends[next_group - 1])
            parts.append(Groups(self.rows[start:stop], self.ends[group:next_group] - start))
            group, start = next_group, stop
        return parts


class Places(NamedTuple):
    """Rows (R,) with their buildings (R,), panoramas (R,) and points on the unit sphere (R, 3)."""

    rows: torch.Tensor
    buildings: torch.Tensor
    panoramas: torch.Tensor
    points: torch.Tensor


class Batch(NamedTuple):
    """The anchors of a step in groups, then a negative for each group's first image."""

    places: Places  # (T + G,); where no negative was found, the anchor itself
    firsts: torch.Tensor  # (G,) the place of each group's first image
    bands: torch.Tensor  # (G,) of the negatives, RANDOM_BAND where it may be any image
    found: torch.Tensor  # (G,) bool
    is_real: torch.Tensor | None = None  # (T + G,) bool, where the batch is padded


class BandSampler:
    """Draws at random, all of a call at once, from tables on the device.

    A negative is never of the anchor's building, never of its panorama, and never of a target nearer than
    `min_negative_distance_m` to the anchor's: two targets can be on one wall. Its band is drawn uniformly from the
    anchor's bands that are not empty, or by a given order of preference; then a neighbour of that band, then an image
    of that building. The same seed on the same kind of device draws the same.
    """

    def __init__(
        self, features: Features, neighbors: Neighbors, seed: int, min_negative_distance_m: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        codes = features.building_codes
        sizes = np.bincount(codes)
        self.num_buildings = len(sizes)
        self.buildings, self._sizes = self._load(codes), self._load(sizes)
        self._order, self._starts = self._load(np.argsort(codes, kind="stable")), self._load(np.cumsum(sizes) - sizes)
        self._panoramas = self._load(features.panorama_codes)
        self._codes, self._first = self._load(neighbors.codes), self._load(neighbors.starts)
        self._ends = self._load(neighbors.ends)
        is_known = is_position(features.target_lat, features.target_lon)
        if not is_known.all():
            logger.warning("%d of %d training images are without a position: they may be negatives whatever their "
                           "distance", (~is_known).sum(), len(is_known))  # fmt: skip
        position = np.where(is_known, [features.target_lat, features.target_lon], np.nan)
        self._points = self._load(earth_centred_m(*position) / EARTH_RADIUS_M)
        # Beyond half the Earth's circumference nothing is far enough.
        angle = min_negative_distance_m / EARTH_RADIUS_M
        self._min_squared = float((2 * np.sin(angle / 2)) ** 2) if angle <= np.pi else np.inf
        self.anchors = self._load(np.flatnonzero(sizes[codes] > 1))  # the images that have a positive
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def _load(self, values: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.require(values, requirements="W")).to(self.device)

    def draw_groups(self, count: int, batch_size: int) -> list[Groups]:
        """Return `count` anchors or a few more, all those of a building or even parts of it, each equally often."""
        passes = [self._shuffle_groups() for _ in range(max(1, -(-count // len(self.anchors))))]
        ends = torch.cat([sizes for _, sizes in passes]).cumsum(0).cpu().numpy()
        ends = ends[: np.searchsorted(ends, count) + 1]
        return Groups(torch.cat([rows for rows, _ in passes])[: int(ends[-1])], ends).split(batch_size)

    def _shuffle_groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all anchors (C,) by group, the groups in random order, and the groups' sizes."""
        buildings = self.buildings[self.anchors].long()
        rank = torch.randperm(len(self._sizes), generator=self.generator, device=self.device)[buildings]
        order = torch.argsort(rank + self._random(len(rank)))
        buildings = buildings[order]
        lines = torch.arange(len(order), device=self.device)
        is_first = torch.ones(len(order), dtype=torch.bool, device=self.device)
        is_first[1:] = buildings[1:] != buildings[:-1]
        place = lines - torch.where(is_first, lines, 0).cummax(0).values  # within the building
        sizes = self._sizes[buildings]
        part = place * -(-sizes // MAX_GROUP) // sizes
        is_first[1:] |= part[1:] != part[:-1]
        starts = is_first.nonzero()[:, 0]
        return self.anchors[order], torch.diff(starts, append=starts.new_tensor([len(order)]))

    def add_negatives(self, parts: Sequence[Groups], preference: torch.Tensor | None = None) -> list[Batch]:
        """Return a batch for each part, with a negative for the first image of each of its groups.

        `preference` (P, NUM_BANDS) holds orders of the bands: the groups are cut into P shares, and each share takes
        the first band of its order that is not empty.
        """
        starts = [np.append(0, part.ends[:-1]) for part in parts]
        sizes, counts = [len(part.rows) for part in parts], [len(part.ends) for part in parts]
        # One copy to the device a draw: each is a wait.
        firsts, begins = self._load(np.stack([np.concatenate(starts), np.repeat(np.cumsum([0, *sizes[:-1]]), counts)]))
        rows = torch.cat([part.rows for part in parts])
        negatives, bands, found = self._draw_negatives(rows[begins + firsts], preference)
        pairs = zip((part.rows for part in parts), negatives.split(counts), strict=True)
        places = self.place(torch.cat([own for pair in pairs for own in pair]))
        lengths = [size + count for size, count in zip(sizes, counts, strict=True)]
        columns = zip(*(values.split(lengths) for values in places), strict=True)
        groups = zip(*(values.split(counts) for values in (firsts, bands, found)), strict=True)
        return [Batch(Places(*column), *group) for column, group in zip(columns, groups, strict=True)]

    def _draw_negatives(self, anchors: torch.Tensor, preference: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return a negative for each anchor (A,), its band, and whether one was found."""
        negatives, bands = anchors.clone(), torch.full_like(anchors, RANDOM_BAND)
        has_neighbors = self._ends[anchors, -1] > 0
        for by_band in (True, False):
            missing = negatives == anchors
            pending = (missing & has_neighbors if by_band else missing).nonzero()[:, 0]
            for attempt in range(MAX_TRIES):
                if not len(pending):
                    break
                if by_band:
                    # A preferred band may hold nothing that is allowed: half the tries are for the others.
                    order = None
                    if preference is not None and 2 * attempt < MAX_TRIES:
                        order = preference[pending * len(preference) // len(anchors)]
                    images, image_bands = self._draw_by_band(anchors[pending], order)
                else:
                    images = self._below(torch.full_like(pending, len(self.buildings)))
                    image_bands = torch.full_like(pending, RANDOM_BAND)
                allowed = self.allows(anchors[pending], images)
                for values, drawn in ((negatives, images), (bands, image_bands)):
                    values[pending] = torch.where(allowed, drawn, values[pending])
                pending = pending[~allowed]  # the one wait of a try
        return negatives, bands, negatives != anchors

    def allows(self, anchors: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        """Tell whether each image may be the negative of the anchor at its place, (A,) of rows (A,), (A,)."""
        allowed = self.buildings[anchors] != self.buildings[negatives]
        allowed &= self._panoramas[anchors] != self._panoramas[negatives]
        steps = self._points[anchors] - self._points[negatives]
        return allowed & ~(steps.square().sum(dim=-1) < self._min_squared)  # without a position it is not a number

    def place(self, rows: torch.Tensor) -> Places:
        """Return what `compare` has to know of rows (R,)."""
        return Places(rows, self.buildings[rows], self._panoramas[rows], self._points[rows])

    def compare(self, anchors: Places, others: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for all pairs who is another image of the building, and who may be a negative, (A, C)."""
        same = anchors.buildings[:, None] == others.buildings
        allowed = ~same & (anchors.panoramas[:, None] != others.panoramas)
        if self._min_squared:
            # The chord's square by a product: in float64 it is right to a tenth of a millimetre at 25 m.
            allowed &= ~(2.0 - 2.0 * (anchors.points @ others.points.T) < self._min_squared)
        return same & (anchors.rows[:, None] != others.rows), allowed

    def _draw_by_band(self, anchors: torch.Tensor, order: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        ends = self._ends[anchors].long()  # (A, NUM_BANDS)
        sizes = torch.diff(ends, dim=1, prepend=ends.new_zeros(len(ends), 1))
        filled = sizes > 0
        if order is None:
            wanted = self._below(filled.sum(dim=1))
            bands = (filled.cumsum(dim=1) <= wanted[:, None]).sum(dim=1)  # where the count of filled ones is reached
        else:
            first = filled.gather(1, order).byte().argmax(dim=1, keepdim=True)
            bands = order.gather(1, first)[:, 0]
        size = sizes.gather(1, bands[:, None])[:, 0]
        place = ends.gather(1, bands[:, None])[:, 0] - size + self._below(size)
        buildings = self._codes[self._first[anchors] + place].long()
        return self._order[self._starts[buildings] + self._below(self._sizes[buildings])], bands

    def _below(self, limits: torch.Tensor) -> torch.Tensor:
        """Return a random integer 0 <= r < limit for each limit."""
        return (self._random(len(limits)) * limits).long()

    def _random(self, count: int) -> torch.Tensor:
        return torch.rand(count, generator=self.generator, device=self.device, dtype=torch.float64)
