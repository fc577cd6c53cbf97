"""Time stage 5's exact engines on a CPU beside one another, and what the output takes on disk and in memory.

    python benchmarks/neighbors.py [--sizes 20000 40000 100000 200000] [--anchors 2048] [--rounds 3] [--threads N]
                                   [--host-images 200000] [--output FILE]

Points are correlated, 32-dimensional, of buildings with 2 to 7 images. Each engine searches the same anchors in turn,
round by round, so that whatever else the machine does meets all of them; the least time of the rounds counts, scaled
up to all anchors. BallTree, which has one thread, searches fewer of them, once; faiss takes part where it is installed.
With `--threads 1` processor time is counted, which other processes disturb little, else the clock's. The column
`product` is the floor: the matrix product alone, by the same tiles. What stage 5 does beside the search is timed by
part on fingerprints made up. Prints tables to stderr, and writes JSON to `--output`. GPUs are measured by
gpu_acceptance.py.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import pyarrow as pa
import torch

from benchmarks import synthetic
from benchmarks.scale import read_peak
from difficulty_metadata import compute_visual_neighbors as stage5
from difficulty_metadata.neighbor_search.engines import CPU_TILE
from difficulty_metadata.neighbor_search.fingerprints import ImageTable, list_fingerprint_files, read_images
from difficulty_metadata.neighbor_search.neighbor_parts import PartStore
from difficulty_metadata.neighbor_search.neighbors import NeighborSearch, group_points
from pipeline.cli import installed_version
from pipeline.config import Config, count_cores
from pipeline.ids import Shard
from pipeline.log import Stopwatch

DIMENSIONS, NEIGHBORS = 32, 150
BACKENDS = ("torch", *(["faiss"] if importlib.util.find_spec("faiss") else []), "balltree")
BALLTREE_ANCHORS = 64
WHOLE = Shard(0, 1)
CPU = torch.device("cpu")


def make_points(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return points (N, 32) float32, the variance falling by component as of fingerprints, and their buildings (N,)."""
    generator = np.random.default_rng(seed)
    images = generator.integers(2, 8, count)
    codes = np.repeat(np.arange(count), images)[:count].astype(np.int32)
    scale = (1.0 / np.sqrt(np.arange(1, DIMENSIONS + 1))).astype(np.float32)
    points = generator.standard_normal((int(codes[-1]) + 1, DIMENSIONS), np.float32)[codes]
    points += 0.5 * generator.standard_normal((count, DIMENSIONS), np.float32)
    return points * scale, codes


def seconds_now() -> float:
    """Return the clock's time, or with one thread the processor's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def time_engines(count: int, num_anchors: int, rounds: int) -> dict[str, float]:
    """Return the seconds that each engine would take for all anchors, and the matrix product alone."""
    points, codes = make_points(count)
    anchors = np.random.default_rng(1).choice(count, min(num_anchors, count), replace=False)
    searches = {name: NeighborSearch(points, codes, NEIGHBORS, name, CPU) for name in BACKENDS}
    best: dict[str, float] = {}
    answers = {}
    for number in range(rounds):
        for name, search in searches.items():
            chosen = anchors[:BALLTREE_ANCHORS] if name == "balltree" else anchors
            if name != "balltree" or number == 0:
                started = seconds_now()
                answers[name] = search.find(chosen)[0]
                best[name] = min(best.get(name, np.inf), (seconds_now() - started) / len(chosen) * count)
        best["product"] = min(best.get("product", np.inf), time_product(points, anchors) / len(anchors) * count)
    for name, rows in answers.items():
        assert np.array_equal(rows, answers["torch"][: len(rows)]), f"{name} found other neighbours than torch"
    return best


def time_product(points: np.ndarray, anchors: np.ndarray) -> float:
    """Return the seconds that the tiles' matrix products take and nothing else."""
    all_points, queries = torch.from_numpy(points), torch.from_numpy(points[anchors])
    scores = torch.empty(CPU_TILE)
    started = seconds_now()
    for block in queries.split(CPU_TILE[0]):
        for tile in all_points.split(CPU_TILE[1]):
            torch.mm(block, tile.T, out=scores.view(-1)[: len(block) * len(tile)].view(len(block), -1))
    return seconds_now() - started


