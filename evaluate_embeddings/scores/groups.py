"""Group images without their labels at the cosine that validation gives, and measure the groups by the labels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.group_scores import measure_groups
from pipeline.retrieval.pair_table import PairTable, centre, describe_pairs
from pipeline.retrieval.scores import Embeddings

# More images are sampled, by whole buildings: all their pairs are held.
MAX_IMAGES = 2_000

Labelled = tuple[Embeddings, NDArray[np.int32]]  # (N, D) L2-normalised, and the building of each


def summarize_groups(test: Labelled, validation: Labelled) -> dict[str, Any] | None:
    """Return the scores of average linkage, cut where validation says, and the best F1 in hindsight.

    Return None unless both samples have pairs of one building and of two.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    own, known = (describe_pairs(*sample)["all"] for sample in (test, validation))
    if not own or len(known) < 2:
        return None
    embeddings, codes = centre(test[0]), test[1]
    table, best = PairTable.of(known), max(own, key=lambda row: row["bcubed_f1"])
    threshold = table.choose_threshold(len(codes) - 1, table.measure_shift(embeddings))
    groups = fcluster(linkage(embeddings, "average", "cosine"), 1 - threshold, "distance")
    found = {"images": len(codes), "groups": int(groups.max()), "threshold": threshold}
    in_hindsight = {"best_threshold": best["cosine"], "best_bcubed_f1": best["bcubed_f1"]}
    return found | measure_groups(groups, codes) | in_hindsight
