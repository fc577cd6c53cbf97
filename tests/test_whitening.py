"""Whitening against the dense textbook formulas, on few rows, many rows and degenerate ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from closed_forms import collect_scatter, fit_pca_whitening, fit_within_class_whitening

from pipeline.retrieval import whitening
from pipeline.retrieval.whitening import (
    LinearMap,
    collect_scatters,
    sharpen_whitening,
    whiten_by_pca,
    whiten_within_class,
)


def make_rows(num_buildings: int, width: int, seed: int = 0, mean: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (N, D) of buildings of 2-5 images, with correlated spread within and between them."""
    generator = np.random.default_rng(seed)
    codes = np.repeat(np.arange(num_buildings), generator.integers(2, 6, num_buildings)).astype(np.int32)
    mixing = generator.standard_normal((width, width)) / np.sqrt(width)
    centres = generator.standard_normal((num_buildings, width)) * np.linspace(2, 0.2, width)
    rows = centres[codes] + generator.standard_normal((len(codes), width)) @ mixing + mean
    return rows.astype(np.float32), codes


def covariances_by_loop(rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add up the covariance within and between buildings row by row."""
    width = rows.shape[1]
    within, between, mean = np.zeros((width, width)), np.zeros((width, width)), rows.astype(float).mean(axis=0)
    for code in np.unique(codes):
        own = rows[codes == code].astype(float)
        for row in own:
            within += np.outer(row - own.mean(axis=0), row - own.mean(axis=0)) / len(rows)
            between += np.outer(own.mean(axis=0) - mean, own.mean(axis=0) - mean) / len(rows)
    return within, between


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("block_numbers", [1, 50, 2**24])
@pytest.mark.parametrize("grouped", [True, False])
def test_scatter_equals_a_loop_over_rows_whatever_the_blocks_and_the_order(
    block_numbers: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whitening, "_BLOCK_NUMBERS", block_numbers)
    rows, codes = make_rows(12, 5)
    if not grouped:
        order = np.random.default_rng(1).permutation(len(rows))
        rows, codes = rows[order], codes[order]
    scatter = collect_scatter(rows, codes)
    within, between = covariances_by_loop(rows, codes)
    np.testing.assert_allclose(scatter.within, within, atol=1e-10)
    np.testing.assert_allclose(scatter.between, between, atol=1e-10)
    np.testing.assert_allclose(scatter.mean, rows.astype(float).mean(axis=0), atol=1e-10)
    np.testing.assert_allclose(scatter.within + scatter.between, np.cov(rows.T, bias=True), atol=1e-6)
    assert (scatter.num_rows, scatter.num_buildings) == (len(rows), 12)


def test_scatter_keeps_its_digits_where_the_mean_dwarfs_the_spread() -> None:
    rows, codes = make_rows(20, 4, mean=0.0)
    rows = np.round(rows * 64) / 64  # exact in float32 beside 4096
    near, far = collect_scatter(rows, codes), collect_scatter(rows + np.float32(4096), codes)
    np.testing.assert_allclose(far.within, near.within, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(far.between, near.between, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_one_pass_sums_up_every_power_of_the_rows(mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "_BLOCK_NUMBERS", 50)
    rows, codes = make_rows(12, 5, mean=mean)
    for power, scatter in zip((1.0, 0.8, 0.5), collect_scatters(rows, codes, (1.0, 0.8, 0.5)), strict=True):
        powered = np.sign(rows) * np.abs(rows).astype(float) ** power
        within, between = covariances_by_loop(powered, codes)
        tolerance = 1e-10 if power == 1.0 else 1e-6  # powers are in float32, as the projector's
        np.testing.assert_allclose(scatter.within, within, atol=tolerance)
        np.testing.assert_allclose(scatter.between, between, atol=tolerance)
        np.testing.assert_allclose(scatter.mean, powered.mean(axis=0), atol=tolerance)
        assert scatter.input_power == power


@pytest.mark.parametrize("power", [1.0, 0.8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_device_maps_rows_as_numpy_does(monkeypatch: pytest.MonkeyPatch, power: float, dtype: type) -> None:
    monkeypatch.setattr(whitening, "_BLOCK_NUMBERS", 70)  # 7 rows
    rows = (make_rows(20, 10)[0] - 3).astype(dtype)
    generator = np.random.default_rng(1)
    linear_map = LinearMap(generator.standard_normal((6, 10)).astype(np.float32), np.arange(6, dtype=np.float32), power)
    found = linear_map.map_rows(rows, torch.device("cpu"))
    np.testing.assert_allclose(found, linear_map.map_rows(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pinned", [True, False])
def test_rows_for_a_gpu_are_written_to_pinned_memory_once(monkeypatch: pytest.MonkeyPatch, pinned: bool) -> None:
    """Pinning memory that is there already would copy it."""
    asked, make = [], torch.empty

    def note(*shape: object, pin_memory: bool, **rest: object) -> torch.Tensor:
        asked.append(pin_memory)
        return make(*shape, **rest)

    monkeypatch.setattr(torch, "empty", note)
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    values = np.arange(12, dtype=np.float16).reshape(3, 4)
    assert whitening.copy_rows(values, pinned=pinned).equal(torch.from_numpy(values))
    assert asked == [pinned]


def test_the_gpus_product_and_numpys_give_the_same_sums() -> None:
    rows, codes = make_rows(300, 40)
    scatter = collect_scatter(rows, codes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    centred = torch.from_numpy(rows).to(device).double()
    centred -= centred.mean(dim=0)
    total = torch.zeros((40, 40), dtype=torch.float64, device=device).addmm_(centred.T, centred) / len(rows)
    np.testing.assert_allclose(scatter.within + scatter.between, total.cpu().numpy(), atol=1e-10)


@pytest.mark.parametrize("is_signed", [True, False])
def test_products_in_float32_give_the_maps_of_products_in_float64(
    is_signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, codes = make_rows(1_500, 64)
    rows = rows if is_signed else np.maximum(rows, 0) * np.geomspace(1e-3, 100, 64, dtype=np.float32)
    exact = collect_scatters(rows, codes, (1.0, 0.8))
    monkeypatch.setattr(whitening, "_SINGLE_WIDTH", 64)
    monkeypatch.setattr(whitening, "_SINGLE_ROWS", 100)
    for quick, slow in zip(collect_scatters(rows, codes, (1.0, 0.8)), exact, strict=True):
        deviations = np.sqrt(np.diag(slow.within + slow.between))
        for own, true in ((quick.within, slow.within), (quick.between, slow.between)):
            error = np.abs(own - true) / np.outer(deviations, deviations)
            assert 0 < error.max() < 3e-6
        for fit in (whiten_within_class, whiten_by_pca):
            mapped = fit(quick, 32).apply(rows), fit(slow, 32).apply(rows)
            assert np.abs(mapped[0] - mapped[1]).max() < 5e-5
    few = rows[: 4 * 64 - 1], codes[: 4 * 64 - 1]
    (quick,) = collect_scatters(*few, (1.0,))
    monkeypatch.setattr(whitening, "_SINGLE_WIDTH", 65)
    assert (quick.within == collect_scatters(*few, (1.0,))[0].within).all()


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_within_class_whitening_solves_the_generalised_eigenproblem(shrinkage: float) -> None:
    rows, codes = make_rows(60, 8)
    fitted = fit_within_class_whitening(rows, codes, output_dim=5, shrinkage=shrinkage)
    within, between = covariances_by_loop(rows, codes)
    shrunk = (1 - shrinkage) * within + shrinkage * np.trace(within) / 8 * np.eye(8)
    weight = fitted.weight.astype(float)
    # Its rows are orthogonal under the whitened covariance, all of one length, and diagonalise what is between.
    gram = weight @ shrunk @ weight.T
    np.testing.assert_allclose(gram, np.eye(5) * gram[0, 0], atol=1e-5 * gram[0, 0])
    values = np.sort(np.linalg.eigvals(np.linalg.solve(shrunk, between)).real)[::-1]
    np.testing.assert_allclose(
        weight @ between @ weight.T, np.diag(values[:5]) * gram[0, 0], atol=1e-4 * values[0] * gram[0, 0]
    )
    np.testing.assert_allclose(fitted.bias, -weight @ rows.mean(axis=0), atol=1e-4)


def test_mapped_training_rows_have_mean_square_norm_one() -> None:
    rows, codes = make_rows(40, 8)
    fitted = fit_within_class_whitening(rows, codes, output_dim=6)
    mapped = rows @ fitted.weight.T + fitted.bias
    assert np.square(mapped).sum(axis=1).mean() == pytest.approx(1.0, abs=1e-4)


def test_pca_whitening_equals_the_eigenvectors_of_the_covariance() -> None:
    rows, _ = make_rows(60, 6)
    fitted = fit_pca_whitening(rows, output_dim=4)
    centred = rows.astype(float) - rows.mean(axis=0)
    mapped = centred @ fitted.weight.T.astype(float)
    np.testing.assert_allclose(np.cov(mapped.T, bias=True), np.eye(4), atol=1e-4)
    values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]
    np.testing.assert_allclose(np.square(fitted.weight).sum(axis=1), 1 / values[:4], rtol=1e-3)
    np.testing.assert_allclose(fitted.apply(rows), unit(mapped), atol=1e-4)


def test_fewer_rows_than_dimensions_give_a_full_width_map_with_zero_rows_at_the_end() -> None:
    rows, codes = make_rows(10, 64)
    fitted = fit_within_class_whitening(rows, codes, output_dim=32)
    used = np.abs(fitted.weight).sum(axis=1) > 0
    assert fitted.weight.shape == (32, 64)
    assert used.tolist() == [True] * 9 + [False] * 23
    assert np.isfinite(fitted.weight).all()
    np.testing.assert_allclose(np.linalg.norm(fitted.apply(rows), axis=1), 1.0, atol=1e-5)


def test_pca_has_no_more_components_than_the_rows_have_rank() -> None:
    rows, _ = make_rows(5, 64)
    assert fit_pca_whitening(rows, 256).weight.shape == (len(rows) - 1, 64)
    doubled = np.concatenate([rows, rows])
    assert fit_pca_whitening(doubled, 256).weight.shape == (len(rows) - 1, 64)


def test_an_output_wider_than_the_input_is_filled_with_zeros() -> None:
    rows, codes = make_rows(40, 6)
    fitted = fit_within_class_whitening(rows, codes, output_dim=16)
    assert fitted.weight.shape == (16, 6)
    assert (fitted.weight[6:] == 0).all()
    assert (fitted.bias[6:] == 0).all()


@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_images_that_coincide_within_every_building_still_give_a_finite_map(shrinkage: float) -> None:
    rows, codes = make_rows(6, 4)
    centres = rows[np.unique(codes, return_index=True)[1]][codes]
    fitted = fit_within_class_whitening(centres, codes, output_dim=4, shrinkage=shrinkage)
    assert np.isfinite(fitted.weight).all()
    assert np.isfinite(fitted.apply(centres)).all()


def test_rows_that_are_all_equal_map_to_zero_and_not_to_nan() -> None:
    rows, codes = np.ones((6, 4), np.float32), np.repeat(np.arange(3), 2).astype(np.int32)
    assert (fit_within_class_whitening(rows, codes, 4).apply(rows) == 0).all()
    assert (fit_pca_whitening(rows, 4).apply(rows) == 0).all()


def test_the_sign_of_every_row_is_fixed_by_its_largest_entry() -> None:
    rows, codes = make_rows(40, 8)
    for fitted in (fit_within_class_whitening(rows, codes, 6), fit_pca_whitening(rows, 6)):
        largest = fitted.weight[np.arange(6), np.abs(fitted.weight).argmax(axis=1)]
        assert (largest > 0).all()
        mirrored = fit_within_class_whitening(rows[::-1].copy(), codes[::-1].copy(), 6)
        assert mirrored.weight.shape == (6, 8)


def test_the_order_of_the_rows_does_not_change_the_map() -> None:
    rows, codes = make_rows(40, 8)
    order = np.random.default_rng(3).permutation(len(rows))
    once = fit_within_class_whitening(rows, codes, 6)
    again = fit_within_class_whitening(rows[order], codes[order], 6)
    np.testing.assert_allclose(again.weight, once.weight, atol=1e-5)


def test_applying_in_blocks_equals_applying_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, codes = make_rows(30, 8)
    fitted = fit_within_class_whitening(rows, codes, 6)
    at_once = fitted.apply(rows)
    monkeypatch.setattr(whitening, "_BLOCK_NUMBERS", 3 * 8)
    np.testing.assert_allclose(fitted.apply(rows), at_once, atol=1e-6)
    np.testing.assert_allclose(at_once, unit(rows @ fitted.weight.T + fitted.bias), atol=1e-6)


def test_a_row_that_maps_to_zero_stays_zero() -> None:
    nothing = LinearMap(np.zeros((2, 3), np.float32), np.zeros(2, np.float32))
    assert (nothing.apply(np.ones((4, 3), np.float32)) == 0).all()


def test_a_shrinkage_grid_reuses_the_scatter_and_equals_fitting_anew() -> None:
    rows, codes = make_rows(30, 8)
    scatter = collect_scatter(rows, codes)
    for shrinkage in (0.2, 0.7):
        fresh = fit_within_class_whitening(rows, codes, 6, shrinkage)
        np.testing.assert_array_equal(whiten_within_class(scatter, 6, shrinkage).weight, fresh.weight)


def test_pca_needs_no_pass_of_its_own_where_the_scatter_is_there() -> None:
    rows, codes = make_rows(40, 8)
    own, shared = fit_pca_whitening(rows, 6), whiten_by_pca(collect_scatter(rows, codes), 6)
    np.testing.assert_allclose(shared.weight, own.weight, atol=1e-5)
    np.testing.assert_allclose(shared.bias, own.bias, atol=1e-5)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_a_read_only_table_on_disk_of_any_float_type_gives_the_sums_of_its_values(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, codes = make_rows(30, 6)
    np.save(tmp_path / "rows.npy", rows.astype(kind))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    monkeypatch.setattr(whitening, "_BLOCK_NUMBERS", 8 * 6)
    within, between = covariances_by_loop(rows.astype(kind), codes)
    scatter = collect_scatter(mapped, codes)
    np.testing.assert_allclose(scatter.within, within, atol=1e-10)
    np.testing.assert_allclose(scatter.between, between, atol=1e-10)
    fitted = whiten_within_class(scatter, 4)
    np.testing.assert_allclose(fitted.apply(mapped), fitted.apply(rows.astype(kind).astype(np.float32)), atol=1e-6)


def test_no_more_rows_are_read_at_a_time_than_a_block_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "_BLOCK_NUMBERS", 20 * 6)
    rows, codes = make_rows(60, 6)
    read = []

    class Table(np.ndarray):
        def __getitem__(self, index: object) -> np.ndarray:
            found = np.asarray(super().__getitem__(index))  # type: ignore[call-overload]
            read.append(len(found))
            return found

    collect_scatter(rows.view(Table), codes)
    fit_pca_whitening(rows.view(Table), 4)
    assert max(size for size in read if size < len(rows)) <= 20
    assert read.count(len(rows)) + sum(size > 20 for size in read) <= 4  # the first rows, which set the origin


@pytest.mark.parametrize(("shrinkage", "power"), [(0.3, 0.8), (0.7, 0.8), (0.7, 1.0)])
def test_sharpened_whitening_equals_its_definition(shrinkage: float, power: float) -> None:
    rows, codes = make_rows(60, 8, mean=0.0)
    powered = np.sign(rows) * np.abs(rows).astype(float) ** power
    within, between = covariances_by_loop(powered, codes)
    variances = np.diag(within)
    weights = (variances / variances.mean() + 1e-3) ** 0.2
    within, between = (np.diag(weights) @ matrix @ np.diag(weights) for matrix in (within, between))
    shrunk = (1 - shrinkage) * within + shrinkage * np.trace(within) / 8 * np.eye(8)
    values, axes = np.linalg.eigh(shrunk)
    root = axes @ np.diag(values**-0.65) @ axes.T
    directions = np.linalg.eigh(root @ between @ root)[1][:, ::-1][:, :5]
    expected = unit((powered - powered.mean(axis=0)) * weights @ root @ directions)
    fitted = sharpen_whitening(collect_scatter(rows, codes, power), 5, shrinkage)
    assert fitted.input_power == power
    found = fitted.apply(rows)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-4)
    mapped = np.sign(rows) * np.abs(rows) ** power @ fitted.weight.T + fitted.bias
    assert np.square(mapped).sum(axis=1).mean() == pytest.approx(1.0, abs=1e-4)


def test_sharpened_whitening_survives_constant_channels() -> None:
    rows, codes = make_rows(20, 6)
    rows[:, 2] = 5
    assert np.isfinite(sharpen_whitening(collect_scatter(rows, codes, 0.8), 4).apply(rows)).all()
    equal = np.ones((6, 4), np.float32)
    fitted = sharpen_whitening(collect_scatter(equal, np.repeat(np.arange(3), 2).astype(np.int32), 0.8), 4)
    assert (fitted.apply(equal) == 0).all()
