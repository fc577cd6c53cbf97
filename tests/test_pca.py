import numpy as np
import pytest

from difficulty_metadata.neighbor_search import pca
from difficulty_metadata.neighbor_search.pca import fit_pca


def draw_fingerprints(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Correlated bytes, as neighbouring cells of photographs are."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width)) * np.exp(-np.arange(width) / 6)[:, None]
    return (generator.normal(size=(num_rows, width)) @ mixing * 12 + 128).clip(0, 255).astype(np.uint8)


def cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def test_points_are_those_of_a_singular_value_decomposition() -> None:
    fingerprints = draw_fingerprints(700, 48)
    values = fingerprints / 255.0
    centred = values - values.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2]
    fitted = fit_pca([cut(fingerprints, 300)], 48, 10)
    points = fitted.project(fingerprints)
    assert points.shape == (700, 10)
    assert points.dtype == np.float32
    expected = centred @ directions[:10].T
    expected *= np.sign((expected * points).sum(axis=0))  # the sign of a component is a convention
    # The mean is kept to 1/256 of a grey level, which shifts all points alike.
    assert np.abs((points - points.mean(axis=0)) - (expected - expected.mean(axis=0))).max() < 2e-6


def test_distances_are_those_of_the_unrounded_projection() -> None:
    fingerprints = draw_fingerprints(200, 48)
    points = fit_pca([[fingerprints]], 48, 48).project(fingerprints).astype(np.float64)
    true = np.linalg.norm((fingerprints[:, None] - fingerprints[None].astype(np.float64)) / 255, axis=2)
    assert np.abs(np.linalg.norm(points[:, None] - points[None], axis=2) - true).max() < 1e-5


@pytest.mark.parametrize("size", [1, 7, 256, 257, 5_000])
def test_however_the_rows_are_cut_the_points_are_the_same_bits(size: int) -> None:
    fingerprints = draw_fingerprints(1_000, 30)
    whole = fit_pca([[fingerprints]], 30, 8)
    pieces = fit_pca([cut(half, size) for half in (fingerprints[:430], fingerprints[430:])], 30, 8)
    assert (whole.components == pieces.components).all()
    assert (whole.mean == pieces.mean).all()
    in_pieces = np.concatenate([pieces.project(block) for block in cut(fingerprints, size)])
    assert (whole.project(fingerprints) == in_pieces).all()
    in_sources = pieces.project_all([cut(half, size) for half in (fingerprints[:430], fingerprints[430:])])
    assert (in_sources == in_pieces).all()


def test_the_scatter_of_the_largest_bytes_is_that_of_whole_numbers() -> None:
    fingerprints = np.random.default_rng(3).choice(np.array([0, 1, 254, 255], np.uint8), size=(6_000, 7))
    fingerprints[:, 0] = 255
    count, mean, scatter = pca._sum_scatter([cut(fingerprints[:5_000], 4_000), cut(fingerprints[5_000:], 999)], 7)
    shifted = fingerprints.astype(np.int64) - 128
    sums = shifted.sum(axis=0).astype(np.float64)
    assert count == 6_000
    assert (mean == 128 + sums / 6_000).all()
    assert (scatter == shifted.T @ shifted - np.outer(sums, sums / 6_000)).all()


def test_identical_fingerprints_are_one_point() -> None:
    fingerprints = draw_fingerprints(500, 30)
    fingerprints[100:400] = fingerprints[7]
    points = fit_pca([[fingerprints]], 30, 8).project(fingerprints)
    assert (points[100:400] == points[7]).all()


def test_the_largest_entry_of_a_component_is_positive() -> None:
    components = fit_pca([[draw_fingerprints(500, 30)]], 30, 12).components
    largest = components[np.arange(12), np.abs(components).argmax(axis=1)]
    assert (largest > 0).all()


def test_no_more_components_than_the_fingerprints_vary_in() -> None:
    five_rows = draw_fingerprints(5, 30)
    fitted = fit_pca([[five_rows]], 30, 32)
    assert fitted.components.shape == (4, 30)


@pytest.mark.parametrize("num_rows", [1, 2, 300])
def test_fingerprints_without_any_variance_are_one_point_at_the_origin(num_rows: int) -> None:
    same = np.full((num_rows, 12), 201, dtype=np.uint8)
    fitted = fit_pca([[same]], 12, 5)
    assert (fitted.project(same) == np.zeros((num_rows, 1), dtype=np.float32)).all()
