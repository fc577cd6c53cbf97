"""Search the cases of test_neighbors with the Triton kernels, interpreted on a CPU, and print what was found as JSON.

TRITON_INTERPRET=1 python tests/interpreted_search.py
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
import torch
from test_neighbors import CASES

from difficulty_metadata.neighbor_search import triton_filter
from difficulty_metadata.neighbor_search.neighbors import NeighborSearch
from difficulty_metadata.neighbor_search.triton_filter import TritonEngine

CPU = torch.device("cpu")
K, NUM_ANCHORS = 20, 14
# Small, and such that no case is a multiple of a tile; a few groups a tile, as the interpreter pays by the operation.
SETTINGS = {"DENSE_POINTS": 100, "SAMPLE_STRIDE": 4, "TILE_ROWS": 16, "TILE_POINTS": 64,
            "TILE_GROUPS": 4, "GROUPS_AT_ONCE": 16, "_LIST_ROOM": 2.5, "_NEAR_ROOM": 2.0}  # fmt: skip


def search(points: np.ndarray, codes: np.ndarray, **settings: object) -> dict[str, object]:
    """Search for some anchors, and say how many answers differ from the BallTree's and how they came about."""
    for name, value in (SETTINGS | settings).items():
        setattr(triton_filter, name, value)
    anchors = np.random.default_rng(0).permutation(len(points))[:NUM_ANCHORS]
    expected_rows, expected_distances = NeighborSearch(points, codes, K, "balltree", CPU).find(anchors)
    with patch.object(NeighborSearch, "_make_engine", lambda self: TritonEngine(self._points, self._point_codes)):
        found = NeighborSearch(points, codes, K, "torch", CPU)
    rows, distances = found.find(anchors)
    engine = found._engine
    queries = torch.from_numpy(points[anchors])
    candidates, bounds = engine.search(queries, torch.from_numpy(codes[anchors]), K)
    # Every distinct point of another building that is not a candidate has to be as far as the bound says.
    true = (queries.double()[:, None] - found._points.double()[None]).square().sum(dim=2)
    is_seen = (candidates[:, :, None] == torch.arange(true.shape[1])).any(dim=1)
    is_own = found._point_codes[None] == torch.from_numpy(codes[anchors])[:, None]
    return {
        "wrong": int((rows != expected_rows).any(axis=1).sum() + (distances != expected_distances).any(axis=1).sum()),
        "redone": found.num_redone,
        "num_levels": len(engine._levels),
        "num_bounded": int((bounds > 0).sum()),
        "broken_bounds": int((~is_seen & ~is_own & (true < bounds[:, None])).sum()),
    }


def main() -> None:
    """Print the results of all cases."""
    results = {name: search(*make()) for name, make in CASES.items()}
    ordinary = CASES["ordinary"]()
    results["lists too short"] = search(*ordinary, _LIST_ROOM=0.1, TILE_POINTS=16, TILE_GROUPS=2)
    results["room too small"] = search(*ordinary, _NEAR_ROOM=0.1)
    results["two levels"] = search(*ordinary, DENSE_POINTS=10_000)
    results["wide points"] = search(np.tile(ordinary[0], (1, 5)), ordinary[1])
    results["huge numbers"] = search(ordinary[0] * np.float32(2.0**40), ordinary[1])
    results["tiny numbers"] = search(ordinary[0] * np.float32(2.0**-40), ordinary[1])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
