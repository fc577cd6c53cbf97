"""Time stage 5's exact engines beside one another on the same points, and print their ratios.

    python benchmarks/neighbors.py [--sizes 20000 40000 100000] [--anchors 1024] [--rounds 3]

Points are correlated, 32-dimensional, of buildings with 2 to 7 images. Each engine searches the same anchors in turn,
round by round, so that whatever else the machine does meets all of them; the least time of the rounds counts, scaled
up to all anchors. Prints JSON, and a table to stderr.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import torch

from difficulty_metadata.neighbors import NeighborSearch
from pipeline.cli import installed_version
from pipeline.config import count_cores

DIMENSIONS, NEIGHBORS = 32, 150
BACKENDS = ("torch", "faiss", "balltree")
# BallTree visits nearly every point at 32 dimensions: beyond this it would take minutes for the sample alone.
BALLTREE_LIMIT = 100_000


def make_points(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return points (N, 32) float32, the variance falling by component as of fingerprints, and their buildings (N,)."""
    generator = np.random.default_rng(seed)
    images = generator.integers(2, 8, count)
    codes = np.repeat(np.arange(count), images)[:count].astype(np.int32)
    scale = 1.0 / np.sqrt(np.arange(1, DIMENSIONS + 1))
    centres = generator.normal(size=(int(codes[-1]) + 1, DIMENSIONS))
    points = (centres[codes] + 0.5 * generator.normal(size=(count, DIMENSIONS))) * scale
    return points.astype(np.float32), codes


def time_engines(count: int, num_anchors: int, rounds: int) -> dict[str, float]:
    """Return the seconds that each engine would take for all anchors."""
    points, codes = make_points(count)
    anchors = np.random.default_rng(1).choice(count, min(num_anchors, count), replace=False)
    names = [name for name in BACKENDS if name != "balltree" or count <= BALLTREE_LIMIT]
    searches = {name: NeighborSearch(points, codes, NEIGHBORS, name, torch.device("cpu")) for name in names}
    best: dict[str, float] = {}
    answers = {}
    for _ in range(rounds):
        for name, search in searches.items():
            started = time.perf_counter()
            answers[name] = search.find(anchors)[0]
            best[name] = min(best.get(name, np.inf), time.perf_counter() - started)
    for name in names:
        assert np.array_equal(answers[name], answers["torch"]), f"{name} found other neighbours than torch"
    return {name: seconds * count / len(anchors) for name, seconds in best.items()}


def main() -> None:
    """Time all sizes from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 40_000, 100_000])
    parser.add_argument("--anchors", type=int, default=1024, help="anchors searched, of all")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    results = {}
    print(f"{'points':>10}" + "".join(f"{name:>12}" for name in BACKENDS) + "   slowest / torch", file=sys.stderr)
    for count in arguments.sizes:
        seconds = results[count] = time_engines(count, arguments.anchors, arguments.rounds)
        cells = "".join(f"{seconds[name]:>10.1f} s" if name in seconds else f"{'-':>12}" for name in BACKENDS)
        print(f"{count:>10}{cells}   {max(seconds.values()) / seconds['torch']:.1f}", file=sys.stderr)
    versions = {name: installed_version(name) for name in ("torch", "faiss-cpu", "scikit-learn", "numpy")}
    machine = {"cores": count_cores(), "load": os.getloadavg()[0], "processor": platform.machine()}
    print(json.dumps({"seconds": results, "versions": versions, "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
