"""Retrieval by torch equals retrieval by NumPy, query by query."""

import numpy as np
import pytest
import torch

from pipeline.retrieval.device_scores import score_queries_on
from pipeline.retrieval.scores import normalise_rows, score_queries

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def draw(sizes, width=5, seed=0):
    """Return unit rows that lie near their building's centre, and shuffled building codes."""
    generator = np.random.default_rng(seed)
    codes = generator.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32) * 3 + 1
    centres = generator.standard_normal((3 * len(sizes) + 1, width))
    return normalise_rows(centres[codes] + generator.standard_normal((len(codes), width))), codes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [[2, 2], [1, 2, 3, 4, 5, 1], [40, 1, 2, 2], [3] * 60], ids=str)
@pytest.mark.parametrize("tile_values", [1, 500, 2**20])
def test_every_query_fares_as_in_numpy(sizes, tile_values, device):
    embeddings, codes = draw(sizes)
    found = score_queries_on(torch.device(device), embeddings, codes, tile_values)
    expected = score_queries(embeddings, codes)
    np.testing.assert_array_equal(found.query, expected.query)
    np.testing.assert_array_equal(found.first_rank, expected.first_rank)
    np.testing.assert_allclose(found.average_precision, expected.average_precision, rtol=1e-12)


def test_a_negative_that_ties_with_a_positive_counts_as_nearer():
    embeddings = normalise_rows(np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    codes = np.array([0, 0, 1, 1], np.int32)
    found = score_queries_on(torch.device("cpu"), embeddings, codes)
    assert found.first_rank.tolist() == score_queries(embeddings, codes).first_rank.tolist() == [2, 2, 3, 3]
