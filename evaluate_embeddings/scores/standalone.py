"""Score embeddings without a report: one dataset with labels, or two models side by side on the same images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from evaluate_embeddings.scores.fairness import doubt_split
from evaluate_embeddings.scores.tables import LabelledModels, format_models
from pipeline import cli
from pipeline.config import Config
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.errors import InputError
from pipeline.log import Progress, logger
from pipeline.retrieval.features import load_features
from pipeline.retrieval.labels import label_rows, read_ignore_pairs, resolve_pairs, to_text
from pipeline.retrieval.scores import normalise_rows, score_queries

if TYPE_CHECKING:
    import torch

STAGE = "evaluate"
CHECKPOINT_NAME = "checkpoint_best.pt"


@dataclass(frozen=True)
class EvaluateOptions(cli.Options):
    ignore_pairs: Path | None = None
    embeddings: Path | None = None
    labels: Path | None = None
    compare: Path | None = None


def run_standalone(config: Config, options: EvaluateOptions) -> cli.StageResult:
    """Score the models, log the table with the verdict last, and return the counts; write nothing."""
    from pipeline.inference.devices import choose_device

    result, scores, device = cli.StageResult(STAGE), [], choose_device(config.infrastructure.device)
    if options.embeddings is None:
        models = load_checkpoints(config, options, result, device)
    else:
        models = load_datasets(options.embeddings, options, result)
    for place, embeddings in zip(models.places, models.embeddings, strict=True):
        with Progress(f"score {place.name}", len(models.codes), "queries") as progress:
            one = {"ignored": models.ignored, "device": device, "progress": progress.advance}
            try:
                scores.append(score_queries(normalise_rows(embeddings), models.codes, **one))
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
    result.counts["out"] = len(models.codes)
    logger.info("%s:\n\n%s\n", STAGE, format_models(scores, models, config.global_.seed))
    return result


def load_datasets(folder: Path, options: EvaluateOptions, result: cli.StageResult) -> LabelledModels:
    """Read one or two embeddings datasets and the labels of their images, and count the images.

    Raises InputError if one cannot be read, their images differ, or no two images have one label.
    """
    places = [folder] if options.compare is None else [folder, options.compare]
    datasets = [EmbeddingsDataset(place) for place in places]
    ids, *others = (
        pa.chunked_array([to_text(one.folder, part.read([ID_COLUMN]).column(0)) for part in one.parts], pa.string())
        for one in datasets
    )
    for other in others:
        if not ids.equals(other):
            what = "in another order than" if ids.sort().equals(other.sort()) else "not"
            raise InputError(
                f"{places[1]}: its ids are {what} those of {folder}: embed the same input with both models"
            )
    buildings = label_rows(ids.combine_chunks(), options.labels)
    kept = np.flatnonzero(buildings.is_valid().to_numpy(zero_copy_only=False))
    result.counts["in"] = len(ids)
    if dropped := len(ids) - len(kept):
        result.add({"dropped": dropped}, {"no_label": dropped})
    encoded = buildings.take(pa.array(kept)).dictionary_encode()
    if len(kept) == len(encoded.dictionary):
        remedy = "give more images" if options.labels else "every image has an OSMID of its own: give --labels"
        raise InputError(f"{folder}: no two images have one label, so that nothing can be found: {remedy}")
    ignored = resolve_pairs(read_ignore_pairs(options.ignore_pairs), encoded.dictionary)
    embeddings = [np.concatenate(list(one.read_blocks()))[kept] for one in datasets]
    return LabelledModels(places, embeddings, encoded.indices.to_numpy().astype(np.int32), ignored)


def load_checkpoints(
    config: Config, options: EvaluateOptions, result: cli.StageResult, device: "torch.device"
) -> LabelledModels:
    from pipeline.retrieval.checkpoint import build_projector, load_checkpoint, project

    assert options.compare is not None  # else the report is written
    config.require_paths("merged_dir", "checkpoint_dir")
    test_path = config.path("merged_dir") / "test.parquet"
    features = load_features(test_path)
    result.counts["in"] = len(features)
    places = [config.path("checkpoint_dir") / CHECKPOINT_NAME, options.compare]
    section = config.training_model.model_copy(update={"input_dim": "auto", "output_dim": "auto"})  # of any width
    embeddings, notes = [], []
    for path in places:
        checkpoint = load_checkpoint(path, section, input_dim=features.width)
        if doubt := doubt_split(checkpoint, test_path, features.building_ids):
            notes.append(f"{doubt}.")
        embeddings.append(project(build_projector(checkpoint), features.embeddings, device))
    ignored = resolve_pairs(read_ignore_pairs(options.ignore_pairs), features.building_ids)
    return LabelledModels(places, embeddings, features.building_codes, ignored, notes=notes)
