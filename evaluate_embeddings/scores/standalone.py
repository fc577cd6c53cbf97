"""Score embeddings without a report: one dataset with labels, or two models side by side on the same images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from evaluate_embeddings.scores.embeddings_table import read_embeddings
from evaluate_embeddings.scores.fairness import doubt_split
from evaluate_embeddings.scores.tables import LabelledModels, format_models
from pipeline import cli
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.log import Progress, logger
from pipeline.retrieval.features import load_features
from pipeline.retrieval.labels import label_rows, match_rows, read_ignore_pairs, resolve_pairs
from pipeline.retrieval.scores import score_queries

STAGE = "evaluate"
CHECKPOINT_NAME = "checkpoint_best.pt"


@dataclass(frozen=True)
class EvaluateOptions(cli.Options):
    """The command line's options beyond the configuration."""

    ignore_pairs: Path | None = None
    no_images: bool = False
    embeddings: Path | None = None
    labels: Path | None = None
    compare: Path | None = None


def run_standalone(config: Config, options: EvaluateOptions) -> cli.StageResult:
    """Score the models, log the table with the verdict last, and return the counts; write nothing."""
    from pipeline.inference.devices import choose_device

    result = cli.StageResult(STAGE)
    if options.embeddings is None:
        models = load_checkpoints(config, options, result)
    else:
        models = load_datasets(options.embeddings, options, result)
    scores, device = [], choose_device(config.infrastructure.device)
    for place, embeddings in zip(models.places, models.embeddings, strict=True):
        with Progress(f"score {place.name}", len(models.codes), "queries") as progress:
            one = {"ignored": models.ignored, "device": device, "progress": progress.advance}
            try:
                scores.append(score_queries(embeddings, models.codes, **one))
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
    text = format_models(scores, models, config.global_.seed)
    result.rows_out = len(models.codes)
    logger.info("%s:\n\n%s\n", STAGE, text)
    return result


def load_datasets(folder: Path, options: EvaluateOptions, result: cli.StageResult) -> LabelledModels:
    """Read one or two embeddings datasets and the labels of their images, and count the images.

    Raises InputError if one cannot be read, they have no image in common, or no two images have one label.
    """
    ids, rows = read_embeddings(folder)
    places, embeddings, result.rows_in = [folder], [rows], len(ids)
    if options.compare is not None:
        if options.compare.is_file():
            raise InputError(f"{options.compare}: a file: with --embeddings, --compare takes an embeddings dataset")
        other_ids, other = read_embeddings(options.compare)
        own_places, other_places = match_rows(ids, other_ids, str(options.compare))
        if dropped := len(ids) - len(own_places):
            result.add({"dropped": dropped}, {"not_in_both": dropped})
        ids = ids.take(pa.array(own_places))
        places, embeddings = [folder, options.compare], [rows[own_places], other[other_places]]
    buildings = label_rows(ids, options.labels)
    kept = np.flatnonzero(buildings.is_valid().to_numpy(zero_copy_only=False))
    if dropped := len(ids) - len(kept):
        result.add({"dropped": dropped}, {"no_label": dropped})
    encoded = buildings.take(pa.array(kept)).dictionary_encode()
    if len(kept) == len(encoded.dictionary):
        remedy = "give more images" if options.labels else "every image has an OSMID of its own: give --labels"
        raise InputError(f"{folder}: no two images have one label, so that nothing can be found: {remedy}")
    ignored = resolve_pairs(read_ignore_pairs(options.ignore_pairs), encoded.dictionary)
    codes = encoded.indices.to_numpy().astype(np.int32)
    return LabelledModels(places, [one[kept] for one in embeddings], codes, ignored)


def load_checkpoints(config: Config, options: EvaluateOptions, result: cli.StageResult) -> LabelledModels:
    """Embed the test split with the configured checkpoint and with another one."""
    from pipeline.inference.devices import choose_device
    from pipeline.retrieval.checkpoint import build_projector, load_checkpoint, project

    assert options.compare is not None  # else the report is written
    if options.compare.is_dir():
        raise InputError(f"{options.compare}: a folder: without --embeddings, --compare takes another checkpoint")
    config.require_paths("merged_dir", "checkpoint_dir")
    test_path = config.path("merged_dir") / "test.parquet"
    features = load_features(test_path)
    result.rows_in = len(features)
    places = [config.path("checkpoint_dir") / CHECKPOINT_NAME, options.compare]
    section = config.training_model.model_copy(update={"input_dim": "auto", "output_dim": "auto"})  # of any width
    embeddings, notes = [], []
    for path in places:
        checkpoint = load_checkpoint(path, section, input_dim=features.width)
        if doubt := doubt_split(checkpoint, test_path, features.building_ids):
            notes.append(f"{doubt}.")
        device = choose_device(config.infrastructure.device)
        embeddings.append(project(build_projector(checkpoint), features.embeddings, device))
    ignored = resolve_pairs(read_ignore_pairs(options.ignore_pairs), features.building_ids)
    return LabelledModels(places, embeddings, features.building_codes, ignored, notes=notes)
