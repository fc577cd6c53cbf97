"""Draw triplets on the device: an anchor, a positive of its building, and a negative by difficulty band."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.retrieval.features import Features
from pipeline.retrieval.geography import EARTH_RADIUS_M
from train_specialized_embeddings.sampling.triplets import NUM_BANDS, Neighbors, group_by_building

# How often a negative that is not allowed is drawn anew: by band, then among all training images.
MAX_TRIES = 20
RANDOM_BAND = NUM_BANDS
# Images of one building that share their negatives at most; a building with more is cut into even groups at random.
MAX_GROUP = 8


@dataclass(frozen=True)
class Anchors:
    """Rows of training images, in groups of one building's images that lie in one piece; alone, a group of one."""

    rows: torch.Tensor  # (T,)
    starts: torch.Tensor  # (T,) where each one's group begins
    sizes: torch.Tensor  # (T,) how many it has
    ends: NDArray[np.int64]  # (G,) of the groups, on the host

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def firsts(self) -> NDArray[np.int64]:
        """The place of the first of each group, (G,), on the host."""
        return np.concatenate([[0], self.ends[:-1]]) if len(self.ends) else self.ends

    def plan_batches(self, batch_size: int) -> list[int]:
        """Return the edges of batches of whole groups, `batch_size` anchors at most unless a group alone has more."""
        edges = [0]
        while edges[-1] < len(self):
            fitting = int(np.searchsorted(self.ends, edges[-1] + batch_size, side="right")) - 1
            following = int(np.searchsorted(self.ends, edges[-1], side="right"))
            edges.append(int(self.ends[max(fitting, following)]))
        return edges

    def cut(self, first: int, last: int) -> "Anchors":
        """Return anchors first ... last - 1, which begin and end with a group."""
        groups = slice(*np.searchsorted(self.ends, [first, last], side="right"))
        return Anchors(
            self.rows[first:last], self.starts[first:last] - first, self.sizes[first:last], self.ends[groups] - first
        )


@dataclass(frozen=True)
class Triplets:
    """Rows of the training images; where no negative was `found`, the anchor stands in for it."""

    anchors: Anchors
    positives: torch.Tensor  # (T,)
    negatives: torch.Tensor  # (T,)
    bands: torch.Tensor  # (T,) of the negative, RANDOM_BAND where it may be any image
    found: torch.Tensor  # (T,) bool

    def __len__(self) -> int:
        return len(self.anchors)

    def cut(self, first: int, last: int) -> "Triplets":
        """Return triplets first ... last - 1."""
        part = slice(first, last)
        return Triplets(
            self.anchors.cut(first, last), self.positives[part], self.negatives[part], self.bands[part],
            self.found[part],
        )  # fmt: skip


