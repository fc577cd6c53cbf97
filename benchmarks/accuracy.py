"""Measure what stage 6 gains on unseen buildings: by cross-validation, or over the number of training buildings.

    python benchmarks/accuracy.py --config my.toml [--set training.loss=supcon] [--ignore-pairs overlaps.csv]
    python benchmarks/accuracy.py --config my.toml --test-merged-dir other/merged [--sizes 100 300 1000 3000]

Reads merged_dir and difficulty_metadata_path (stages 1 to 5) and joins the three splits. The first command cuts the
buildings into folds and tests each once; then (`elsewhere`) it tests each dataset with a projector trained on the
others, with no pair ignored. The second draws so many training buildings and tests on the other splits' buildings.
"""

import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from benchmarks.harness import make_parser, write_results
from pipeline.config import Config, load_config
from pipeline.log import Stopwatch
from pipeline.retrieval.checkpoint import project
from pipeline.retrieval.features import Features, load_features, take_buildings
from pipeline.retrieval.labels import read_ignore_pairs, resolve_pairs
from pipeline.retrieval.projector import Projector
from pipeline.retrieval.scores import normalise_rows, score_queries, summarize_scores
from pipeline.retrieval.whitening import collect_scatters, whiten_by_pca, whiten_within_class
from train_specialized_embeddings.sampling.neighbor_table import load_neighbors
from train_specialized_embeddings.training.fitting import make_material
from train_specialized_embeddings.training.training_run import TrainingRun

KINDS = ("raw", "pca_whitened", "whitening", "start", "projector")
SCORES = ("recall_at_1", "map")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One training and its test."""

    name: str  # buildings, elsewhere, or the number of training buildings
    seed: int
    fold: int  # or the dataset that is tested
    train: NDArray[np.bool_]  # (B,)
    val: NDArray[np.bool_]  # (B,)
    test: NDArray[np.bool_] | None  # (B,), or None for buildings of other splits


def read_all(merged_dir: Path) -> Features:
    """Return the images of the three splits as one."""
    parts = [load_features(merged_dir / f"{split}.parquet") for split in ("train", "val", "test")]
    offsets = np.cumsum([0, *(len(part.building_ids) for part in parts)])
    codes = [part.building_codes + offset for part, offset in zip(parts, offsets, strict=False)]
    columns = ("dataset_ids", "street_view_ids", "target_lat", "target_lon")
    return Features(
        embeddings=np.concatenate([part.embeddings for part in parts]),
        building_codes=np.concatenate(codes).astype(np.int32),
        building_ids=pa.concat_arrays([part.building_ids for part in parts]),
        image_ids=pa.concat_arrays([part.image_ids for part in parts]),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns},
    )


def list_cases(features: Features, config: Config, num_seeds: int, num_folds: int) -> Iterator[Case]:
    """Yield each fold of each seed, then each dataset as the test of each seed."""
    num_buildings = len(features.building_ids)
    for seed in range(num_seeds):
        fold_of = np.random.default_rng(seed).permutation(num_buildings) % num_folds
        for fold in range(num_folds):
            yield make_case("buildings", seed, fold, fold_of == fold, config)
    first_rows = np.unique(features.building_codes, return_index=True)[1]
    datasets = np.unique(features.dataset_ids)
    for seed, dataset in itertools.product(range(num_seeds), datasets.tolist() if len(datasets) > 1 else []):
        yield make_case("elsewhere", seed, dataset, features.dataset_ids[first_rows] == dataset, config)


def make_case(name: str, seed: int, fold: int, test: NDArray[np.bool_], config: Config) -> Case:
    """Return the case that tests some buildings and divides the rest into training and validation."""
    ratios, rest = config.data, np.flatnonzero(~test)
    shuffled = np.random.default_rng([seed, fold]).permutation(rest)
    num_val = round(len(rest) * ratios.val_ratio / (ratios.val_ratio + ratios.train_ratio))
    val = np.isin(np.arange(len(test)), shuffled[:num_val])
    return Case(name, seed, fold, ~test & ~val, val, test)


def list_sizes(features: Features, config: Config, num_seeds: int, sizes: list[int]) -> Iterator[Case]:
    """Yield a case for each size and seed, with as many validation buildings beside as the pipeline's ratio says."""
    num_buildings = len(features.building_ids)
    for size, seed in itertools.product(sizes, range(num_seeds)):
        num_val = max(2, round(size * config.data.val_ratio / config.data.train_ratio))
        if size + num_val > num_buildings:
            raise SystemExit(f"error: {size} training buildings need {num_val} more to validate: {num_buildings} exist")
        rank = np.random.default_rng(seed).permutation(num_buildings)
        yield Case(f"{size:,}", seed, 0, rank < size, (rank >= size) & (rank < size + num_val), None)


