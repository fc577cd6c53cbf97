"""Fit the closed-form maps to rows in one call."""

import numpy as np

from pipeline.retrieval.whitening import DEFAULT_SHRINKAGE, collect_scatters, whiten_by_pca, whiten_within_class


def collect_scatter(embeddings, building_codes, input_power=1.0):
    return collect_scatters(embeddings, building_codes, (input_power,))[0]


def fit_within_class_whitening(embeddings, building_codes, output_dim=256, shrinkage=DEFAULT_SHRINKAGE):
    return whiten_within_class(collect_scatter(embeddings, building_codes), output_dim, shrinkage)


def fit_pca_whitening(embeddings, output_dim=256):
    return whiten_by_pca(collect_scatter(embeddings, np.arange(len(embeddings), dtype=np.int32)), output_dim)