# ------------------------------------------------------------------------------------------------ the output, memory


def make_images(codes: np.ndarray, num_buildings: int, num_images: int) -> ImageTable:
    """Return a table of images whose buildings have names as in the data set, with nine random digits.

    Only the first `num_images` have a name; the rest are there to be neighbours.
    """
    targets = np.random.default_rng(2).integers(10**8, 10**9, num_buildings)
    building_ids = pa.array([f"{place // 1_000 + 1:04d}_{target}" for place, target in enumerate(targets)])
    image_ids = pa.chunked_array([pa.array([f"{row // 5_800 + 1:04d}_{row}" for row in range(num_images)])])
    nowhere = np.zeros(len(codes))
    return ImageTable([], 0, image_ids, building_ids, codes, nowhere, nowhere)


def measure_output(num_images: int, num_buildings: int) -> dict[str, float]:
    """Return the bytes a neighbour of an output and the seconds to merge it.

    The neighbours are drawn from all the buildings alike, which leaves the least for a dictionary to save.
    """
    generator = np.random.default_rng(3)
    codes = np.arange(5 * num_buildings, dtype=np.int32) // 5
    images = make_images(codes, num_buildings, num_images)
    with tempfile.TemporaryDirectory() as folder:
        store = PartStore(Path(folder) / "difficulty.parquet", num_images, NEIGHBORS, {})
        for part in range(store.count_parts(WHOLE)):
            store.write(WHOLE, part, *draw_neighbors(generator, len(store.anchors(WHOLE, part)), len(codes)))
        return merge_output(images, store, Path(folder) / "difficulty.parquet")


