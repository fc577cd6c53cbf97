"""Measure groups of images against labels: B-cubed, pairwise and adjusted Rand scores.

B-cubed averages over images: the share of an image's group that has its label, and the share of its label that is in
its group (Bagga and Baldwin, Entity-based cross-document coreferencing using the vector space model, 1998).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def measure_groups(groups: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Return the scores of groups (N,) against labels (N,); `wrong_pair_share` is that of the groups' own pairs.

    Groups of one image have no pairs: without any pair the share is 0, and so are the pairwise scores.
    """
    from sklearn.metrics.cluster import adjusted_rand_score, contingency_matrix

    cells = contingency_matrix(labels, groups, sparse=True).tocoo()
    counts = cells.data, cells.sum(axis=0), cells.sum(axis=1)
    shared, in_group, in_label = (np.asarray(count, np.float64).ravel() for count in counts)
    precision = float((shared**2 / in_group[cells.col]).sum() / len(groups))
    recall = float((shared**2 / in_label[cells.row]).sum() / len(groups))
    right, grouped, labelled = (float((sizes * (sizes - 1) / 2).sum()) for sizes in (shared, in_group, in_label))
    return {
        "bcubed_precision": precision,
        "bcubed_recall": recall,
        "bcubed_f1": 2 * precision * recall / (precision + recall),
        "pairwise_precision": right / grouped if grouped else 0.0,
        "pairwise_recall": right / labelled if labelled else 0.0,
        "pairwise_f1": 2 * right / (grouped + labelled) if grouped + labelled else 0.0,
        "adjusted_rand": float(adjusted_rand_score(labels, groups)),
        "wrong_pair_share": 1 - right / grouped if grouped else 0.0,
    }
