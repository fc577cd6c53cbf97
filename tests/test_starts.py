"""What training starts from, and how its shrinkage is chosen."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from closed_forms import collect_scatter

from pipeline.config import TrainingModelSection, TrainingSection
from pipeline.retrieval.features import Features
from pipeline.retrieval.scores import QueryScores
from pipeline.retrieval.whitening import LinearMap, sharpen_whitening
from train_specialized_embeddings.training import starts
from train_specialized_embeddings.training.starts import Fitted, fit_start, is_rectified, make_projector
from train_specialized_embeddings.training.validation import ValidationSet

CODES = np.repeat(np.arange(20), 3).astype(np.int32)
NOTHING = LinearMap(np.zeros((1, 1), np.float32), np.zeros(1, np.float32))


def make_fitted(precisions: np.ndarray) -> Fitted:
    count = len(CODES)
    return Fitted(NOTHING, QueryScores(np.arange(count), np.ones(count, np.int64), precisions))


def make_validation() -> ValidationSet:
    return ValidationSet(np.zeros((len(CODES), 1), np.float32), CODES)


def precisions(mean: float, noise: float, seed: int = 0) -> np.ndarray:
    """Return a precision for each query, with noise that the queries of one building share."""
    drawn = np.random.default_rng(seed).normal(size=20)
    return mean + noise * (drawn - drawn.mean())[CODES]


def test_better_means_by_more_than_the_standard_error_over_buildings() -> None:
    validation = make_validation()
    one, other = make_fitted(precisions(0.62, 0.1)), make_fitted(precisions(0.6, 0.0))
    gains = (one.scores.average_precision - other.scores.average_precision).reshape(20, 3).mean(axis=1)
    error = gains.std() / np.sqrt(20)
    assert validation.is_better(one.scores, other.scores) == (gains.mean() > error)
    assert gains.mean() == pytest.approx(0.02)
    assert 0.01 < error < 0.03
    assert validation.is_better(make_fitted(precisions(0.6 + 1.1 * error, 0.1)).scores, other.scores)
    assert not validation.is_better(make_fitted(precisions(0.6 + 0.9 * error, 0.1)).scores, other.scores)
    assert not validation.is_better(other.scores, other.scores)


@pytest.mark.parametrize(
    ("means", "noises", "whitening", "expected"),
    [
        ((0.60, 0.61, 0.605), (0.0, 0.1, 0.0), 0.5, 0.7),  # the largest is as good as the best, give or take
        ((0.60, 0.61, 0.55), (0.0, 0.1, 0.0), 0.5, 0.5),  # the largest is worse
        ((0.70, 0.61, 0.55), (0.0, 0.0, 0.0), 0.5, 0.3),
        ((0.60, 0.61, 0.60), (0.0, 0.1, 0.0), 0.602, 0.5),  # the plain whitening is better than the largest
        ((0.60, 0.61, 0.60), (0.0, 0.1, 0.0), 0.611, 0.5),  # it is better than the best, but not so that one could tell
        ((0.60, 0.61, 0.60), (0.0, 0.1, 0.0), 0.65, None),  # it is better than all
    ],
)
def test_the_largest_shrinkage_that_validates_as_well_as_the_best_one_is_taken(
    means: tuple[float, ...], noises: tuple[float, ...], whitening: float, expected: float | None
) -> None:
    tried = {
        shrinkage: make_fitted(precisions(mean, noise))
        for shrinkage, mean, noise in zip((0.3, 0.5, 0.7), means, noises, strict=True)
    }
    plain = Fitted(LinearMap(np.ones((1, 1), np.float32), np.zeros(1, np.float32)), make_fitted(
        precisions(whitening, 0.0)).scores)  # fmt: skip
    assert starts._choose_shrinkage(tried, plain, make_validation()) == expected


def make_split(seed: int, num_buildings: int = 40, width: int = 12) -> Features:
    """Return signed features."""
    generator = np.random.default_rng(seed)
    codes = np.repeat(np.arange(num_buildings), 3).astype(np.int32)
    noise = generator.standard_normal((len(codes), width)) * np.linspace(3, 0.3, width)
    rows = (generator.standard_normal((num_buildings, width))[codes] + noise).astype(np.float32)
    columns: dict[str, Any] = dict.fromkeys(
        ("building_ids", "image_ids", "dataset_ids", "street_view_ids", "target_lat", "target_lon"), pa.array([])
    )
    return Features(embeddings=rows, building_codes=codes, **columns)


@pytest.mark.parametrize("power", [0.8, 1.0])
def test_a_projector_starts_as_the_sharpened_map_and_the_note_says_how(
    monkeypatch: pytest.MonkeyPatch, power: float
) -> None:
    """A power is for features without a negative number."""
    monkeypatch.setattr(ValidationSet, "is_better", lambda *_: False)  # so that the sharpened one is taken
    train, val = make_split(1), make_split(2)
    if power != 1.0:
        train, val = (replace(split, embeddings=np.abs(split.embeddings)) for split in (train, val))
    validation = ValidationSet(val.embeddings, val.building_codes)
    monkeypatch.setattr(starts, "SHRINKAGES", (0.5,))
    section = TrainingSection()
    fitted = fit_start(train, validation, 6, section)
    scatter = collect_scatter(train.embeddings, train.building_codes, power)
    expected = sharpen_whitening(scatter, 12, 0.5).take_leading(6)
    assert fitted.note["init"] == "sharpened"
    assert fitted.note["shrinkage"] == 0.5
    model = TrainingModelSection(output_dim=6, hidden_dim=8)
    projector = fitted.coordinates.fold(make_projector(fitted, model, section))
    assert fitted.note["sharpened_shrinkage"] == 0.5
    assert 0 < fitted.baselines["whitening"]["map_error"] < 0.2
    np.testing.assert_allclose(
        projector(torch.from_numpy(val.embeddings)).detach().numpy(), expected.apply(val.embeddings), atol=1e-4
    )
    assert projector.architecture["input_power"] == power


def test_features_are_rectified_where_none_is_negative() -> None:
    train = replace(make_split(1), embeddings=np.abs(make_split(1).embeddings))
    assert is_rectified(train)
    train.embeddings[-1, -1] = -1e-3
    assert not is_rectified(train)


@pytest.mark.parametrize(("init", "row"), [("whitening", "whitening"), ("pca", "pca_whitened")])
def test_the_other_starts_score_as_their_baseline(init: str, row: str) -> None:
    train, val = make_split(1), make_split(2)
    validation = ValidationSet(val.embeddings, val.building_codes)
    section = TrainingSection(init=init)
    fitted = fit_start(train, validation, 6, section)
    assert "sharpened_shrinkage" not in fitted.note
    projector = fitted.coordinates.fold(
        make_projector(fitted, TrainingModelSection(output_dim=6, hidden_dim=8), section)
    )
    found = validation.summarize(validation.score_each(projector(torch.from_numpy(val.embeddings)).detach().numpy()))
    assert found["map"] == pytest.approx(fitted.baselines[row]["map"], abs=1e-6)


def test_random_weights_start_from_nothing() -> None:
    train, val = make_split(1), make_split(2)
    section = TrainingSection(init="random")
    fitted = fit_start(train, ValidationSet(val.embeddings, val.building_codes), 6, section)
    projector = make_projector(fitted, TrainingModelSection(output_dim=6), section)
    assert float(projector.shortcut.weight.detach().abs().max()) < 1.0
    assert len(projector.shortcut.weight.unique()) > 6
    assert fitted.coordinates.fold(projector).architecture["input_power"] == 1.0


def test_the_search_for_a_shrinkage_ends_at_the_first_that_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    means = {0.85: 0.3, 0.7: 0.4, 0.5: 0.5, 0.3: 0.6, 0.2: 0.6, 0.1: 0.59, 0.05: 0.9}

    def fit(scatter: Any, count: int, shrinkage: float) -> LinearMap:
        return LinearMap(np.zeros((1, 1), np.float32), np.array([shrinkage]))

    def validate(fitted: LinearMap) -> QueryScores:
        return make_fitted(precisions(means[float(fitted.bias[0])], 0.0)).scores

    assert list(starts._try(fit, None, 1, validate)) == [0.85, 0.7, 0.5, 0.3, 0.2, 0.1]
    monkeypatch.setattr(starts, "SHRINKAGES", (0.05,))
    assert list(starts._try(fit, None, 1, validate)) == [0.05]


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize(("num_layers", "multiplier"), [(1, 1.0), (2, 1.25), (3, 0.75)])
def test_without_a_shortcut_the_branch_starts_as_the_whitening(
    activation: Any, num_layers: int, multiplier: float, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = make_split(1), make_split(2)
    section = TrainingSection(init="whitening", use_residual=False)
    fitted = fit_start(train, ValidationSet(val.embeddings, val.building_codes), 6, section)
    model = TrainingModelSection(
        output_dim=6, hidden_dim=24, num_hidden_layers=num_layers, hidden_dim_multiplier=multiplier,
        activation=activation,
    )  # fmt: skip
    projector = make_projector(fitted, model, section).eval()
    assert projector.shortcut is None
    rows = torch.from_numpy(fitted.coordinates.linear_map.map_rows(val.embeddings))
    expected = torch.nn.functional.normalize(rows[:, :6], dim=1)
    torch.testing.assert_close(projector(rows), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(fitted.coordinates.fold(projector)(torch.from_numpy(val.embeddings)), expected)
    assert "the start keeps" not in caplog.text
    projector(rows).sum().backward()  # nothing is stuck
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in projector.parameters())


def test_narrow_layers_without_a_shortcut_carry_the_leading_coordinates_and_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train, val = make_split(1), make_split(2)
    section = TrainingSection(init="whitening", use_residual=False)
    fitted = fit_start(train, ValidationSet(val.embeddings, val.building_codes), 6, section)
    projector = make_projector(fitted, TrainingModelSection(output_dim=6, hidden_dim=9), section).eval()
    rows = torch.from_numpy(fitted.coordinates.linear_map.map_rows(val.embeddings))
    kept = rows[:, :6] * torch.tensor([1.0, 1, 1, 1, 0, 0])
    torch.testing.assert_close(projector.map(rows), kept, atol=1e-5, rtol=0)
    assert "the start keeps 4 of 6 numbers: hidden layers of at least 12 keep all" in caplog.text


def test_without_a_shortcut_random_weights_are_not_zero() -> None:
    train, val = make_split(1), make_split(2)
    section = TrainingSection(init="random", use_residual=False)
    fitted = fit_start(train, ValidationSet(val.embeddings, val.building_codes), 6, section)
    projector = make_projector(fitted, TrainingModelSection(output_dim=6), section)
    assert float(projector.map(torch.from_numpy(val.embeddings)).detach().norm(dim=1).min()) > 0.01
