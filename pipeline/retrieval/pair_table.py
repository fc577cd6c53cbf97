"""Find the cosine at which to group images without labels, by pairs of validation images.

A table says how many pairs reach a cosine, of two buildings and of one, and how good the groups are that average
linkage makes at that cosine. What carries over to more images is the number of wrong partners that an image has by
chance: a rate a pair, times the number of images.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.geography import earth_centred_m
from pipeline.retrieval.group_scores import measure_groups

# Wrong partners that an image has by chance: the rows of the table.
PARTNERS = 2.0 ** np.arange(9, -10.5, -0.5)
# Pairs that stand nearer than this are counted by themselves: they are the candidates where positions are known.
NEAR_M = 150.0
Embeddings = NDArray[np.float32]


def describe_pairs(
    embeddings: Embeddings, buildings: NDArray[Any], positions: NDArray[np.float64] | None = None
) -> dict[str, list[dict[str, float]]]:
    """Return a table of all pairs of images (N,) and, with positions (N, 2) in degrees, one of those that stand near.

    Each row has a cosine, the share of the pairs of two buildings that reach it (`false_rate`), `partners` (wrong ones
    by chance, of an image), and the scores of average linkage that is cut there. Ascending by cosine; empty without
    pairs of both kinds.
    """
    from scipy.spatial.distance import pdist

    rows, columns = np.triu_indices(len(embeddings), 1)
    cosines = (embeddings @ embeddings.T)[rows, columns]  # (P,)
    is_same = buildings[rows] == buildings[columns]
    tables = {"all": _tabulate(cosines, is_same, buildings)}
    if positions is not None:
        is_near = pdist(earth_centred_m(*positions.T)) <= NEAR_M
        # A pair that is no candidate parts its groups.
        tables["near"] = _tabulate(np.where(is_near, cosines, -1), is_same, buildings, is_near)
    return tables


def _tabulate(
    cosines: NDArray[np.float32], is_same: NDArray[np.bool_], buildings: NDArray[Any],
    is_candidate: NDArray[np.bool_] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Return one of the tables of `describe_pairs`, of the candidates among the pairs (P,)."""
    from scipy.cluster.hierarchy import fcluster, linkage

    chosen = np.ones_like(is_same) if is_candidate is None else is_candidate
    different = np.sort(cosines[chosen & ~is_same])
    if not len(different) or not (chosen & is_same).any():
        return []
    tree = linkage(np.clip(1 - cosines.astype(np.float64), 0, 2), "average")
    table = []
    for partners in PARTNERS:
        count = round(partners * len(buildings) / 2)  # pairs of two buildings
        if not 0 < count < len(different):
            continue
        cosine = float(different[-count])
        scores = measure_groups(fcluster(tree, 1 - cosine, "distance"), buildings)
        table.append({
            "cosine": cosine, "partners": 2 * count / len(buildings), "false_rate": count / len(different),
            "bcubed_f1": scores["bcubed_f1"], "wrong_pair_share": scores["wrong_pair_share"],
        })  # fmt: skip
    return [row for place, row in enumerate(table) if not place or row["cosine"] > table[place - 1]["cosine"]]


@dataclass(frozen=True)
class PairTable:
    """What validation says of pairs of images, by cosine; columns are (T,), and `cosine` ascends.

    Beyond its ends a rate follows the line through the last decade of rates: `is_beyond` tells.
    """

    columns: dict[str, NDArray[np.float64]]

    @classmethod
    def of(cls, rows: list[dict[str, float]]) -> "PairTable":
        """Return the table of rows as `describe_pairs` makes them, at least one."""
        return cls({name: np.array([float(row[name]) for row in rows]) for name in rows[0]})

    def threshold_at(self, rate: float) -> float:
        """Return the cosine that a share of the pairs of two buildings reaches."""
        cosines, logs = self.columns["cosine"], np.log(self.columns["false_rate"])
        wanted = np.log(rate)
        if logs[-1] <= wanted <= logs[0]:
            return float(np.interp(-wanted, -logs, cosines))
        ends = slice(0, 2) if wanted > logs[0] else np.flatnonzero(logs <= logs[-1] + np.log(10))[[0, -1]]
        (first, last), (low, high) = cosines[ends], logs[ends]
        slope = (last - first) / (low - high) if low > high else 0.0
        end, log = (cosines[0], logs[0]) if wanted > logs[0] else (cosines[-1], logs[-1])
        return float(np.clip(end + slope * (log - wanted), -1, 1))

    def is_beyond(self, rate: float) -> bool:
        """Return whether a rate is outside what was measured."""
        return not self.columns["false_rate"][-1] <= rate <= self.columns["false_rate"][0]

    @property
    def best_partners(self) -> float:
        """Wrong partners of an image by chance at the best B-cubed F1 of validation."""
        return float(self.columns["partners"][np.argmax(self.columns["bcubed_f1"])])

    def wrong_share_at(self, partners: float) -> float:
        """Return the share of wrong pairs in validation's groups with so many wrong partners by chance."""
        order = np.argsort(self.columns["partners"])
        return float(np.interp(partners, self.columns["partners"][order], self.columns["wrong_pair_share"][order]))
