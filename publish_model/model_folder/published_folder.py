"""Fill a published folder: weights, configuration, image processor, code, licence, model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import InputError, PipelineError
from pipeline.files.tables import PROVENANCE_KEY
from pipeline.files.workspace import parse_json
from pipeline.inference.backbone import check_embeddings
from pipeline.inference.loading import naming_model, writing_weights
from pipeline.inference.model_files import digest_weights, read_settings
from publish_model.model_folder.model_card import write_card
from publish_model.model_folder.model_code import read_code
from publish_model.model_folder.model_parts import ModelParts
from publish_model.model_folder.pair_rates import FILE_NAME

# Of one file; the hub takes up to 50 GB.
MAX_SHARD_BYTES = 5_000_000_000


def fill_folder(folder: Path, model: ModelParts, dtype: str | None, provenance: dict[str, Any]) -> None:
    """Write everything that loading the model needs into an empty folder, and load it for a trial.

    `dtype` is the type of the published backbone weights, None keeps the stored one. Raises InputError if backbone and
    projector do not fit, or the backbone cannot be read.
    """
    stored = write_weights(folder, model, dtype or "auto")
    made = provenance | {"weights": digest_weights(folder)}
    config = model.config | {"dtype": stored, PROVENANCE_KEY.decode(): made}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, code in read_code().items():
        (folder / name).write_bytes(code)
    for path in model.list_licences():
        shutil.copyfile(path, folder / path.name)
    copy_processor(model.folder, folder, model.image_size)
    if model.pair_rates is not None:
        (folder / FILE_NAME).write_text(json.dumps(model.pair_rates) + "\n", encoding="utf-8")
    write_card(folder, model, stored)
    with naming_model(model.folder):
        try_model(folder, model)


def write_weights(folder: Path, model: ModelParts, dtype: str) -> str:
    """Write `backbone.*` and `projector.*`, and return the type of the backbone's floats."""
    with naming_model(model.folder):
        loaded = model.load(dtype)
    with writing_weights(folder):
        loaded.save_pretrained(folder, max_shard_size=MAX_SHARD_BYTES)
    for path in folder.glob("*.safetensors"):  # which only their owner may read, whatever the umask
        path.chmod((folder / "config.json").stat().st_mode)
    return str(loaded.backbone.dtype).removeprefix("torch.")


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

    from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel

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
        width, expected = features.shape[1], model.config["projector"]["input_dim"]
        if width != expected:
            raise InputError(
                f"{model.checkpoint.path}: its projector takes {expected} features, the backbone "
                f"{model.config['backbone_model_name']} gives {width}: set [embedding_model].model_name to the "
                "backbone it was trained on, or train again"
            )
        embedding = network.projector(features).numpy()
    check_embeddings(embedding, ["a grey image"], model.config["embedding_dim"])
