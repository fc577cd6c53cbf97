"""The numbers of metrics.json and what is said of them, each by itself."""

import numpy as np
import pytest

from evaluate_embeddings.scores.metrics import BASELINES, compare_kinds, describe_headline, sample_gallery
from pipeline.retrieval.scores import normalise_rows, score_queries


def test_fixed_galleries_hold_whole_buildings_and_lie_in_one_another():
    codes = np.random.default_rng(0).integers(0, 50, 300)
    small, large = sample_gallery(codes, 60, seed=3), sample_gallery(codes, 200, seed=3)
    assert (len(small), len(large)) == (60, 200)
    assert set(small) < set(large)
    partial = [code for code in np.unique(codes[small]) if (codes[small] == code).sum() < (codes == code).sum()]
    assert len(partial) <= 1
    assert small.tolist() == sample_gallery(codes, 60, seed=3).tolist() != sample_gallery(codes, 60, seed=4).tolist()


def test_the_gain_is_paired_and_zero_between_equal_embeddings():
    generator = np.random.default_rng(0)
    codes = np.repeat(np.arange(30), 3)
    raw = score_queries(normalise_rows(generator.normal(size=(90, 8))), codes)
    better = score_queries(normalise_rows(np.eye(30)[codes] + 0.2 * generator.normal(size=(90, 30))), codes)
    gains = compare_kinds({"raw": raw, "pca_whitened": better, "whitening": raw, "projector": better}, codes, seed=0)
    expected = better.average_precision.mean() - raw.average_precision.mean()
    assert gains["over_raw"]["map"] == gains["over_whitening"]["map"] == pytest.approx(expected)
    assert gains["over_raw"]["map_ci95"][0] > 0
    assert gains["over_pca_whitened"]["map_ci95"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("raw", "pca", "whitening", "headline"),
    [
        (0.1, 0.1, 0.1, "The projector beats raw, PCA-whitened and whitening"),
        (0.1, 0.1, 0.0, "The projector cannot be told from whitening, though it is better than raw and PCA-whitened"),
        (0.1, 0.0, -0.1, "The projector is worse than whitening and cannot be told from PCA-whitened, though it is "
                         "better than raw"),
        (0.0, 0.0, 0.0, "The projector cannot be told from raw, PCA-whitened and whitening"),
        (-0.1, -0.1, -0.1, "The projector is worse than raw, PCA-whitened and whitening"),
    ],
)  # fmt: skip
def test_the_headline_beats_only_what_beats_every_baseline(raw, pca, whitening, headline):
    gains = {
        f"over_{baseline}": {"map_ci95": [gain - 0.05, gain + 0.05]}
        for baseline, gain in zip(BASELINES, (raw, pca, whitening), strict=True)
    }
    assert describe_headline(gains) == headline
