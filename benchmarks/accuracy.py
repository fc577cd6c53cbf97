"""Cross-validate stage 6 on whatever splits there are: what training is worth on buildings it has not seen.

    python benchmarks/accuracy.py --config my.toml [--set training.loss=supcon] [--ignore-pairs overlaps.csv]

Reads merged_dir and difficulty_metadata_path (stages 1 to 5) and puts the three splits together again. For each seed
the buildings are cut into folds; each fold is tested once, by the projector that stage 6's code trains on the others
(of which [data].val_ratio validate, as in the pipeline). Then `elsewhere`: each dataset is tested by what was trained
on the other ones, and no pair is ignored. Prints a table to stderr, and with --output writes every score as JSON.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from evaluate_embeddings.scores.ignore_pairs import read_ignore_pairs, resolve_pairs
from pipeline.config import Config, load_config
from pipeline.log import Progress
from pipeline.retrieval.candidates import IgnoredPairs
from pipeline.retrieval.checkpoint import project
from pipeline.retrieval.features import Features, load_features
from pipeline.retrieval.projector import Projector
from pipeline.retrieval.scores import normalise_rows, score_queries, summarize_scores
from pipeline.retrieval.whitening import fit_pca_whitening, fit_within_class_whitening
from train_specialized_embeddings.sampling.band_sampler import BandSampler
from train_specialized_embeddings.sampling.neighbor_table import load_neighbors
from train_specialized_embeddings.training.fitting import Material, make_run, store_coordinates
from train_specialized_embeddings.training.starts import fit_baselines
from train_specialized_embeddings.training.training_run import TrainingRun
from train_specialized_embeddings.training.validation import choose_validation_set

KINDS = ("raw", "pca_whitened", "whitening", "start", "projector")
SCORES = ("recall_at_1", "map")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One training and its test: the rows are cut by building."""

    name: str  # buildings or elsewhere
    seed: int
    fold: int
    test: NDArray[np.bool_]  # (B,) buildings that are tested
    ignores: bool


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


def take_buildings(features: Features, chosen: NDArray[np.bool_]) -> Features:
    """Return the images of the chosen buildings (B,), which are numbered anew."""
    rows = np.flatnonzero(chosen[features.building_codes])
    numbers = np.cumsum(chosen) - 1
    columns = ("embeddings", "dataset_ids", "street_view_ids", "target_lat", "target_lon")
    return replace(
        features,
        building_codes=numbers[features.building_codes[rows]].astype(np.int32),
        building_ids=features.building_ids.take(pa.array(np.flatnonzero(chosen))),
        image_ids=features.image_ids.take(pa.array(rows)),
        **{name: getattr(features, name)[rows] for name in columns},
    )


def list_cases(features: Features, num_seeds: int, num_folds: int) -> Iterator[Case]:
    """Yield each fold of each seed, then each dataset as the test of each seed."""
    num_buildings = len(features.building_ids)
    for seed in range(num_seeds):
        fold_of = np.random.default_rng(seed).permutation(num_buildings) % num_folds
        for fold in range(num_folds):
            yield Case("buildings", seed, fold, fold_of == fold, ignores=True)
    first_rows = np.unique(features.building_codes, return_index=True)[1]
    datasets = np.unique(features.dataset_ids)
    for seed, dataset in itertools.product(range(num_seeds), datasets.tolist() if len(datasets) > 1 else []):
        yield Case("elsewhere", seed, dataset, features.dataset_ids[first_rows] == dataset, ignores=False)


def run_case(config: Config, features: Features, case: Case, pairs: Any) -> dict[str, Any]:
    """Train on what is not tested, and score every kind of embedding of the test buildings."""
    ratios, seed = config.data, case.seed
    rest = np.flatnonzero(~case.test)
    shuffled = np.random.default_rng([seed, case.fold]).permutation(rest)
    num_val = round(len(rest) * ratios.val_ratio / (ratios.val_ratio + ratios.train_ratio))
    is_val = np.isin(np.arange(len(case.test)), shuffled[:num_val])
    train, val, test = (take_buildings(features, chosen) for chosen in (~case.test & ~is_val, is_val, case.test))
    run = fit_projector(config, train, val, seed)
    embeddings = embed_kinds(config, run, train, test.embeddings)
    ignored = resolve_pairs(pairs if case.ignores else None, test.building_ids)
    scores = {kind: score(rows, test, ignored) for kind, rows in embeddings.items()}
    validated = {kind: row["map"] for kind, row in run.best["metrics"]["val"].items()}
    return {
        "case": case.name, "seed": seed, "fold": case.fold, "best_epoch": run.best["epoch"],
        "start": {key: value for key, value in run.start.items() if key != "weights"},
        "validation_map": validated, "scores": scores,
    }  # fmt: skip


