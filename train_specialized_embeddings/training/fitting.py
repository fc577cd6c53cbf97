"""Fit a projector to a training split: read the data, find the start or resume a killed run, train, and write."""

import json
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

from pipeline import workspace
from pipeline.config import Config
from pipeline.errors import InputError, PipelineError
from pipeline.files import tables
from pipeline.inference.devices import choose_device, describe_device, needing_memory
from pipeline.inference.model_files import compare_embedded
from pipeline.log import Stopwatch, logger
from pipeline.retrieval.checkpoint import Checkpoint, going_on_from, hash_buildings, load_checkpoint, save_checkpoint
from pipeline.retrieval.features import Features, check_one_run, load_features, sample_buildings
from train_specialized_embeddings.sampling.band_sampler import BandSampler
from train_specialized_embeddings.sampling.neighbor_table import Neighbors, load_neighbors
from train_specialized_embeddings.training import run_files
from train_specialized_embeddings.training.metric_sinks import sending_metrics
from train_specialized_embeddings.training.starts import fit_start, restore_start
from train_specialized_embeddings.training.trainer import move_features
from train_specialized_embeddings.training.training_run import Material, TrainingRun
from train_specialized_embeddings.training.validation import choose_validation_set, log_verdict

# An epoch on little data takes less time than syncing its state to disk; a kill costs at most this, or an epoch.
SAVE_INTERVAL_SECONDS = 10.0


def fit(
    config: Config, inputs: dict[str, Path], provenance: dict[str, Any], folder: Path, watch: Stopwatch
) -> dict[str, int]:
    """Train, or resume a killed run, until the run is complete; return the counts of rows.

    Raises InputError where an input cannot be trained on, StaleOutputError where the killed run had other inputs or
    settings, PipelineError where training diverges or no negative can be drawn.
    """
    saved, latest = None, folder / run_files.LATEST
    if latest.exists():
        saved = load_checkpoint(latest)
        tables.matches(latest, saved.provenance or None, provenance)
    with sending_metrics(config.logging, folder, provenance) as send, training_within_memory(config):
        material = read_material(config, inputs, provenance, watch, saved)
        counts = {"in": material.num_images, "out": material.num_images}
        provenance = provenance | {"counts": counts}
        run = TrainingRun(config, material, watch, provenance, saved.rest if saved else None)
        for record in run.history:
            send(record)
        if saved is not None:
            _save(run, folder)  # a kill may have come between the state and the other files
        saved_at = time.monotonic()
        for record in run.run_epochs("train"):
            send(record)
            run.log_epoch(record)
            if run.is_periodic or run.is_over or time.monotonic() - saved_at > SAVE_INTERVAL_SECONDS:
                _save(run, folder)
                saved_at = time.monotonic()
        run.settle()
        save_checkpoint(folder / run_files.BEST, run.best)
        epoch, val = run.best["epoch"], run.best["metrics"]["val"]
        mark = provenance | {"best_epoch": epoch, "val": val, "outputs": run_files.digest_outputs(folder)}
        workspace.write_json(folder / run_files.PROVENANCE, mark)
        workspace.remove(latest)
        log_verdict(val, epoch)
    return counts


def _save(run: TrainingRun, folder: Path) -> None:
    """Write the state that a killed run resumes from, then the files that follow from it."""
    lines, last = [json.dumps(record, allow_nan=False) for record in run.history], run.describe()
    with run.watch.measure("write"):
        save_checkpoint(folder / run_files.LATEST, last | run.describe_rest())
        with workspace.writing_to(folder / run_files.METRICS) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        save_checkpoint(folder / run_files.BEST, run.best)
        if run.is_periodic:
            save_checkpoint(folder / run_files.PERIODIC.format(run.epoch), last)
        if run.is_over:
            save_checkpoint(folder / run_files.FINAL, last)


def training_within_memory(config: Config) -> AbstractContextManager[None]:
    """Tell the user what to do where the GPU's memory does not hold the tables or a step's batch.

    A smaller batch is not tried: it would give other weights.
    """
    return needing_memory(
        f"training with [training].batch_size = {config.training.batch_size}",
        "set a smaller number and begin anew (--overwrite), or go on with [infrastructure].device set to cpu",
    )


