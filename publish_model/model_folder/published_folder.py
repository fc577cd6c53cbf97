"""Check what a model is published from, and fill its folder: weights, settings, processor, code, licence, card."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.errors import InputError, PipelineError
from pipeline.files.identity import hash_json, identify
from pipeline.files.list_columns import find_embedding
from pipeline.files.tables import PROVENANCE_KEY, open_parquet, read_batches
from pipeline.inference.backbone import check_embeddings
from pipeline.inference.loading import find_vision_config, load_model, naming_model, writing_weights
from pipeline.inference.model_files import (
    compare_embedded,
    digest_published,
    embedding_settings,
    identify_model,
    read_settings,
)
from pipeline.log import logger
from pipeline.retrieval.checkpoint import Checkpoint, build_projector, load_checkpoint, project
from pipeline.retrieval.geography import is_position
from pipeline.retrieval.pair_table import describe_pairs
from pipeline.workspace import parse_json
from publish_model.model_folder.model_card import ModelParts, is_measured, list_licences, worse_than, write_card
from publish_model.model_folder.published_model import RATES_NAME, describe_model, drop_code, read_code
from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel

# Of one file; the hub takes up to 50 GB.
MAX_SHARD_BYTES = 5_000_000_000
# 4,000 images make 8 million pairs: rates down to 1e-7, and an average linkage of a few seconds.
NUM_QUERIES = 4000
# A sample is read from so many row groups: a split of 5.8 million images has 95 GB.
NUM_ROW_GROUPS = 16
POSITION_COLUMNS = ("street_lat", "street_lon")


def read_parts(config: Config, checkpoint_path: Path, backbone_dir: Path, force: bool) -> ModelParts:
    """Return the parts of the published model.

    Raises InputError if the checkpoint does not fit the backbone, PipelineError if its projector is worse than no
    training and `force` is off.
    """
    section, settings = config.embedding_model, read_settings(backbone_dir / "config.json")
    checkpoint = load_checkpoint(checkpoint_path, config.training_model)
    wanted = {"model": identify_model(backbone_dir), **embedding_settings(section)}
    if difference := compare_embedded(checkpoint.provenance.get("embedded_with"), wanted):
        raise InputError(
            f"{checkpoint.path}: trained on other embeddings than the configuration's ({difference}): set "
            "[embedding_model] as it was, or run stages 2, 3 and 6 again"
        )
    metrics = check_worth(checkpoint, force)
    vision = find_vision_config(backbone_dir)
    settings = vision.to_dict() if "vision_config" in settings else settings
    name = section.model_name or ""  # a hub id without its revision, or a local folder's name, never its path
    local = config.expand(name, "[embedding_model].model_name")
    name = local.name if local.is_dir() else name.partition("@")[0]
    described = describe_model(name, settings, section, checkpoint.architecture)
    rates = measure_pairs(config, checkpoint)
    return ModelParts(backbone_dir, vision, described, checkpoint, section.input_size, metrics, rates)


def check_worth(checkpoint: Checkpoint, force: bool) -> dict[str, dict[str, float]]:
    """Return the validation metrics of projector and baselines, empty if they were not measured.

    Raises PipelineError if the projector's mAP is below a baseline's and `force` is off.
    """
    metrics = checkpoint.metrics.get("val")
    if not isinstance(metrics, dict) or not is_measured(metrics):
        logger.warning("%s: carries no validation metrics: published as not measured", checkpoint.path)
        return {}
    if below := worse_than(metrics):
        figures = ", ".join(f"{row} {metrics[row]['map']:.4f}" for row in (*below, "projector"))
        message = f"{checkpoint.path}: its projector retrieves worse than no training (validation mAP: {figures})"
        if not force:
            raise PipelineError(f"{message}: train on more data or with other settings, or publish it with --force")
        logger.warning("%s: published all the same, the model card says so", message)
    return {row: values for row, values in metrics.items() if isinstance(values, dict)}


def sample_rows(path: Path) -> tuple[NDArray[np.float32], pa.Table]:
    """Return (N, D) backbone features of about NUM_QUERIES rows of a split, and their buildings and positions.

    Some row groups are read, and of each the first rows, which are of whole buildings.
    """
    column = find_embedding(path)
    with open_parquet(path) as file:
        groups = np.unique(np.linspace(0, file.num_row_groups - 1, NUM_ROW_GROUPS).astype(int)).tolist()
        names = [name for name in ("building_id", *POSITION_COLUMNS) if name in file.schema_arrow.names]
    streams = (read_batches(path, [column.name, *names], -(-NUM_QUERIES // len(groups)), [one]) for one in groups)
    batches = [batch for stream in streams for batch in itertools.islice(stream, 1)]
    features = np.concatenate([column.read(batch[column.name], 0) for batch in batches])
    return features.astype(np.float32), pa.Table.from_batches(batches).select(names)


def measure_pairs(config: Config, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the content of pair_rates.json, None if the merged splits are not those of the checkpoint.

    The splits hold the backbone features, so no image is embedded again.
    """
    if config.paths.merged_dir is None:
        return None
    path = config.path("merged_dir") / "val.parquet"
    if not path.is_file() or identify(path) not in checkpoint.provenance.get("inputs", []):
        logger.info("%s: not what the checkpoint was trained beside: the model carries no rates of false pairs", path)
        return None
    features, columns = sample_rows(path)
    embeddings = project(build_projector(checkpoint), features, torch.device("cpu"))
    check_embeddings(embeddings, [f"{checkpoint.path} on row {row} of {path.name}" for row in range(len(embeddings))])
    buildings = columns["building_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    if not set(POSITION_COLUMNS) <= set(columns.column_names):
        return describe_pairs(embeddings, buildings)
    positions = np.stack([columns[name].to_numpy() for name in POSITION_COLUMNS], axis=1).astype(np.float64)
    return describe_pairs(embeddings, buildings, positions if is_position(*positions.T).all() else None)


def fill_folder(folder: Path, model: ModelParts, dtype: str | None, provenance: dict[str, Any]) -> None:
    """Write everything that loading the model needs into an empty folder, and load it for a trial.

    `dtype` is the type of the published backbone weights, None keeps the stored one. Raises InputError if backbone and
    projector do not fit, or the backbone cannot be read.
    """
    stored = write_weights(folder, model, dtype or "auto")
    copy_processor(model.folder, folder, model.image_size)
    config = model.config | {"dtype": stored}
    weights = digest_published(folder, config)
    carried = {PROVENANCE_KEY.decode(): provenance | {"weights": weights}}
    (folder / "config.json").write_text(json.dumps(config | carried, indent=2) + "\n", encoding="utf-8")
    for name, code in read_code().items():
        (folder / name).write_bytes(code)
    licences = list_licences(model.folder)
    for path in licences:
        shutil.copyfile(path, folder / path.name)
    if model.pair_rates is not None:
        rates = json.dumps({"model": hash_json(weights), **model.pair_rates}) + "\n"
        (folder / RATES_NAME).write_text(rates, encoding="utf-8")
    write_card(folder, model, stored, [path.name for path in licences])
    with naming_model(model.folder):
        try_model(folder, model)


def write_weights(folder: Path, model: ModelParts, dtype: str) -> str:
    """Write `backbone.*` and `projector.*`, and return the type of the backbone's floats."""
    with naming_model(model.folder):
        with torch.device("meta"):
            loaded: Any = SpatialEmbeddingsModel(SpatialEmbeddingsModel.config_class(**model.config))
        loaded.backbone = load_model(model.folder, model.vision, dtype, model.config["pooling_type"])
        loaded.projector = build_projector(model.checkpoint)
    with writing_weights(folder):
        loaded.save_pretrained(folder, max_shard_size=MAX_SHARD_BYTES)
    for path in folder.glob("*.safetensors"):  # which only their owner may read, whatever the umask
        path.chmod((folder / "config.json").stat().st_mode)
    return str(loaded.backbone.dtype).removeprefix("torch.")


def copy_processor(backbone_dir: Path, folder: Path, image_size: int | None) -> None:
    """Copy the settings of the backbone's image processor for `image_size`, in the file that every version reads."""
    from pipeline.inference.pixels import load_processor, size_settings

    name = "preprocessor_config.json"
    processor = load_processor(backbone_dir)
    path = backbone_dir / name
    settings = drop_code(read_settings(path) if path.is_file() else parse_json(processor.to_json_string()))
    if image_size is not None:
        settings |= size_settings(processor.to_dict(), image_size)
    (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def try_model(folder: Path, model: ModelParts) -> None:
    """Load the folder as users do, and embed a grey image.

    Raises PipelineError if a weight is missing or left over, InputError if backbone and projector do not fit.
    """
    from PIL import Image
    from transformers import AutoImageProcessor

    loaded: Any = SpatialEmbeddingsModel.from_pretrained(folder, output_loading_info=True)
    network, info = loaded
    wrong = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise PipelineError(
            f"{model.folder}: this transformers cannot load it as part of a model ({len(wrong)} weights do "
            f"not fit, {wrong[0]}, ...): use another version of transformers"
        )
    network.eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    pixels = processor(images=[Image.new("RGB", (256, 256), (128, 128, 128))], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features, _ = network.extract(pixels)
        if features.shape[1] != model.config["projector"]["input_dim"]:
            raise InputError(
                f"{model.checkpoint.path}: its projector takes {model.config['projector']['input_dim']} features, the "
                f"backbone {model.config['backbone_model_name']} gives {features.shape[1]}: set "
                "[embedding_model].model_name to the backbone it was trained on, or train again"
            )
        embedding = network.projector(features).numpy()
    check_embeddings(embedding, ["a grey image"], model.config["embedding_dim"])
