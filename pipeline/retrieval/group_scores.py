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
    codes, true = (np.unique(values, return_inverse=True)[1] for values in (groups, labels))
    _, cells, shared = np.unique(codes * (int(true.max()) + 1) + true, return_inverse=True, return_counts=True)
    in_group, in_label = np.bincount(codes), np.bincount(true)
    precision, recall = (float((shared[cells] / sizes).mean()) for sizes in (in_group[codes], in_label[true]))
    right, grouped, labelled = (float((sizes * (sizes - 1.0) / 2).sum()) for sizes in (shared, in_group, in_label))
    chance = grouped * labelled / max(1, len(codes) * (len(codes) - 1) / 2)
    spread = (grouped + labelled) / 2 - chance
    return {
        "bcubed_precision": precision,
        "bcubed_recall": recall,
        "bcubed_f1": 2 * precision * recall / (precision + recall),
        "pairwise_precision": right / grouped if grouped else 0.0,
        "pairwise_recall": right / labelled if labelled else 0.0,
        "pairwise_f1": 2 * right / (grouped + labelled) if grouped + labelled else 0.0,
        "adjusted_rand": (right - chance) / spread if spread else 1.0,
        "wrong_pair_share": 1 - right / grouped if grouped else 0.0,
    }