class BandSampler:
    """Draws triplets at random, all of a call at once, from tables on the device.

    A negative is never of the anchor's building, never of its panorama, and never of a target nearer than
    `min_negative_distance_m` to the anchor's: two targets can be on one wall. Its band is drawn uniformly from the
    anchor's bands that are not empty, or by a given order of preference; then a neighbour of that band, then an image
    of that building. The same seed on the same kind of device draws the same.
    """

    def __init__(  # noqa: PLR0917
        self,
        features: Features,
        neighbors: Neighbors,
        seed: int,
        min_negative_distance_m: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        grouping = group_by_building(features.building_codes)
        self._buildings, self._order = self._load(features.building_codes), self._load(grouping.order)
        self.num_buildings = len(grouping.sizes)
        self._starts, self._sizes = self._load(grouping.starts[:-1]), self._load(grouping.sizes)
        self._place = self._load(grouping.place)
        self._panoramas = self._load(_number_panoramas(features))
        self._codes, self._first = self._load(neighbors.codes), self._load(neighbors.starts)
        self._ends = self._load(neighbors.ends)
        self._points = None
        if min_negative_distance_m > 0:
            self._points = self._load(_place_on_sphere(features.target_lat, features.target_lon))
        # Beyond half the Earth's circumference nothing is far enough.
        angle = min_negative_distance_m / EARTH_RADIUS_M
        self._min_chord = 2 * np.sin(angle / 2) if angle <= np.pi else np.inf
        self.candidates = self._load(np.flatnonzero(grouping.sizes[features.building_codes] > 1))  # have a positive
        self._generator = torch.Generator(self.device)
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Begin the random numbers anew."""
        self._generator.manual_seed(seed)

    def _load(self, values: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.require(values, requirements="W")).to(self.device)

    @property
    def first_seed(self) -> int:
        """The seed with which the random numbers began."""
        return self._generator.initial_seed()

    @property
    def state(self) -> torch.Tensor:
        """The random state, on the CPU."""
        return self._generator.get_state()

    @state.setter
    def state(self, value: torch.Tensor) -> None:
        self._generator.set_state(value)

    def draw_anchors(self, count: int) -> Anchors:
        """Return `count` images that have a positive, each as often as any other, give or take one."""
        rounds = -(-count // len(self.candidates)) if count else 0
        drawn = [
            self.candidates[torch.randperm(len(self.candidates), generator=self._generator, device=self.device)]
            for _ in range(rounds)
        ]
        rows = torch.cat([self.candidates[:0], *drawn])[:count]
        places = torch.arange(len(rows), device=self.device)
        return Anchors(rows, places, torch.ones_like(places), np.arange(1, len(rows) + 1))

    def draw_groups(self, count: int) -> Anchors:
        """Return `count` images or a few more, all those of a building or even parts of it, as often as any other."""
        passes = [self._shuffle_groups() for _ in range(max(1, -(-count // len(self.candidates))))]
        sizes = torch.cat([sizes for _, sizes in passes])
        ends = sizes.cumsum(0)
        num_groups = int(torch.searchsorted(ends, count)) + 1
        sizes, ends = sizes[:num_groups], ends[:num_groups]
        rows = torch.cat([rows for rows, _ in passes])[: int(sizes.sum())]
        starts = torch.repeat_interleave(ends - sizes, sizes)
        return Anchors(rows, starts, torch.repeat_interleave(sizes, sizes), ends.cpu().numpy())

    def _shuffle_groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all images that have a positive (C,), by group in random order, and the groups' sizes."""
        buildings = self._buildings[self.candidates].long()
        rank = torch.randperm(len(self._sizes), generator=self._generator, device=self.device)[buildings]
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
        return self.candidates[order], torch.diff(starts, append=starts.new_tensor([len(order)]))

    def draw(self, anchors: Anchors, preference: torch.Tensor | None = None) -> Triplets:
        """Return a triplet for each anchor, in order.

        `preference` (P, NUM_BANDS) holds orders of the bands: the anchors are cut into P parts, each of which takes
        the first band of its order that is not empty.
        """
        rows = anchors.rows
        negatives, bands = rows.clone(), torch.full_like(rows, RANDOM_BAND)
        pending = (self._ends[rows, -1] > 0).nonzero()[:, 0]
        for attempt in range(MAX_TRIES):
            if not len(pending):
                break
            # A preferred band may hold nothing that is allowed: half the tries are for the others.
            order = None
            if preference is not None and 2 * attempt < MAX_TRIES:
                order = preference[pending * len(preference) // len(rows)]
            images, drawn_bands = self._draw_by_band(rows[pending], order)
            pending = self._keep(negatives, bands, rows, pending, images, drawn_bands)
        pending = (negatives == rows).nonzero()[:, 0]
        for _ in range(MAX_TRIES):
            if not len(pending):
                break
            images = self._below(torch.full_like(pending, len(self._buildings)))
            pending = self._keep(negatives, bands, rows, pending, images, torch.full_like(pending, RANDOM_BAND))
        return Triplets(anchors, self._draw_positives(rows), negatives, bands, negatives != rows)

    def share_building(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Whether images are of one building; rows of equal shape."""
        return self._buildings[rows] == self._buildings[others]

    def allows(self, anchors: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        """Whether each image may be the negative of each anchor; rows of equal shape."""
        allowed = self._buildings[anchors] != self._buildings[negatives]
        allowed &= self._panoramas[anchors] != self._panoramas[negatives]
        if self._points is not None:
            steps = self._points[anchors] - self._points[negatives]
            allowed &= steps.square().sum(dim=-1) >= self._min_chord**2
        return allowed

    def compare(self, rows: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return who is another image of whose building, and who may be whose negative, (A, C) of rows (A,), (C,)."""
        same = self._buildings[rows][:, None] == self._buildings[others]
        allowed = ~same & (self._panoramas[rows][:, None] != self._panoramas[others])
        if self._points is not None:
            # The chord's square by a product: in float64 it is right to a tenth of a millimetre at 25 m.
            squares = 2.0 - 2.0 * (self._points[rows] @ self._points[others].T)
            allowed &= squares >= self._min_chord**2
        return same & (rows[:, None] != others), allowed

    def _keep(  # noqa: PLR0917
        self, negatives: torch.Tensor, bands: torch.Tensor, rows: torch.Tensor, pending: torch.Tensor,
        images: torch.Tensor, drawn_bands: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Write what is allowed of the images drawn for the pending anchors; return the anchors that still wait."""
        allowed = self.allows(rows[pending], images)
        negatives[pending[allowed]], bands[pending[allowed]] = images[allowed], drawn_bands[allowed]
        return pending[~allowed]

    def _draw_positives(self, rows: torch.Tensor) -> torch.Tensor:
        """Return another image of each anchor's building: one of the n - 1 others, stepping over the anchor."""
        buildings = self._buildings[rows].long()
        place = self._below(self._sizes[buildings] - 1)
        place += place >= self._place[rows]
        return self._order[self._starts[buildings] + place]

    def _draw_by_band(self, rows: torch.Tensor, order: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        ends = self._ends[rows].long()  # (n, NUM_BANDS)
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
        buildings = self._codes[self._first[rows] + place].long()
        return self._order[self._starts[buildings] + self._below(self._sizes[buildings])], bands

    def _below(self, limits: torch.Tensor) -> torch.Tensor:
        """Return a random integer 0 <= r < limit for each limit."""
        return (self._random(len(limits)) * limits).long()

    def _random(self, count: int) -> torch.Tensor:
        return torch.rand(count, generator=self._generator, device=self.device, dtype=torch.float64)


def _number_panoramas(features: Features) -> NDArray[np.int32]:
    """Return one code for each panorama of each dataset, (N,)."""
    pairs = np.stack([features.dataset_ids, features.street_view_ids], axis=1)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    codes = np.empty(len(pairs), np.int32)
    codes[order] = np.cumsum((np.diff(pairs[order], axis=0, prepend=pairs[order[:1]]) != 0).any(axis=1))
    return codes


def _place_on_sphere(lat: NDArray[np.float64], lon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points of the unit sphere (N, 3) for degrees; chords between them need no trigonometry per triplet."""
    lat, lon = np.radians(lat), np.radians(lon)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
