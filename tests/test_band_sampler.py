"""Triplets by brute force: what may never be drawn is never drawn, and what is drawn is uniform where it should be."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pipeline.features import Features
from pipeline.geography import distances_m
from train_specialized_embeddings.band_sampler import RANDOM_BAND, BandSampler, Triplets, band_shares
from train_specialized_embeddings.triplets import NUM_BANDS, Neighbors


def make_features(num_buildings: int = 12, seed: int = 0) -> Features:
    """Return images of buildings 10 m apart in a row, 1-4 of each, taken from few panoramas of two datasets."""
    generator = np.random.default_rng(seed)
    codes = np.repeat(np.arange(num_buildings), generator.integers(1, 5, num_buildings)).astype(np.int32)
    codes = generator.permutation(codes).astype(np.int32)
    count = len(codes)
    return Features(
        embeddings=np.ones((count, 2), np.float32),
        building_codes=codes,
        building_ids=pa.array([f"b{code}" for code in range(num_buildings)]),
        image_ids=pa.array([f"i{row}" for row in range(count)]),
        dataset_ids=generator.integers(1, 3, count),
        street_view_ids=generator.integers(0, 6, count),
        target_lat=codes * 10 / 111_195.0,
        target_lon=np.zeros(count),
    )


def make_neighbors(features: Features, seed: int = 0) -> Neighbors:
    """Give each image some buildings in each band; some bands, and some images, have none."""
    generator = np.random.default_rng(seed)
    codes: list[int] = []
    starts, ends = [], []
    for own in features.building_codes:
        others = [code for code in range(len(features.building_ids)) if code != own]
        sizes = generator.integers(0, 4, NUM_BANDS) * (generator.random() > 0.1)
        starts.append(len(codes))
        ends.append(np.cumsum(sizes))
        codes += generator.choice(others, int(sizes.sum())).tolist()
    return Neighbors(np.array(codes, np.int32), np.array(starts), np.array(ends, np.int32))


def neighbours_of(neighbors: Neighbors, row: int, band: int) -> set[int]:
    first, bounds = neighbors.starts[row], [0, *neighbors.ends[row]]
    return set(neighbors.codes[first + bounds[band] : first + bounds[band + 1]].tolist())


def draw_many(sampler: BandSampler, count: int = 20_000) -> Triplets:
    return sampler.draw(sampler.draw_anchors(count))


@pytest.mark.parametrize("min_distance_m", [0.0, 25.0])
def test_no_forbidden_triplet_is_ever_drawn(min_distance_m: float) -> None:
    data = make_features()
    neighbors = make_neighbors(data)
    drawn = draw_many(BandSampler(data, neighbors, 1, min_distance_m))
    assert len(drawn) == 20_000
    for anchor, positive, negative, band in set(
        zip(
            *(column.tolist() for column in (drawn.anchors, drawn.positives, drawn.negatives, drawn.bands)), strict=True
        )
    ):
        assert anchor != positive
        assert data.building_codes[anchor] == data.building_codes[positive]
        assert data.building_codes[anchor] != data.building_codes[negative]
        same_panorama = (
            data.dataset_ids[anchor] == data.dataset_ids[negative]
            and data.street_view_ids[anchor] == data.street_view_ids[negative]
        )
        assert not same_panorama
        metres = 10 * abs(int(data.building_codes[anchor]) - int(data.building_codes[negative]))
        assert metres >= min_distance_m
        if band != RANDOM_BAND:
            assert data.building_codes[negative] in neighbours_of(neighbors, anchor, band)


def without_panoramas(data: Features) -> Features:
    return replace(data, street_view_ids=np.arange(len(data)))


def test_bands_are_uniform_over_the_anchors_bands_that_are_not_empty() -> None:
    data = without_panoramas(make_features())
    neighbors = make_neighbors(data)
    sampler = BandSampler(data, neighbors, 2)
    for anchor in sampler.candidates:
        filled = [band for band in range(NUM_BANDS) if neighbours_of(neighbors, anchor, band)]
        drawn = sampler.draw(np.full(7000, anchor))
        shares = Counter(drawn.bands.tolist())
        assert sorted(shares) == (filled or [RANDOM_BAND])
        for count in shares.values():
            expected = 7000 / max(1, len(filled))
            assert abs(count - expected) < 5 * np.sqrt(expected)


def test_negatives_are_uniform_over_a_bands_neighbours_and_then_over_their_images() -> None:
    data = without_panoramas(make_features())
    count = len(data)
    anchor = int(np.flatnonzero(np.bincount(data.building_codes)[data.building_codes] > 1)[0])
    listed = [code for code in range(12) if code != data.building_codes[anchor]][:3]
    ends = np.zeros((count, NUM_BANDS), np.int32)
    ends[:, 3:] = 3
    sampler = BandSampler(data, Neighbors(np.array(listed, np.int32), np.zeros(count, np.int64), ends), 3)
    drawn = sampler.draw(np.full(30_000, anchor))
    assert set(drawn.bands.tolist()) == {3}
    images = np.bincount(data.building_codes)
    for row, times in Counter(drawn.negatives.tolist()).items():
        expected = 30_000 / 3 / images[data.building_codes[row]]
        assert abs(times - expected) < 5 * np.sqrt(expected)
    assert set(data.building_codes[drawn.negatives].tolist()) == set(listed)


def test_positives_are_uniform_over_the_other_images() -> None:
    data = make_features()
    sampler = BandSampler(data, make_neighbors(data), 4)
    for anchor in sampler.candidates[:8]:
        others = [row for row in np.flatnonzero(data.building_codes == data.building_codes[anchor]) if row != anchor]
        times = Counter(sampler.draw(np.full(6000, anchor)).positives.tolist())
        assert sorted(times) == others
        assert all(abs(count - 6000 / len(others)) < 5 * np.sqrt(6000 / len(others)) for count in times.values())


def test_every_image_with_a_positive_is_anchor_equally_often() -> None:
    data = make_features()
    sampler = BandSampler(data, make_neighbors(data), 5)
    pairs = Counter(data.building_codes.tolist())
    expected = [row for row, code in enumerate(data.building_codes.tolist()) if pairs[code] > 1]
    assert sorted(sampler.draw_anchors(len(expected)).tolist()) == expected
    assert set(Counter(sampler.draw_anchors(3 * len(expected) - 1).tolist()).values()) <= {2, 3}
    assert len(sampler.draw_anchors(0)) == 0


def test_an_anchor_whose_neighbours_are_all_forbidden_gets_a_random_negative() -> None:
    data = make_features()
    data = replace(data, dataset_ids=np.where(data.building_codes < 6, 1, 2), street_view_ids=np.zeros(len(data)))
    rows = len(data)
    # Every neighbour listed is of dataset 1, whose images are all of one panorama.
    ends = np.ones((rows, NUM_BANDS), np.int32)
    listed = np.array([1 if code != 1 else 2 for code in data.building_codes], np.int32)
    sampler = BandSampler(data, Neighbors(listed, np.arange(rows), ends), 6)
    anchors = sampler.candidates[data.building_codes[sampler.candidates] < 6]
    drawn = sampler.draw(anchors)
    assert set(drawn.bands.tolist()) == {RANDOM_BAND}
    assert (data.building_codes[drawn.negatives] >= 6).all()


def test_a_triplet_without_any_allowed_negative_is_left_out() -> None:
    data = replace(
        make_features(), dataset_ids=np.ones(len(make_features())), street_view_ids=np.ones(len(make_features()))
    )
    drawn = draw_many(BandSampler(data, make_neighbors(data), 7), 100)
    assert len(drawn) == 0
    assert band_shares(drawn.bands) == [0.0] * (NUM_BANDS + 1)


def test_the_state_repeats_the_draws() -> None:
    data = make_features()
    neighbors = make_neighbors(data)
    sampler = BandSampler(data, neighbors, 8)
    draw_many(sampler, 100)
    state = sampler.state
    first = draw_many(sampler, 500)
    other = BandSampler(data, neighbors, 99)
    other.state = state
    second = draw_many(other, 500)
    for column in ("anchors", "positives", "negatives", "bands"):
        np.testing.assert_array_equal(getattr(first, column), getattr(second, column))


def test_band_shares_count_the_random_negatives_last() -> None:
    shares = band_shares(np.array([0, 0, 6, RANDOM_BAND]))
    assert shares == [0.5, 0, 0, 0, 0, 0, 0.25, 0.25]


def test_the_distance_in_metres_is_that_of_a_great_circle() -> None:
    assert float(distances_m(0, 0, 0, 1)) == pytest.approx(111_195, rel=1e-4)
    assert float(distances_m(52, 0.1, 52, 0.1)) == 0.0
    assert float(distances_m(0, 179.9999, 0, -179.9999)) == pytest.approx(22.24, rel=1e-3)
