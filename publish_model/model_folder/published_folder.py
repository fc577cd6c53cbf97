"""Fill a published folder: weights, configuration, image processor, code, licence, model card."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import InputError, PipelineError
from pipeline.files.tables import PROVENANCE_KEY
from pipeline.files.workspace import parse_json
from pipeline.inference.backbone import check_embeddings
from pipeline.inference.model_files import digest_weights, read_settings
from pipeline.inference.stored_weights import tensors_of
from pipeline.log import logger
from publish_model.model_folder import training_similarity
from publish_model.model_folder.model_card import write_card
from publish_model.model_folder.model_code import describe_model, read_code
from publish_model.model_folder.model_parts import ModelParts
from publish_model.model_folder.weights import stored_type, write_weights

# With these SentenceTransformer (6 or newer) loads the same weights.
SENTENCE_TRANSFORMERS_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": {"method": "forward", "method_output_name": "embeddings"}},
        "module_output_name": "sentence_embedding",
    },
}
# Larger models are not loaded for a trial: a machine that publishes 27 GB may not have the memory for them.
TRIAL_BYTES = 5_000_000_000
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fill_folder(folder: Path, model: ModelParts, dtype: str | None, provenance: dict[str, Any]) -> None:
    """Write everything that loading the model needs into an empty folder, and load it for a trial.

    `dtype` is the type of the published backbone weights, None keeps the stored one. Raises InputError if backbone and
    projector do not fit, or the backbone cannot be read.
    """
    check_width(model)
    backbone = model.backbone
    stored, num_bytes = write_all_weights(folder, model, dtype)
    described = describe_model(
        backbone.name, backbone.read_config(), backbone.section.pooling_type, model.checkpoint.architecture
    )
    views = {"scales": backbone.section.scales, "flip": backbone.section.flip}
    made = provenance | {"weights": digest_weights(folder)}
    config = described | views | {"dtype": stored, PROVENANCE_KEY.decode(): made}
    for name, content in {"config.json": config, **SENTENCE_TRANSFORMERS_FILES}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, code in read_code().items():
        (folder / name).write_bytes(code)
    for path in backbone.list_licences():
        shutil.copyfile(path, folder / path.name)
    copy_processor(backbone.processor_dir, folder, backbone.section.input_size)
    if model.training is not None:
        (folder / training_similarity.FILE_NAME).write_text(json.dumps(model.training) + "\n", encoding="utf-8")
    write_card(folder, model, stored)
    if num_bytes <= TRIAL_BYTES:
        try_model(folder, model)
    else:
        logger.info("the model takes %.1f GB: loading it was not tried", num_bytes / 1e9)


def check_width(model: ModelParts, width: int | None = None) -> None:
    """Raise InputError if the projector takes another number of features than the backbone gives.

    Without `width`, compare with the backbone's configuration, if that names its width.
    """
    config = model.backbone.read_config()
    if width is None:
        sizes = config.get("hidden_sizes")
        width = sizes[-1] if sizes else config.get("hidden_size", config.get("hidden_dim"))
        if isinstance(width, int) and model.backbone.section.pooling_type == "cls_mean":
            width *= 2
    expected = model.checkpoint.architecture["input_dim"]
    if isinstance(width, int) and width != expected:
        raise InputError(
            f"{model.checkpoint.path}: its projector takes {expected} features, the backbone {model.backbone.name} "
            f"gives {width}: set [embedding_model].model_name to the backbone it was trained on, or train again"
        )


def write_all_weights(folder: Path, model: ModelParts, dtype: str | None) -> tuple[str, int]:
    """Write `backbone.*` and `projector.*`; return the type of the backbone's floats and the size of all in bytes."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        tensors = [
            replace(tensor.cast(_TYPES[dtype] if dtype else None), name=f"backbone.{tensor.name}")
            for tensor in model.backbone.list_tensors(Path(scratch))
        ]
        stored = str(stored_type(tensors)).removeprefix("torch.")
        projector = model.checkpoint.projector
        tensors += tensors_of({f"projector.{name}": weight.float() for name, weight in projector.items()})
        write_weights(folder, tensors)
    return stored, sum(tensor.num_bytes for tensor in tensors)


def copy_processor(backbone_dir: Path, folder: Path, image_size: int | None) -> None:
    """Copy the settings of the backbone's image processor for `image_size`, in the file that every version reads.

    They name no code: `auto_map` would have the backbone's own run wherever the published model is trusted.
    """
    from pipeline.inference.preprocessing import load_processor, size_settings

    name = "preprocessor_config.json"
    processor = load_processor(backbone_dir)
    if (backbone_dir / name).is_file():
        settings = read_settings(backbone_dir / name)
    else:
        settings = parse_json(processor.to_json_string())
    settings.pop("auto_map", None)
    if image_size is not None:
        settings |= size_settings(processor.to_dict(), image_size)
    (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def try_model(folder: Path, model: ModelParts) -> None:
    """Load the folder as users do, and embed a grey image.

    Raises PipelineError if a weight is missing or left over, InputError if backbone and projector do not fit.
    """
    from PIL import Image
    from transformers import AutoImageProcessor
    from transformers.utils import logging as transformers_logging

    from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel

    transformers_logging.disable_progress_bar()
    loaded: Any = SpatialEmbeddingsModel.from_pretrained(folder, output_loading_info=True)
    network, info = loaded
    wrong = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise PipelineError(
            f"{model.backbone.folder}: this transformers cannot load it as part of a model ({len(wrong)} weights do "
            f"not fit, {wrong[0]}, ...): use another version of transformers"
        )
    network.eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    pixels = processor(images=[Image.new("RGB", (256, 256), (128, 128, 128))], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features, _ = network.extract(pixels)
        check_width(model, features.shape[1])
        embedding = network.projector(features).numpy()
    check_embeddings(embedding, ["a grey image"], model.checkpoint.architecture["output_dim"])
