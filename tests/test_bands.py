import numpy as np
import pytest

from difficulty_metadata.neighbor_search.bands import (
    assign_bands,
    calibration_ratios,
    compute_band_edges,
    distance_ratios,
)

INF = np.inf


def rows(*lists: list[float]) -> np.ndarray:
    return np.array(lists, dtype=np.float32)


def percentile_by_hand(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_the_local_scale_is_the_distance_to_neighbour_k0() -> None:
    assert distance_ratios(rows([1, 2, 3, 6]), k0=3).tolist() == [[1 / 3, 2 / 3, 1.0, 2.0]]


def test_with_fewer_than_k0_neighbours_the_last_one_sets_the_scale() -> None:
    assert distance_ratios(rows([1, 2, INF, INF]), k0=3).tolist() == [[0.5, 1.0, INF, INF]]


def test_an_image_without_neighbours_has_no_ratio() -> None:
    lonely = rows([INF, INF])
    assert distance_ratios(lonely, k0=1).tolist() == [[INF, INF]]
    assert len(calibration_ratios(lonely, k0=1)) == 0


def test_ratios_are_distances_over_the_local_scale() -> None:
    assert distance_ratios(rows([1, 2, 4, INF]), k0=2).tolist() == [[0.5, 1.0, 2.0, INF]]


def test_where_the_scale_is_zero_a_ratio_is_zero_or_infinite_and_stays_out_of_the_percentiles() -> None:
    distances = rows([0, 0, 3, INF], [1, 2, 4, 8])
    assert distance_ratios(distances, k0=2).tolist() == [[0.0, 0.0, INF, INF], [0.5, 1.0, 2.0, 4.0]]
    assert calibration_ratios(distances, k0=2).tolist() == [0.5, 1.0, 2.0, 4.0]


def test_zero_distances_under_a_positive_scale_do_count() -> None:
    assert calibration_ratios(rows([0, 2]), k0=2).tolist() == [0.0, 1.0]


def test_edges_are_the_six_percentiles_by_linear_interpolation() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=137).tolist()
    expected = [percentile_by_hand(values, percent) for percent in (5, 10, 20, 40, 60, 85)]
    assert compute_band_edges(np.array(values)) == pytest.approx(expected, rel=1e-12)


def test_without_any_ratio_the_edges_are_one_and_duplicates_are_hardest() -> None:
    edges = compute_band_edges(np.empty(0))
    assert edges == [1.0] * 6
    assert assign_bands(np.array([0.0, INF]), edges).tolist() == [0, 6]


def test_a_band_is_the_number_of_edges_at_or_below_the_ratio() -> None:
    edges = [0.5, 0.6, 0.7, 0.8, 1.0, 1.2]
    ratios = [0.0, 0.49, 0.5, 0.65, 1.0, 1.19, 1.2, 5.0, INF]
    by_hand = [sum(edge <= ratio for edge in edges) for ratio in ratios]
    bands = assign_bands(np.array(ratios), edges)
    assert bands.tolist() == by_hand == [0, 0, 1, 2, 5, 5, 6, 6, 6]
    assert bands.dtype == np.int32


def test_equal_edges_are_passed_together() -> None:
    assert assign_bands(np.array([0.0, 0.1]), [0.0, 0.0, 0.0, 1.0, 1.0, 2.0]).tolist() == [3, 3]


def test_of_the_calibration_ratios_each_band_holds_its_share() -> None:
    ratios = np.random.default_rng(1).random(20_000)
    bands = assign_bands(ratios, compute_band_edges(ratios.copy()))
    shares = np.bincount(bands, minlength=7) / len(bands)
    assert shares == pytest.approx([0.05, 0.05, 0.1, 0.2, 0.2, 0.25, 0.15], abs=1e-3)
