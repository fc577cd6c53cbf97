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
from pipeline.retrieval.checkpoint import Checkpoint, hash_buildings, load_checkpoint
from pipeline.retrieval.features import Features, load_features, sample_buildings
from train_specialized_embeddings.sampling.band_sampler import BandSampler
from train_specialized_embeddings.sampling.feature_store import FeatureStore
from train_specialized_embeddings.sampling.neighbor_table import load_neighbors
from train_specialized_embeddings.training.metric_sinks import MetricSinks
from train_specialized_embeddings.training.run_files import RunFiles
from train_specialized_embeddings.training.starts import (
    Baselines,
    fit_baselines,
    load_warm_start,
    make_projector,
    restore_coordinates,
)
from train_specialized_embeddings.training.trainer import Trainer
from train_specialized_embeddings.training.training_run import TrainingRun
from train_specialized_embeddings.training.validation import ValidationSet, choose_validation_set


@dataclass(frozen=True)
class Material:
    """What all runs on the same splits share; the images are in the start's coordinates."""

    sampler: BandSampler
    store: FeatureStore
    validation: ValidationSet
    baselines: Baselines
    num_images: int  # of train and val
    trained_on: torch.Tensor  # hashes of the training buildings


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
        material = read_material(config, inputs, watch, saved=saved, embedded_with=provenance["embedded_with"])
        counts = {"in": material.num_images, "out": material.num_images}
        run = make_run(config, material)
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
    config: Config,
    inputs: dict[str, Path],
    watch: Stopwatch,
    *,
    num_buildings: int | None = None,
    saved: Checkpoint | None = None,
    embedded_with: Any = None,
) -> Material:
    """Read the splits and the difficulty table, and find the start; of the training split `num_buildings` at most.

    The start is that of a killed run (`saved`), another run's checkpoint or a fitted map. Raises InputError where an
    input cannot be trained on, PipelineError where the widths do not agree.
    """
    section, model, seed = config.training, config.training_model, config.global_.seed
    device = choose_device(config.infrastructure.device)
    with watch.measure("read"):
        train, val = load_features(inputs["train"]), load_features(inputs["val"])
        if num_buildings is not None:
            train = sample_buildings(train, num_buildings, seed)
        check_splits(inputs, train, val, model.input_dim)
        neighbors = load_neighbors(inputs["difficulty"], train)
        sampler = BandSampler(train, neighbors, seed, section.min_negative_distance_m, device)
    logger.info(
        "training on %d images of %d buildings, %d numbers each, on %s",
        len(train), len(train.building_ids), train.width, describe_device(device),
    )  # fmt: skip
    validation = choose_validation_set(val, section.validation_images, seed, device)
    torch.manual_seed(seed)
    with watch.measure("start"):
        warm = None
        if "init_checkpoint" in inputs:
            warm = load_warm_start(inputs["init_checkpoint"], model, train.width, embedded_with)
        if saved is not None:
            scores = {name: row for name, row in saved.metrics["val"].items() if name != "projector"}
            start = restore_coordinates(saved.rest["coordinates"])
            baselines = Baselines(start, saved.rest["start"], scores, warm and warm[1])
        else:
            baselines = fit_baselines(train, validation, model.output_dim, section, device, warm)
        return make_material(train, validation, sampler, baselines, len(train) + len(val))


def check_splits(inputs: dict[str, Path], train: Features, val: Features, input_dim: int | str) -> None:
    """Raise InputError where there is nothing to tell apart, PipelineError where the widths do not agree."""
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


def make_material(
    train: Features, validation: ValidationSet, sampler: BandSampler, baselines: Baselines, num_images: int
) -> Material:
    """Map the images to the start's coordinates; the training ones go where the steps need them."""
    map_rows = baselines.start.linear_map.map_rows
    store = FeatureStore(map_rows(train.embeddings), sampler.device)
    mapped = replace(validation, embeddings=map_rows(validation.embeddings))
    return Material(sampler, store, mapped, baselines, num_images, hash_buildings(train.building_ids.to_pylist()))


def make_run(config: Config, material: Material) -> TrainingRun:
    """Return a run at its start, which saves nothing until it has files; random weights come from torch's state."""
    start = material.baselines.start
    projector = make_projector(material.baselines, config.training_model, config.training.init)
    projector = projector.to(material.store.device)
    trainer = Trainer(projector, material.store, material.sampler, config.training, torch.from_numpy(start.spread))
    baselines = material.baselines
    return TrainingRun(
        config, trainer, start, material.validation, baselines.scores, baselines.note, material.trained_on
    )  # fmt: skip