def read_material(
    config: Config, inputs: dict[str, Path], provenance: dict[str, Any], watch: Stopwatch,
    saved: Checkpoint | None = None,
) -> Material:  # fmt: skip
    """Read the splits and the difficulty table, and find the start.

    The start is that of a killed run (`saved`), another run's checkpoint or a fitted map. Raises InputError where an
    input cannot be trained on, PipelineError where the widths do not agree.
    """
    with watch.measure("read"):
        check_one_run(inputs["train"], inputs["val"])
        train, val = load_features(inputs["train"]), load_features(inputs["val"])
        if config.training.sample_buildings is not None:
            train = sample_buildings(train, config.training.sample_buildings, config.global_.seed)
        check_splits(inputs, train, val, config.training_model.input_dim)
        neighbors = load_neighbors(inputs.get("difficulty"), train)
    warm = None
    if "init_checkpoint" in inputs and saved is None:
        warm = load_checkpoint(inputs["init_checkpoint"], config.training_model, input_dim=train.width)
        if found := compare_embedded(*(one.get("embedded_with") for one in (warm.provenance, provenance))):
            raise InputError(
                f"{warm.path}: trained on other embeddings ({found}): leave out [training].init_checkpoint, or use the "
                "same embeddings"
            )
        logger.info("training starts from %s, whose architecture it keeps", warm.path)
        if seen := warm.count_trained_on(val.building_ids.to_pylist()):
            logger.warning("%s: trained on %d of the validation buildings, which flatter it", warm.path, seen)
        warm = replace(warm, architecture=warm.architecture | {"dropout": config.training_model.dropout})
    with watch.measure("start"):
        return make_material(config, train, val, neighbors, saved, warm)


def check_splits(inputs: dict[str, Path], train: Features, val: Features, input_dim: int | str) -> None:
    """Warn if the splits share buildings.

    Raises InputError where there is nothing to tell apart, PipelineError where the widths do not agree.
    """
    if len(train.building_ids) < 2:
        raise InputError(f"{inputs['train']}: holds one building, training needs two: give more tars to the split")
    if len(train) == len(train.building_ids):
        raise InputError(f"{inputs['train']}: no building has two images, so there is no positive: run stage 3 again")
    if input_dim not in ("auto", train.width):
        raise PipelineError(
            f"{inputs['train']}: its embeddings have {train.width} numbers, [training_model].input_dim asks for "
            f'{input_dim}: set input_dim to "auto", or use that backbone'
        )
    if val.width != train.width:
        raise PipelineError(
            f"{inputs['val']}: its embeddings have {val.width} numbers, those of {inputs['train'].name} "
            f"{train.width}: run stage 3 again"
        )
    if shared := int(pc.sum(pc.is_in(val.building_ids, value_set=train.building_ids)).as_py()):
        logger.warning("%s: %d of its buildings are trained on, which flatter the run", inputs["val"], shared)


def make_material(
    config: Config, train: Features, val: Features, neighbors: Neighbors,
    saved: Checkpoint | None = None, warm: Checkpoint | None = None,
) -> Material:  # fmt: skip
    """Find the start, and map the images to its coordinates; the training ones go where the steps need them."""
    section, seed = config.training, config.global_.seed
    trained_on = torch.unique(hash_buildings(train.building_ids.to_pylist()))
    if (earlier := saved or warm) is not None:  # whose buildings have shaped the start; some do not name them
        before = earlier.rest.get("trained_on")
        trained_on = None if not isinstance(before, torch.Tensor) else torch.unique(torch.cat([before, trained_on]))
    device = choose_device(config.infrastructure.device)
    sampler = BandSampler(train, neighbors, seed, section.min_negative_distance_m, device)
    logger.info("training on %d images of %d buildings, %d numbers each, on %s",
                len(train), len(train.building_ids), train.width, describe_device(device))  # fmt: skip
    validation = choose_validation_set(val, section.validation_images, seed, device, section.recall_ranks)
    if saved is not None:
        with going_on_from(saved.path):
            scores = {name: row for name, row in saved.metrics["val"].items() if name != "projector"}
            start = restore_start(saved, saved.rest["start"], scores)
    else:
        start = fit_start(train, validation, config.training_model.output_dim, section, device, warm)
    map_rows = partial(start.coordinates.linear_map.map_rows, device=device if device.type == "cuda" else None)
    features = move_features(map_rows(train.embeddings), device)
    validation = replace(validation, embeddings=map_rows(validation.embeddings))
    return Material(sampler, features, validation, start, len(train) + len(val), trained_on)
