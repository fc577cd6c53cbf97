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
    codes, true = (
        np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64) for values in (groups, labels)
    )
    cells, cell_of_row, shared = np.unique(
        codes * (int(true.max(initial=0)) + 1) + true, return_inverse=True, return_counts=True
    )
    in_both, in_group, in_label = shared[cell_of_row.reshape(-1)], np.bincount(codes)[codes], np.bincount(true)[true]
    precision, recall = float((in_both / in_group).mean()), float((in_both / in_label).mean())
    right, grouped, labelled = (_count_pairs(sizes) for sizes in (shared, np.bincount(codes), np.bincount(true)))
    num_pairs = len(codes) * (len(codes) - 1) / 2
    chance = grouped * labelled / num_pairs if num_pairs else 0.0
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


def _count_pairs(sizes: NDArray[Any]) -> float:
    sizes = sizes.astype(np.float64)
    return float((sizes * (sizes - 1) / 2).sum())
