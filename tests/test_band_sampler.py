"""Negatives by brute force: what may never be drawn is never drawn, and what is drawn is uniform where it should be."""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.retrieval.features import Features
from pipeline.retrieval.geography import distances_m
from train_specialized_embeddings.sampling.band_sampler import RANDOM_BAND, BandSampler, Batch, Groups
from train_specialized_embeddings.sampling.neighbor_table import NUM_BANDS, Neighbors


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


def compare(sampler: BandSampler, rows: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sampler.compare(sampler.place(rows), sampler.place(others))


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


class Drawn(NamedTuple):
    anchors: torch.Tensor
    negatives: torch.Tensor
    bands: torch.Tensor
    found: torch.Tensor


def read(batch: Batch) -> Drawn:
    return Drawn(*batch.places.rows.tensor_split([-len(batch.firsts)]), batch.bands, batch.found)


def draw_for(sampler: BandSampler, rows: np.ndarray, preference: list[list[int]] | None = None) -> Drawn:
    """Draw a negative for each of some images, each a group of its own."""
    groups = Groups(torch.from_numpy(rows), np.arange(1, len(rows) + 1))
    [batch] = sampler.add_negatives([groups], None if preference is None else torch.tensor(preference))
    return read(batch)


def draw_many(sampler: BandSampler, count: int = 20_000) -> Drawn:
    return draw_for(sampler, np.resize(sampler.anchors.numpy(), count))


def test_images_without_a_position_may_be_negatives_whatever_the_distance(caplog: pytest.LogCaptureFixture) -> None:
    data = make_features()
    lat, lon = data.target_lat.copy(), data.target_lon.copy()
    lat[[0, 3]], lon[5] = [np.nan, 139.7], np.inf
    neighbors = make_neighbors(data)
    sampler = BandSampler(replace(data, target_lat=lat, target_lon=lon), neighbors, 1, 25.0)
    assert f"3 of {len(data)} training images are without a position" in caplog.text
    rows = torch.arange(len(data))
    free, near = (compare(BandSampler(data, neighbors, 1, meters), rows, rows)[1] for meters in (0.0, 25.0))
    is_unknown = torch.isin(rows, torch.tensor([0, 3, 5]))
    expected = torch.where(is_unknown[:, None] | is_unknown, free, near)
    assert (expected != near).any()
    torch.testing.assert_close(compare(sampler, rows, rows)[1], expected)
    pairs = torch.cartesian_prod(rows, rows)
    torch.testing.assert_close(sampler.allows(*pairs.T).view(len(data), -1), expected)


@pytest.mark.parametrize("min_distance_m", [0.0, 25.0])
def test_no_forbidden_negative_is_ever_drawn(min_distance_m: float) -> None:
    data = make_features()
    neighbors = make_neighbors(data)
    drawn = draw_many(BandSampler(data, neighbors, 1, min_distance_m))
    assert len(drawn.negatives) == 20_000
    assert drawn.found.all()
    columns = (column.tolist() for column in (drawn.anchors, drawn.negatives, drawn.bands))
    for anchor, negative, band in set(zip(*columns, strict=True)):
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
    for anchor in sampler.anchors.tolist():
        filled = [band for band in range(NUM_BANDS) if neighbours_of(neighbors, anchor, band)]
        drawn = draw_for(sampler, np.full(7000, anchor))
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
    drawn = draw_for(sampler, np.full(30_000, anchor))
    assert set(drawn.bands.tolist()) == {3}
    images = np.bincount(data.building_codes)
    for row, times in Counter(drawn.negatives.tolist()).items():
        expected = 30_000 / 3 / images[data.building_codes[row]]
        assert abs(times - expected) < 5 * np.sqrt(expected)
    assert set(data.building_codes[drawn.negatives].tolist()) == set(listed)


def test_an_anchor_whose_neighbours_are_all_forbidden_gets_a_random_negative() -> None:
    data = make_features()
    data = replace(data, dataset_ids=np.where(data.building_codes < 6, 1, 2), street_view_ids=np.zeros(len(data)))
    rows = len(data)
    # Every neighbour listed is of dataset 1, whose images are all of one panorama.
    ends = np.ones((rows, NUM_BANDS), np.int32)
    listed = np.array([1 if code != 1 else 2 for code in data.building_codes], np.int32)
    sampler = BandSampler(data, Neighbors(listed, np.arange(rows), ends), 6)
    candidates = sampler.anchors.numpy()
    drawn = draw_for(sampler, candidates[data.building_codes[candidates] < 6])
    assert drawn.found.all()
    assert set(drawn.bands.tolist()) == {RANDOM_BAND}
    assert (data.building_codes[drawn.negatives] >= 6).all()


def test_an_anchor_without_any_allowed_negative_is_marked() -> None:
    data = make_features()
    ones = np.ones(len(data), np.int64)
    drawn = draw_many(BandSampler(replace(data, dataset_ids=ones, street_view_ids=ones), make_neighbors(data), 7), 100)
    assert len(drawn.negatives) == 100
    assert not drawn.found.any()
    assert drawn.negatives.equal(drawn.anchors)


def test_a_preferred_band_is_taken_where_the_anchor_has_it_and_the_next_one_where_not() -> None:
    data = without_panoramas(make_features())
    neighbors = make_neighbors(data)
    sampler = BandSampler(data, neighbors, 2)
    orders = [[6, 5, 4, 3, 2, 1, 0], [2, 0, 1, 3, 4, 5, 6]]
    for anchor in sampler.anchors.tolist():
        filled = [band for band in range(NUM_BANDS) if neighbours_of(neighbors, anchor, band)]
        drawn = draw_for(sampler, np.full(100, anchor), orders)
        for part, order in enumerate(orders):
            expected = next((band for band in order if band in filled), RANDOM_BAND)
            assert set(drawn.bands[50 * part : 50 * part + 50].tolist()) == {expected}


def test_groups_are_whole_buildings_or_even_parts_of_them_each_image_once() -> None:
    data = make_features()
    codes = np.concatenate([data.building_codes, np.full(19, 12, np.int32)])  # one building of 19 images
    columns = {name: np.arange(len(codes)) for name in ("dataset_ids", "street_view_ids", "target_lat", "target_lon")}
    data = replace(data, embeddings=np.ones((len(codes), 2), np.float32), building_codes=codes, **columns)
    neighbors = Neighbors(np.zeros(0, np.int32), np.zeros(len(codes), np.int64), np.zeros((len(codes), 7), np.int32))
    sampler = BandSampler(data, neighbors, 5)
    [anchors] = sampler.draw_groups(len(sampler.anchors), 1000)
    assert sorted(anchors.rows.tolist()) == sorted(sampler.anchors.tolist())
    sizes: dict[int, list[int]] = {}
    for first, last in zip([0, *anchors.ends[:-1]], anchors.ends, strict=True):
        group = anchors.rows[first:last].numpy()
        assert len(set(codes[group].tolist())) == 1
        sizes.setdefault(int(codes[group[0]]), []).append(len(group))
    for code, found in sizes.items():
        count = int((codes == code).sum())
        assert sorted(found) == ([6, 6, 7] if code == 12 else [count])
    [many] = sampler.draw_groups(3 * len(sampler.anchors), 1000)
    assert set(Counter(many.rows.tolist()).values()) == {3}
    assert 7 <= len(sampler.draw_groups(7, 1000)[0].rows) <= 7 + 7


@pytest.mark.parametrize("batch_size", [1, 5, 10, 100])
def test_batches_are_whole_groups_and_no_larger_than_asked_for(batch_size: int) -> None:
    data = make_features()
    [groups] = BandSampler(data, make_neighbors(data), 5).draw_groups(200, 1000)
    start, ends = 0, set(groups.ends.tolist())
    for part in groups.split(batch_size):
        assert part.ends[-1] == len(part.rows)
        assert len(part.rows) <= batch_size or len(part.ends) == 1
        assert part.rows.equal(groups.rows[start : start + len(part.rows)])
        assert {start + end for end in part.ends.tolist()} <= ends
        start += len(part.rows)
    assert start == len(groups.rows)


def test_each_group_gets_the_negative_of_its_first_image_whatever_the_batches() -> None:
    data = make_features()
    parts = BandSampler(data, make_neighbors(data), 5).draw_groups(60, 10)
    batches, [whole] = (
        BandSampler(data, make_neighbors(data), 6).add_negatives(drawn)
        for drawn in (
            parts,
            [
                Groups(
                    torch.cat([part.rows[np.append(0, part.ends[:-1])] for part in parts]),
                    np.arange(1, 1 + sum(len(part.ends) for part in parts)),
                )
            ],
        )
    )
    for part, batch in zip(parts, batches, strict=True):
        assert read(batch).anchors.equal(part.rows)
        assert (batch.firsts.numpy() == np.append(0, part.ends[:-1])).all()
    assert torch.cat([read(batch).negatives for batch in batches]).equal(read(whole).negatives)


def test_all_pairs_at_once_are_what_each_pair_is() -> None:
    data = make_features(30)
    sampler = BandSampler(data, make_neighbors(data), 3, 15.0)
    rows, others = torch.arange(0, 40, 3), torch.arange(60)
    is_positive, is_negative = compare(sampler, rows, others)
    for i, row in enumerate(rows.tolist()):
        for j, other in enumerate(others.tolist()):
            assert bool(is_negative[i, j]) == bool(sampler.allows(torch.tensor([row]), torch.tensor([other])))
            is_same = data.building_codes[row] == data.building_codes[other]
            assert bool(is_positive[i, j]) == (row != other and is_same)


def test_the_state_repeats_the_draws() -> None:
    data = make_features()
    neighbors = make_neighbors(data)
    sampler = BandSampler(data, neighbors, 8)
    sampler.draw_groups(100, 1000)
    state = sampler.generator.get_state()
    other = BandSampler(data, neighbors, 99)
    other.generator.set_state(state)
    [first], [second] = (each.add_negatives(each.draw_groups(500, 1000)) for each in (sampler, other))
    assert first.places.rows.equal(second.places.rows)
    assert first.bands.equal(second.bands)


def test_the_distance_in_metres_is_that_of_a_great_circle() -> None:
    assert float(distances_m(0, 0, 0, 1)) == pytest.approx(111_195, rel=1e-4)
    assert float(distances_m(52, 0.1, 52, 0.1)) == 0.0
    assert float(distances_m(0, 179.9999, 0, -179.9999)) == pytest.approx(22.24, rel=1e-3)