def run_case(config: Config, features: Features, other: Features | None, pairs: Any, case: Case) -> dict[str, Any]:
    """Train on what is not tested, and score every kind of embedding of the test buildings."""
    started = time.process_time()
    train, val = (take_buildings(features, np.flatnonzero(chosen)) for chosen in (case.train, case.val))
    test = other if case.test is None else take_buildings(features, np.flatnonzero(case.test))
    assert test is not None
    run = fit_projector(config, train, val, case.seed)
    seconds = time.process_time() - started
    ignored = resolve_pairs(pairs if case.name == "buildings" else None, test.building_ids)
    scores = {}
    for kind, rows in embed_kinds(config, run, train, test.embeddings).items():
        found = summarize_scores(score_queries(rows, test.building_codes, ignored=ignored))
        scores[kind] = {key: found[key] for key in SCORES}
    return {
        "case": case.name, "seed": case.seed, "fold": case.fold, "images": len(train), "cpu_seconds": round(seconds, 1),
        "best_epoch": run.best["epoch"],
        "start": run.best["start"], "scores": scores,
    }  # fmt: skip


def fit_projector(config: Config, train: Features, val: Features, seed: int) -> TrainingRun:
    """Train as stage 6 does, without its files."""
    config = config.model_copy(update={"global_": config.global_.model_copy(update={"seed": seed})})
    neighbors = load_neighbors(config.path("difficulty_metadata_path"), train)
    run = TrainingRun(config, make_material(config, train, val, neighbors), Stopwatch(), {})
    for _ in run.run_epochs("train"):
        pass
    run.settle()
    return run


def embed_kinds(
    config: Config, run: TrainingRun, train: Features, rows: NDArray[Any]
) -> dict[str, NDArray[np.float32]]:
    """Return every kind of embedding of rows (N, D) of other buildings than the run was trained on."""
    scatter = collect_scatters(train.embeddings, train.building_codes)[0]
    whitening = whiten_within_class(scatter, config.training_model.output_dim, run.best["start"]["shrinkage"])
    pca = whiten_by_pca(scatter, config.training_model.output_dim)
    projector = Projector(**run.best["architecture"])
    embeddings = {"raw": normalise_rows(rows), "pca_whitened": pca.apply(rows), "whitening": whitening.apply(rows)}
    start = run.material.start.coordinates.fold(run.trainer.origin)
    for kind, weights in (("start", start.state_dict()), ("projector", run.best["projector"])):
        projector.load_state_dict(weights)
        embeddings[kind] = project(projector, rows, CPU)
    return embeddings


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the table: mean scores of each kind, and its mAP beside the whitening's."""
    rows = []
    for name in dict.fromkeys(result["case"] for result in results):
        own = [result["scores"] for result in results if result["case"] == name]
        for kind in KINDS:
            means = {key: f"{np.mean([scores[kind][key] for scores in own]):.4f}" for key in SCORES}
            gains = [scores[kind]["map"] - scores["whitening"]["map"] for scores in own]
            gain = {"mAP - whitening": f"{np.mean(gains):+.4f}", "worst": f"{min(gains):+.4f}"}
            rows.append({"case": f"{name} ({len(own)})", "embeddings": kind, **means, **gain})
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--ignore-pairs", type=Path, help="for the folds over buildings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--test-merged-dir", type=Path, help="merged splits of other streets")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000, 3000], help="training buildings")
    parser.add_argument("--test-buildings", type=int, default=1000, help="at most, drawn once")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    features, other = read_all(config.path("merged_dir")), None
    cases = list_cases(features, config, arguments.seeds, arguments.folds)
    if arguments.test_merged_dir:
        other = read_all(arguments.test_merged_dir)
        drawn = np.random.default_rng(0).permutation(len(other.building_ids)) < arguments.test_buildings
        other = take_buildings(other, np.flatnonzero(drawn))
        cases = list_sizes(features, config, arguments.seeds, arguments.sizes)
    pairs = read_ignore_pairs(arguments.ignore_pairs) if arguments.ignore_pairs else None
    results = []
    run = partial(run_case, config, features, other, pairs)
    # The workers share the cores.
    with multiprocessing.get_context("spawn").Pool(arguments.workers, torch.set_num_threads, (1,)) as pool:
        for result in pool.imap(run, cases):
            results.append(result)
            print(f"{len(results)}: {result['case']}, seed {result['seed']}", file=sys.stderr)
    settings = {key: getattr(config, key).model_dump() for key in ("training", "training_model")}
    write_results(summarize(results), arguments.output, settings=settings, results=results)


if __name__ == "__main__":
    main()
