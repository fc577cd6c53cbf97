"""Fit a projector to a training split: check the data, find the start or resume a killed run, and train."""

from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config
from pipeline.errors import InputError, PipelineError
from pipeline.files import tables
from pipeline.inference.devices import choose_device, describe_device, needing_memory
from pipeline.log import Stopwatch, logger
from pipeline.retrieval.checkpoint import Checkpoint, load_checkpoint
from pipeline.retrieval.features import Features, load_features, sample_buildings
from train_specialized_embeddings.sampling.band_sampler import BandSampler
from train_specialized_embeddings.sampling.feature_store import FeatureStore
from train_specialized_embeddings.sampling.neighbor_table import load_neighbors
from train_specialized_embeddings.training.coordinates import Coordinates, restore_coordinates
from train_specialized_embeddings.training.metric_sinks import MetricSinks
from train_specialized_embeddings.training.run_files import RunFiles
from train_specialized_embeddings.training.starts import Baselines, fit_baselines, load_warm_start, make_projector
from train_specialized_embeddings.training.trainer import Trainer
from train_specialized_embeddings.training.training_run import TrainingRun
from train_specialized_embeddings.training.validation import ValidationSet, choose_validation_set


@dataclass(frozen=True)
class Material:
    """The data that every run on the same splits shares."""

    train: Features
    validation: ValidationSet
    sampler: BandSampler
    num_images: int  # of train and val
    device: torch.device


def fit(
    config: Config, inputs: dict[str, Path], provenance: dict[str, Any], files: RunFiles, watch: Stopwatch
) -> dict[str, int]:
    """Train, or resume a killed run, until the run is complete; return the counts of rows.

    Raises InputError where an input cannot be trained on, StaleOutputError where the killed run had other inputs or
    settings, PipelineError where training diverges.
    """
    saved = None
    if files.latest.exists():
        saved = load_checkpoint(files.latest)
        tables.matches(files.latest, saved.provenance or None, provenance)
    with closing(MetricSinks(config.logging, files.folder, provenance)) as sinks, training_within_memory(config):
        material = read_material(config, inputs, watch)
        torch.manual_seed(config.global_.seed)
        with watch.measure("start"):
            baselines = find_start(config, material, saved, inputs.get("init_checkpoint"), provenance)
            store = store_coordinates(material, baselines.start)
        counts = {"in": material.num_images, "out": material.num_images}
        run = make_run(config, material, store, baselines)
        run.files, run.watch, run.sinks, run.provenance = files, watch, sinks, provenance | {"counts": counts}
        if saved is not None:
            run.resume(saved)
        run.complete()
    return counts


def training_within_memory(config: Config) -> AbstractContextManager[None]:
    """Tell the user what to do where the GPU's memory does not hold the tables or a step's batch.

    A smaller batch is not tried: it would give other weights.
    """
    return needing_memory(
        f"training with [training].batch_size = {config.training.batch_size}",
        "lower that and begin anew (--overwrite), or go on with [infrastructure].device set to cpu",
    )


def read_material(
    config: Config, inputs: dict[str, Path], watch: Stopwatch, num_buildings: int | None = None
) -> Material:
    """Read and check the splits and the difficulty table; of the training split `num_buildings` at most.

    Raises InputError where an input cannot be trained on, PipelineError where the widths do not agree.
    """
    section, seed = config.training, config.global_.seed
    device = choose_device(config.infrastructure.device)
    with watch.measure("read"):
        train, val = load_features(inputs["train"]), load_features(inputs["val"])
        if num_buildings is not None:
            train = sample_buildings(train, num_buildings, seed)
        check_splits(config, inputs, train, val)
        neighbors = load_neighbors(inputs["difficulty"], train)
        sampler = BandSampler(train, neighbors, seed, section.min_negative_distance_m, device)
    logger.info(
        "training on %d images of %d buildings, %d numbers each, on %s",
        len(train), len(train.building_ids), train.width, describe_device(device),
    )  # fmt: skip
    validation = choose_validation_set(val, section.validation_images, seed, device)
    return Material(train, validation, sampler, len(train) + len(val), device)


def check_splits(config: Config, inputs: dict[str, Path], train: Features, val: Features) -> None:
    """Raise InputError where there is nothing to tell apart, PipelineError where the widths do not agree."""
    if len(train.building_ids) < 2:
        raise InputError(f"{inputs['train']}: holds one building, training needs two: give more tars to the split")
    if len(train) == len(train.building_ids):
        raise InputError(f"{inputs['train']}: no building has two images, so there is no positive: run stage 3 again")
    wanted = config.training_model.input_dim
    if wanted not in ("auto", train.width):
        raise PipelineError(
            f"{inputs['train']}: its embeddings have {train.width} numbers, [training_model].input_dim asks for "
            f'{wanted}: set input_dim to "auto", or use that backbone'
        )
    if val.width != train.width:
        raise PipelineError(
            f"{inputs['val']}: its embeddings have {val.width} numbers, those of {inputs['train'].name} "
            f"{train.width}: run stage 3 again"
        )


def find_start(
    config: Config,
    material: Material,
    saved: Checkpoint | None,
    init_checkpoint: Path | None,
    provenance: dict[str, Any],
) -> Baselines:
    """Return the start and the baselines' scores: those of a killed run, or fitted to the training split.

    A checkpoint to start from brings its own coordinates; the baselines are fitted to this run's images all the same.
    """
    warm = None
    if init_checkpoint is not None:
        embedded_with = provenance.get("embedded_with")
        coordinates, warm = load_warm_start(init_checkpoint, config, material.train.width, embedded_with)
    if saved is not None:
        scores = {name: row for name, row in saved.metrics["val"].items() if name != "projector"}
        return Baselines(restore_coordinates(saved.rest["coordinates"]), saved.rest["start"], scores, warm)
    model, section = config.training_model, config.training
    if warm is None:
        return fit_baselines(material.train, material.validation, model, section, material.device)
    section = section.model_copy(update={"init": "whitening"})  # no other start is fitted
    fitted = fit_baselines(material.train, material.validation, model, section, material.device)
    return replace(fitted, start=coordinates, note=fitted.note | {"init": "checkpoint"}, warm=warm)


def store_coordinates(material: Material, coordinates: Coordinates) -> FeatureStore:
    """Return the training images in coordinates, where the steps need them."""
    return FeatureStore(coordinates.linear_map.map_rows(material.train.embeddings), material.device)


def make_run(config: Config, material: Material, store: FeatureStore, baselines: Baselines) -> TrainingRun:
    """Return a run at its start, which saves nothing until it has files."""
    start = baselines.start
    projector = make_projector(baselines, config.training_model, config.training).to(material.device)
    trainer = Trainer(projector, store, material.sampler, config.training, torch.from_numpy(start.spread))
    validation = replace(material.validation, embeddings=start.linear_map.map_rows(material.validation.embeddings))
    return TrainingRun(config, trainer, start, validation, baselines.scores, baselines.note)
