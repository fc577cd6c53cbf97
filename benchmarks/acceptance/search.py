"""Phase 2: stage 5's exact engines on hard points, and the whole stage from fingerprints to the output file."""

import math
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks import synthetic
from benchmarks.acceptance.findings import Findings
from benchmarks.harness import ROUNDS, read_peak, run_steady
from benchmarks.synthetic import NEIGHBORS, make_points
from difficulty_metadata import compute_visual_neighbors as stage5
from difficulty_metadata.neighbor_search import neighbors
from difficulty_metadata.neighbor_search.neighbors import SPARE_CANDIDATES, NeighborSearch
from pipeline import cli
from pipeline.config import load_config

FULL = 5_772_534  # images of the first city
BRUTE_QUERIES = 300
# Anchors that torch's slow tiles search.
TILED_ANCHORS = 262_144
# Shares of the points: closer together than float32 resolves, and equal to another point.
CLUSTER_SHARE, DUPLICATE_SHARE = 0.01, 0.05

Points = tuple[NDArray[np.float32], NDArray[np.int32]]


def compare_engines(findings: Findings) -> None:
    """Search hard points by the engine that the stage takes, by torch's tiles and by brute force."""
    count, num_neighbors = (2_000, 10) if findings.is_toy else (1_000_000, NEIGHBORS)
    points, codes = make_hard_points(count, num_neighbors)
    anchors = np.arange(count)
    with findings.part("the stage's engine"):
        search = NeighborSearch(points, codes, num_neighbors, "auto", findings.device)
        kind = type(search._engine).__name__
        seconds, (rows, distances) = run_steady(lambda: search.find(anchors))
        findings.note(engine=kind, search_s=seconds)
        # With fewer, the points would be too easy to reveal a wrong bound.
        redone = search.num_redone / count / (1 + ROUNDS)
        findings.check("searches repeated, of all", redone, at_least=CLUSTER_SHARE / 2)
        findings.check("the engine is Triton's", float(kind == "TritonEngine" or findings.is_toy), at_least=1)
    with findings.part("brute force"):
        wrong = count_wrong((points, codes), anchors, distances, findings.device)
        findings.check(f"wrong of {BRUTE_QUERIES} by brute force", wrong, at_most=0)
    with findings.part("tiles"):
        chosen = np.sort(np.random.default_rng(2).choice(count, min(count, TILED_ANCHORS), replace=False))
        tiled = make_tiled_search((points, codes), num_neighbors, findings.device)
        seconds, expected = run_steady(lambda: tiled.find(chosen))
        differs = (rows[chosen] != expected[0]).any(axis=1) | (distances[chosen] != expected[1]).any(axis=1)
        findings.check(f"other answers than tiles, of {len(chosen)}", int(differs.sum()), at_most=0)
        findings.note(tiles_s=seconds * count / len(chosen))


def make_hard_points(count: int, num_neighbors: int) -> Points:
    """Return points (N, 32) and their buildings (N,) with a dense cluster and duplicates among them."""
    points, codes = make_points(count)
    generator = np.random.default_rng(1)
    size = max(round(CLUSTER_SHARE * count), 4 * (num_neighbors + SPARE_CANDIDATES))
    dense = generator.choice(count, size, replace=False)
    points[dense] = points[0] + 1e-6 * generator.standard_normal((size, points.shape[1]), np.float32)
    copies = generator.choice(count, round(DUPLICATE_SHARE * count), replace=False)
    points[copies] = points[generator.choice(count, len(copies))]
    return points, codes


def make_tiled_search(points: Points, num_neighbors: int, device: torch.device) -> NeighborSearch:
    """Return a search by torch's tiles, whatever the device has; on a CPU, where the stage takes them, by BallTree."""
    if device.type == "cpu":
        return NeighborSearch(*points, num_neighbors, "balltree", device)
    with patch.object(neighbors, "_MIN_TRITON_POINTS", math.inf):
        return NeighborSearch(*points, num_neighbors, "torch", device)


def count_wrong(points: Points, rows: NDArray[np.int64], distances: NDArray[np.float32], device: torch.device) -> int:
    """Return how many of BRUTE_QUERIES rows drawn from (A,) have distances (A, k) that brute force contradicts.

    The tolerance is 1e-6, because the distances are float32.
    """
    all_points, all_codes = torch.from_numpy(points[0]).to(device).double(), torch.from_numpy(points[1]).to(device)
    places = np.random.default_rng(4).choice(len(rows), min(BRUTE_QUERIES, len(rows)), replace=False)
    num_wrong = 0
    for place in places.tolist():
        row = int(rows[place])
        squared = (all_points - all_points[row]).square().sum(dim=1)
        squared[all_codes == all_codes[row]] = torch.inf
        true = squared.topk(distances.shape[1], largest=False).values.sqrt().cpu().numpy()
        num_wrong += not np.allclose(distances[place], true, rtol=1e-6, atol=0)
    return num_wrong


def search_all(findings: Findings) -> None:
    """Run stage 5 on as many images as the first city has, and check its file by brute force."""
    count = 2_000 if findings.is_toy else FULL
    folder = findings.work_dir
    with findings.part("the phase's own data"):
        synthetic.make_fingerprints(folder, count)
    device = "cpu" if findings.is_toy else "cuda"
    config = load_config(synthetic.make_config(folder, infrastructure={"device": device}))
    seen: dict[str, Any] = {}
    compute_points = stage5.compute_points

    def keep_points(images: Any, *arguments: Any) -> NDArray[np.float32]:
        seen["codes"], seen["points"] = images.building_codes, compute_points(images, *arguments)
        return seen["points"]

    with findings.part("stage 5"):
        started = time.perf_counter()
        with patch.object(stage5, "compute_points", keep_points):
            result = stage5.run(config, cli.Options())
        seconds = time.perf_counter() - started
        findings.note(images=count, total_s=seconds, by_phase_s=result.watch.seconds, peak_host_gb=read_peak() / 1e9)
        if not findings.is_toy:
            findings.note(peak_gpu_gb=torch.cuda.max_memory_allocated() / 1e9)
        findings.aim(f"stage 5 of {count:,} images, s", seconds, at_most=180)
    with findings.part("brute force"):
        path = config.path("difficulty_metadata_path")
        rows, distances = read_some(path)
        findings.check("rows of the output", pq.read_metadata(path).num_rows, at_least=count)
        wrong = count_wrong((seen["points"], seen["codes"]), rows, distances, findings.device)
        findings.check(f"wrong of {BRUTE_QUERIES} by brute force", wrong, at_most=0)


def read_some(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the rows (A,) and distances (A, k) of up to six row groups of the output, the last one among them."""
    file = pq.ParquetFile(path)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    rows, distances = [], []
    for group in np.unique(np.linspace(0, len(sizes) - 1, 6).astype(int)).tolist():
        column = file.read_row_group(group, ["neighbor_distances_meters"]).column(0).combine_chunks()
        rows.append(np.arange(starts[group], starts[group + 1]))
        distances.append(column.flatten().to_numpy().reshape(sizes[group], -1))
    return np.concatenate(rows), np.concatenate(distances)