def draw_neighbors(generator: np.random.Generator, num_anchors: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return neighbours (A, k) drawn evenly among the images, and distances (A, k) that ascend."""
    noise = generator.standard_gamma(5.0, (num_anchors, NEIGHBORS), np.float32)
    spread = np.abs(generator.standard_normal((num_anchors, 1), np.float32))
    distances = np.sort(0.1 * np.sqrt(noise) + spread, axis=1)
    return generator.integers(0, num_images, distances.shape), distances


def merge_output(images: ImageTable, store: PartStore, path: Path) -> dict[str, float]:
    """Merge the parts, and say how long it took and what a neighbour takes on disk."""
    started = time.perf_counter()
    stage5.merge(images, store, 1, path, {}, Config())
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes_a_neighbor": path.stat().st_size / store.num_anchors / store.num_neighbors}


def print_search_memory(count: int) -> None:
    """Print the bytes that a search among `count` points adds to what the imports and the points' making took."""
    points, codes = make_points(count)
    before = read_peak()
    NeighborSearch(points, codes, NEIGHBORS, "torch", CPU).find(np.arange(0, count, count // 256))
    print(json.dumps({"before": before, "after": read_peak()}))


def measure_memory(counts: list[int]) -> dict[str, float]:
    """Return the peak bytes of searches of two sizes, each in a process of its own, and what a further row takes."""
    peaks = []
    for count in counts:
        command = [sys.executable, __file__, "--memory-of", str(count)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(found.stdout)["after"])
    slope = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
    return {str(count): peak for count, peak in zip(counts, peaks, strict=True)} | {"bytes_a_row": slope}


# ------------------------------------------------------------------------------------------------ all but the search


def measure_host(count: int, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return seconds by the clock and of processors, the least of the rounds, for all of stage 5 but the search.

    Fingerprints of `count` images are read and projected, their points grouped; neighbours drawn evenly among them are
    written in parts and merged.
    """
    synthetic.make_fingerprints(folder, count)
    generator = np.random.default_rng(5)
    rounds_seconds = []
    for _ in range(rounds):
        watches = {"clock": Stopwatch(), "processors": Stopwatch()}
        measure = partial(measure_both, watches)
        with measure("read"):
            images = read_images(list_fingerprint_files(folder / "fingerprints"))
        with measure("points"):
            points = stage5.compute_points(images, DIMENSIONS)
        with measure("group"):
            group_points(points, images.building_codes)
        store = PartStore(folder / "difficulty.parquet", count, NEIGHBORS, {})
        for part in range(store.count_parts(WHOLE)):
            rows, distances = draw_neighbors(generator, len(store.anchors(WHOLE, part)), count)
            with measure("write"):
                store.write(WHOLE, part, rows, distances)
        with measure("merge"):
            stage5.merge(images, store, 1, folder / "difficulty.parquet", {}, Config())
        store.remove_all()
        rounds_seconds.append({kind: watch.seconds for kind, watch in watches.items()})
    return {
        kind: {part: min(each[kind][part] for each in rounds_seconds) for part in seconds}
        for kind, seconds in rounds_seconds[0].items()
    }


@contextmanager
def measure_both(watches: dict[str, Stopwatch], part: str) -> Iterator[None]:
    """Add the block's time to `part`, by the clock and of processors."""
    started = time.process_time()
    with watches["clock"].measure(part):
        yield
    watches["processors"].add(part, time.process_time() - started)


def say(line: str) -> None:
    """Print a line of a table."""
    print(line, file=sys.stderr, flush=True)


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what this machine can, print it as it comes, and return it."""
    results: dict[str, Any] = {"seconds": {}}
    others = BACKENDS[1:]
    columns = "".join(f"{name:>12}" for name in (*BACKENDS, "product"))
    say(f"{'points':>10}{columns}   " + ", ".join(f"{name} / torch" for name in others))
    for count in arguments.sizes:
        seconds = results["seconds"][count] = time_engines(count, arguments.anchors, arguments.rounds)
        cells = "".join(f"{seconds[name]:>10.1f} s" for name in (*BACKENDS, "product"))
        ratios = ", ".join(f"{seconds[name] / seconds['torch']:.2f}" for name in others)
        say(f"{count:>10}{cells}   {ratios}")
    results["output"] = output = measure_output(arguments.images, arguments.buildings)
    say(f"output of {arguments.images} images, ids of {arguments.buildings} buildings: "
        f"{output['bytes_a_neighbor']:.2f} bytes a neighbour, merged in {output['seconds']:.1f} s")  # fmt: skip
    results["memory"] = memory = measure_memory(arguments.memory_sizes)
    say(f"memory of a search on the CPU: {memory}")
    with tempfile.TemporaryDirectory() as folder:
        results["host"] = measure_host(arguments.host_images, Path(folder), arguments.rounds)
    for kind, seconds in results["host"].items():
        cells = ", ".join(f"{part} {found:.2f}" for part, found in seconds.items())
        say(f"all but the search of {arguments.host_images} images, s by {kind}: {cells}; {sum(seconds.values()):.2f}")
    return results


def main() -> None:
    """Measure from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[20_000, 40_000, 100_000, 200_000])
    parser.add_argument("--anchors", type=int, default=2_048, help="anchors searched, of all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=count_cores(), help="threads of torch and faiss")
    parser.add_argument("--images", type=int, default=100_000, help="images of the output that is weighed")
    parser.add_argument("--buildings", type=int, default=1_000_000, help="buildings that its neighbours are of")
    parser.add_argument("--memory-sizes", type=int, nargs=2, default=[400_000, 1_000_000])
    parser.add_argument("--host-images", type=int, default=200_000, help="images of all but the search")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)  # what a process of its own is asked
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_search_memory(arguments.memory_of)
        return
    torch.set_num_threads(arguments.threads)
    if "faiss" in BACKENDS:
        import faiss

        faiss.omp_set_num_threads(arguments.threads)
    results = measure_all(arguments)
    names = ("torch", "triton", "faiss-cpu", "scikit-learn", "numpy", "pyarrow")
    results["versions"] = {name: installed_version(name) for name in names}
    results["machine"] = {"cores": count_cores(), "load": os.getloadavg()[0], "processor": platform.machine()}
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
