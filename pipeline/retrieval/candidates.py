"""Which buildings are no answers to each other's queries, and what counts as a tie."""

from dataclasses import dataclass

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

    def both_ways(self) -> Codes:
        """Return the pairs (2 M, 2), each in both directions."""
        a, b = self.building_a, self.building_b
        return np.stack([np.concatenate([a, b]), np.concatenate([b, a])], axis=1)

    def partners_of(self, building: int) -> Codes:
        """Return the buildings that are paired with one."""
        return np.concatenate(
            [self.building_b[self.building_a == building], self.building_a[self.building_b == building]]
        )
