"""Draw triplets: an anchor, a positive of its building, and a negative by difficulty band."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.features import Features
from pipeline.geography import distances_m
from train_specialized_embeddings.triplets import NUM_BANDS, Grouping, Neighbors, Rows, group_by_building

# How often a negative that is not allowed is drawn anew: by band, then among all training images.
MAX_TRIES = 20
RANDOM_BAND = -1


@dataclass(frozen=True)
class Triplets:
    """Rows of the training features; `bands` says where the negative comes from, RANDOM_BAND for any image."""

    anchors: Rows  # (T,)
    positives: Rows  # (T,)
    negatives: Rows  # (T,)
    bands: NDArray[np.int64]  # (T,)

    def __len__(self) -> int:
        return len(self.anchors)


class BandSampler:
    """Draws triplets at random, all of a call at once.

    A negative is never of the anchor's building, never of its panorama, and never of a target nearer than
    `min_negative_distance_m` to the anchor's: two targets can be on one wall. Its band is drawn uniformly from the
    anchor's bands that are not empty, then a neighbour of that band, then an image of that building.
    """

    def __init__(
        self, features: Features, neighbors: Neighbors, seed: int, min_negative_distance_m: float = 0.0
    ) -> None:
        self.features, self.neighbors = features, neighbors
        self.min_negative_distance_m = min_negative_distance_m
        self.grouping: Grouping = group_by_building(features.building_codes)
        sizes = self.grouping.sizes
        self.candidates: Rows = np.flatnonzero(sizes[features.building_codes] > 1)  # images that have a positive
        self._generator = np.random.Generator(np.random.PCG64(seed))

    @property
    def state(self) -> dict[str, Any]:
        """The random state, in plain values."""
        return dict(self._generator.bit_generator.state)

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self._generator.bit_generator.state = value

    def draw_anchors(self, count: int) -> Rows:
        """Return `count` images that have a positive, each as often as any other, give or take one."""
        rounds = -(-count // len(self.candidates))
        drawn = [self._generator.permutation(self.candidates) for _ in range(rounds)]
        return np.concatenate([np.empty(0, np.int64), *drawn])[:count]

    def draw(self, anchors: Rows) -> Triplets:
        """Return a triplet for each anchor, in order; one for which no negative is found is left out."""
        positives = self._draw_positives(anchors)
        negatives = np.full(len(anchors), -1, np.int64)
        bands = np.full(len(anchors), RANDOM_BAND, np.int64)
        self._fill(negatives, bands, anchors, by_band=True)
        self._fill(negatives, bands, anchors, by_band=False)
        found = negatives >= 0
        return Triplets(anchors[found], positives[found], negatives[found], bands[found])

    def allows(self, anchors: Rows, negatives: Rows) -> NDArray[np.bool_]:
        """Whether each image may be the negative of each anchor, (n,)."""
        data = self.features
        allowed: NDArray[np.bool_] = data.building_codes[anchors] != data.building_codes[negatives]
        allowed &= (data.street_view_ids[anchors] != data.street_view_ids[negatives]) | (
            data.dataset_ids[anchors] != data.dataset_ids[negatives]
        )
        if self.min_negative_distance_m > 0:
            distances = distances_m(
                data.target_lat[anchors], data.target_lon[anchors],
                data.target_lat[negatives], data.target_lon[negatives],
            )  # fmt: skip
            allowed &= distances >= self.min_negative_distance_m
        return allowed

    def _draw_positives(self, anchors: Rows) -> Rows:
        """Return another image of each anchor's building: one of the n - 1 others, stepping over the anchor."""
        codes = self.features.building_codes[anchors]
        place = self._below(self.grouping.sizes[codes] - 1)
        place += place >= self.grouping.place[anchors]
        positives: Rows = self.grouping.order[self.grouping.starts[codes] + place]
        return positives

    def _fill(self, negatives: Rows, bands: Rows, anchors: Rows, *, by_band: bool) -> None:
        """Draw for the anchors that have no negative yet, again where what was drawn is not allowed."""
        pending = np.flatnonzero(negatives < 0)
        if by_band:
            pending = pending[self.neighbors.ends[anchors[pending], -1] > 0]
        for _ in range(MAX_TRIES):
            if len(pending) == 0:
                return
            waiting = anchors[pending]
            drawn, drawn_bands = self._draw_by_band(waiting) if by_band else self._draw_any(waiting)
            allowed = self.allows(waiting, drawn)
            negatives[pending[allowed]], bands[pending[allowed]] = drawn[allowed], drawn_bands[allowed]
            pending = pending[~allowed]

    def _draw_by_band(self, anchors: Rows) -> tuple[Rows, Rows]:
        ends = self.neighbors.ends[anchors]  # (n, NUM_BANDS)
        sizes = np.diff(ends, axis=1, prepend=0)
        filled = sizes > 0
        wanted = self._below(filled.sum(axis=1))
        bands = (filled.cumsum(axis=1) <= wanted[:, None]).sum(axis=1)  # the band whose count of filled ones is reached
        lines = np.arange(len(anchors))
        place = ends[lines, bands] - sizes[lines, bands] + self._below(sizes[lines, bands])
        codes = self.neighbors.codes[self.neighbors.starts[anchors] + place]
        images = self.grouping.starts[codes] + self._below(self.grouping.sizes[codes])
        return self.grouping.order[images], bands

    def _draw_any(self, anchors: Rows) -> tuple[Rows, Rows]:
        count = len(anchors)
        return self._generator.integers(len(self.features), size=count), np.full(count, RANDOM_BAND, np.int64)

    def _below(self, limits: NDArray[Any]) -> Rows:
        """Return a random integer 0 <= r < limit for each limit."""
        drawn: Rows = (self._generator.random(len(limits)) * limits).astype(np.int64)
        return drawn


def band_shares(bands: NDArray[np.int64]) -> list[float]:
    """Return the share of triplets of each band, NUM_BANDS numbers, and last that of random negatives."""
    counts = np.bincount(np.where(bands == RANDOM_BAND, NUM_BANDS, bands), minlength=NUM_BANDS + 1)
    return [float(share) for share in counts / max(1, len(bands))]
