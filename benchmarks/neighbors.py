"""Time stage 5's exact engines on a CPU beside one another.

    python benchmarks/neighbors.py [--sizes 20000 100000 200000] [--anchors 2048] [--rounds 3] [--threads N]
                                   [--output FILE]

Points have 32 correlated dimensions and buildings of 2 to 7 images. The engines search the same anchors in turns; the
least time counts, scaled up to all anchors. BallTree has one thread and searches fewer anchors, once. With
`--threads 1` processor time counts, else the clock. gpu_acceptance.py measures GPUs.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import torch

from benchmarks.harness import make_parser, write_results
from benchmarks.synthetic import NEIGHBORS, make_points
from difficulty_metadata.neighbor_search.neighbors import NeighborSearch
from pipeline.config import count_cores

BACKENDS = ("torch", "balltree")
BALLTREE_ANCHORS = 64
CPU = torch.device("cpu")


def time_engines(count: int, num_anchors: int, rounds: int) -> dict[str, float]:
    """Return the seconds that each engine would take for all anchors; all must find the same neighbours."""
    points, codes = make_points(count)
    anchors = np.random.default_rng(1).choice(count, min(num_anchors, count), replace=False)
    searches = {name: NeighborSearch(points, codes, NEIGHBORS, name, CPU) for name in BACKENDS}
    # With one thread the processor's time, which other programs disturb little.
    seconds_now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best: dict[str, float] = {}
    answers = {}
    for number in range(rounds):
        for name, search in searches.items():
            chosen = anchors[:BALLTREE_ANCHORS] if name == "balltree" else anchors
            if name != "balltree" or number == 0:
                started = seconds_now()
                answers[name] = search.find(chosen)[0]
                best[name] = min(best.get(name, np.inf), (seconds_now() - started) / len(chosen) * count)
    for name, rows in answers.items():
        assert np.array_equal(rows, answers["torch"][: len(rows)]), f"{name} found other neighbours than torch"
    return best


def main() -> None:
    """Measure from a command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[20_000, 100_000, 200_000])
    parser.add_argument("--anchors", type=int, default=2_048, help="anchors to search")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=count_cores(), help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [{"points": count, **time_engines(count, arguments.anchors, arguments.rounds)} for count in arguments.sizes]
    write_results(rows, arguments.output)


if __name__ == "__main__":
    main()
