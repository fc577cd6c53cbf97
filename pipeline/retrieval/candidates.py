"""Rows by building, and which buildings are no answers to each other's queries."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Similarities nearer than this are a tie: equal vectors differ by a few 1e-7 with the order in which a matrix
# product adds up, so an exact comparison would break ties by chance.
TIE_TOLERANCE = 1e-6

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class IgnoredPairs:
    """Pairs of buildings, as codes, whose images are neither right nor wrong answers to each other's queries."""

    building_a: Codes  # (M,)
    building_b: Codes  # (M,)


class RowGroups:
    """The rows of each group, by the group's dense code."""

    def __init__(self, labels: NDArray[Any]) -> None:
        self.labels, codes = np.unique(labels, return_inverse=True)
        self.codes: Codes = codes.reshape(-1).astype(np.int64)  # (N,)
        self._order = np.argsort(self.codes, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(self.codes, minlength=len(self.labels)))])

    def rows_of(self, code: int) -> Codes:
        """Return the rows of one group, ascending."""
        rows: Codes = self._order[self._starts[code] : self._starts[code + 1]]
        return rows

    def sizes(self) -> Codes:
        """Return the number of rows of each group."""
        return np.diff(self._starts)


def list_partners(ignored: IgnoredPairs | None, buildings: RowGroups) -> dict[int, list[int]]:
    """Return, for each building of a pair, the dense codes of its partners; absent buildings are passed over."""
    partners: dict[int, list[int]] = {}
    if ignored is None or not len(ignored.building_a):
        return partners
    known = np.isin(ignored.building_a, buildings.labels) & np.isin(ignored.building_b, buildings.labels)
    first = np.searchsorted(buildings.labels, ignored.building_a[known]).tolist()
    second = np.searchsorted(buildings.labels, ignored.building_b[known]).tolist()
    for one, other in zip(first, second, strict=True):
        if one != other:
            partners.setdefault(one, []).append(other)
            partners.setdefault(other, []).append(one)
    return partners