def fit_projector(config: Config, train: Features, val: Features, seed: int) -> TrainingRun:
    """Train as stage 6 does, without its files; the run's note of the start also holds its weights."""
    section = config.training
    torch.manual_seed(seed)
    validation = choose_validation_set(val, section.validation_images, seed)
    neighbors = load_neighbors(config.path("difficulty_metadata_path"), train)
    sampler = BandSampler(train, neighbors, seed, section.min_negative_distance_m, CPU)
    material = Material(train, validation, sampler, len(train) + len(val), CPU)
    baselines = fit_baselines(train, validation, config.training_model, section)
    run = make_run(config, material, store_coordinates(material, baselines.start), baselines)
    run.begin()
    run.start = run.start | {"weights": run.best["projector"]}
    with Progress("train", section.num_epochs * run.trainer.num_anchors, "anchor", 1e9) as progress:
        while not run.is_over:
            run.advance(progress)
    run.settle()
    return run


def embed_kinds(
    config: Config, run: TrainingRun, train: Features, rows: NDArray[Any]
) -> dict[str, NDArray[np.float32]]:
    """Return every kind of embedding of rows (N, D) of other buildings than the run was trained on."""
    whitening = fit_within_class_whitening(
        train.embeddings, train.building_codes, config.training_model.output_dim, run.start["shrinkage"]
    )
    pca = fit_pca_whitening(train.embeddings, config.training_model.output_dim)
    projector = Projector(**run.best["architecture"])
    embeddings = {
        "raw": normalise_rows(rows),
        "pca_whitened": pca.apply(rows),
        "whitening": whitening.apply(rows),
    }
    for kind, weights in (("start", run.start["weights"]), ("projector", run.best["projector"])):
        projector.load_state_dict(weights)
        embeddings[kind] = project(projector, rows, CPU)
    return embeddings


def score(rows: NDArray[np.float32], test: Features, ignored: IgnoredPairs | None) -> dict[str, float]:
    """Return Recall@1 and mAP."""
    found = summarize_scores(score_queries(rows, test.building_codes, ignored=ignored))
    return {key: found[key] for key in SCORES}


def format_table(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table: mean scores of each kind, and its mAP beside the whitening's."""
    lines = [f"{'':<26}{'R@1':>8}{'mAP':>8}{'mAP - whitening':>17}{'worst':>9}"]
    for name in dict.fromkeys(result["case"] for result in results):
        own = [result["scores"] for result in results if result["case"] == name]
        for kind in KINDS:
            recall, precision = (np.mean([scores[kind][key] for scores in own]) for key in SCORES)
            gains = [scores[kind]["map"] - scores["whitening"]["map"] for scores in own]
            lines.append(
                f"{f'{name} ({len(own)}) {kind}':<26}{recall:8.4f}{precision:8.4f}"
                f"{np.mean(gains):+17.4f}{min(gains):+9.4f}"
            )
    return lines


_shared: list[Any] = []


def _share(*values: Any) -> None:
    torch.set_num_threads(1)  # the workers share the cores
    _shared[:] = values


def _run_shared(case: Case) -> dict[str, Any]:
    config, features, pairs = _shared
    return run_case(config, features, case, pairs)


def main() -> None:
    """Cross-validate from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--ignore-pairs", type=Path, help="for the folds over buildings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    features = read_all(config.path("merged_dir"))
    pairs = read_ignore_pairs(arguments.ignore_pairs) if arguments.ignore_pairs else None
    started = time.monotonic()
    shared = (config, features, pairs)
    with multiprocessing.get_context("spawn").Pool(arguments.workers, _share, shared) as pool:
        results = []
        for result in pool.imap(_run_shared, list_cases(features, arguments.seeds, arguments.folds)):
            results.append(result)
            print(f"{len(results)}: {time.monotonic() - started:.0f} s", end="\r", file=sys.stderr)
    print("\n".join(["", *format_table(results)]), file=sys.stderr)
    if arguments.output:
        settings = {"training": config.training.model_dump(), "training_model": config.training_model.model_dump()}
        arguments.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1))


if __name__ == "__main__":
    main()
