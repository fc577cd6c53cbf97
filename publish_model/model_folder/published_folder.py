"""Fill the published folder: weights, configuration, image processor, code, licence, model card."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.cli import installed_version
from pipeline.config import EmbeddingModelSection
from pipeline.errors import InputError, PipelineError
from pipeline.files.tables import PROVENANCE_KEY
from pipeline.inference.backbone import check_embeddings
from pipeline.inference.loading import find_vision_config
from pipeline.inference.model_files import LICENCE_FILES
from pipeline.log import logger
from pipeline.retrieval.checkpoint import Checkpoint
from publish_model.model_folder import training_similarity
from publish_model.model_folder.model_card import CardFacts, make_card, read_licence, read_results
from publish_model.model_folder.model_code import CODE_PATHS, describe_model
from publish_model.model_folder.reference_model import ReferenceModel
from publish_model.model_folder.weights import (
    Tensor,
    list_backbone,
    list_published_backbone,
    stored_type,
    tensors_of,
    write_weights,
)

# What lets SentenceTransformer (6 or newer) load the same weights as its one module.
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
# Larger models are not loaded for a trial: who publishes 27 GB may do so on a machine that does not hold them.
TRIAL_BYTES = 5_000_000_000
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Backbone:
    """The pretrained model that is published: where it lies, what it is called in public, what is taken of it.

    `published_in` is the reference implementation's folder that holds its weights, where `folder` need not.
    """

    folder: Path
    name: str
    section: EmbeddingModelSection
    published_in: ReferenceModel | None = None

    @property
    def pooling_type(self) -> str:
        """Which of its outputs is taken."""
        return self.section.pooling_type

    def read_config(self) -> dict[str, Any]:
        """Return its config.json, or what that says of the vision tower where the model takes text as well.

        Raises InputError if it is damaged.
        """
        path = self.folder / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise InputError(f"{path}: not the configuration of a model: fetch the model again")
        if "vision_config" in content:
            return dict(find_vision_config(self.folder).to_dict())
        return content

    @property
    def processor_dir(self) -> Path:
        """Where its image processor lies."""
        return self.published_in.find_processor().parent if self.published_in else self.folder

    def list_tensors(self, scratch_dir: Path) -> list[Tensor]:
        """List its weights under the names that AutoModel reads.

        Raises InputError if they cannot be read.
        """
        if self.published_in:
            return list_published_backbone(self.published_in.folder, self.folder)
        return list_backbone(self.folder, self.pooling_type, scratch_dir)

    def list_licences(self) -> list[Path]:
        """List the licence texts that came with it."""
        folders = [self.published_in.folder, self.folder] if self.published_in else [self.folder]
        paths = {path.name: path for folder in folders for pattern in LICENCE_FILES for path in folder.glob(pattern)}
        return sorted(path for path in paths.values() if path.is_file() and path.suffix != ".py")


def fill_folder(
    folder: Path,
    backbone: Backbone,
    checkpoint: Checkpoint,
    metrics: dict[str, dict[str, float]],
    dtype: str | None,
    provenance: dict[str, Any],
    training: dict[str, Any] | None = None,
) -> None:
    """Write everything that loading the model needs into an empty folder, and try it.

    `dtype` is that of the published backbone weights, None keeps the stored one; `training` is what the folder says of
    the training images. Raises InputError if backbone and projector do not fit, or the backbone cannot be read.
    """
    check_width(checkpoint, backbone)
    stored, num_bytes = write_all_weights(folder, backbone, checkpoint, dtype)
    config = make_config(backbone, checkpoint, stored, provenance)
    for name, content in {"config.json": config, **SENTENCE_TRANSFORMERS_FILES}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in (*CODE_PATHS, *backbone.list_licences()):
        shutil.copyfile(path, folder / path.name)
    copy_processor(backbone.processor_dir, folder, backbone.section.input_size)
    if training is not None:
        (folder / training_similarity.FILE_NAME).write_text(json.dumps(training) + "\n", encoding="utf-8")
    facts = card_facts(backbone, checkpoint, metrics, stored, training)
    (folder / "README.md").write_text(make_card(facts), encoding="utf-8")
    if num_bytes <= TRIAL_BYTES:
        try_model(folder, backbone, checkpoint)
    else:
        logger.info("the model takes %.1f GB: loading it was not tried", num_bytes / 1e9)


def check_width(checkpoint: Checkpoint, backbone: Backbone, width: int | None = None) -> None:
    """Raise InputError if the projector takes another number of features than the backbone gives.

    Without `width` the backbone's configuration is asked, which may not say it.
    """
    config = backbone.read_config()
    if width is None:
        sizes = config.get("hidden_sizes")
        width = sizes[-1] if sizes else config.get("hidden_size", config.get("hidden_dim"))
        if isinstance(width, int) and backbone.pooling_type == "cls_mean":
            width *= 2
    expected = checkpoint.architecture["input_dim"]
    if isinstance(width, int) and width != expected:
        raise InputError(
            f"{checkpoint.path}: its projector takes {expected} features, the backbone {backbone.name} gives {width}: "
            "set [embedding_model].model_name to the backbone it was trained on, or train again"
        )


def write_all_weights(folder: Path, backbone: Backbone, checkpoint: Checkpoint, dtype: str | None) -> tuple[str, int]:
    """Write `backbone.*` and `projector.*`; return the type of the backbone's floats and the size of all in bytes."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        tensors = [
            tensor.cast(_TYPES[dtype] if dtype else None).renamed("backbone.")
            for tensor in backbone.list_tensors(Path(scratch))
        ]
        stored = str(stored_type(tensors)).removeprefix("torch.")
        weights = {f"projector.{name}": weight.float() for name, weight in checkpoint.projector.items()}
        tensors += tensors_of(weights)
        write_weights(folder, tensors)
    return stored, sum(tensor.num_bytes for tensor in tensors)


def make_config(backbone: Backbone, checkpoint: Checkpoint, dtype: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the published config.json; nothing in it says where on this machine anything lay."""
    described = describe_model(backbone.name, backbone.read_config(), backbone.pooling_type, checkpoint.architecture)
    views = {"scales": backbone.section.scales, "flip": backbone.section.flip}
    return described | views | {"dtype": dtype, PROVENANCE_KEY.decode(): provenance}


def copy_processor(backbone_dir: Path, folder: Path, image_size: int | None) -> None:
    """Copy the backbone's image processor, in the form that every version of transformers reads, for `image_size`."""
    from pipeline.inference.preprocessing import load_processor, size_settings

    path = folder / "preprocessor_config.json"
    if (backbone_dir / path.name).is_file():
        shutil.copyfile(backbone_dir / path.name, path)
    else:
        load_processor(backbone_dir, trust_remote_code=False).to_json_file(path)
    if image_size is not None:
        sizes = size_settings(load_processor(backbone_dir, trust_remote_code=False).to_dict(), image_size)
        settings = json.loads(path.read_text(encoding="utf-8")) | sizes
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def card_facts(
    backbone: Backbone,
    checkpoint: Checkpoint,
    metrics: dict[str, dict[str, float]],
    dtype: str,
    training: dict[str, Any] | None,
) -> CardFacts:
    """Gather what the model card says."""
    settings = {name: value for name, value in checkpoint.settings.items() if isinstance(value, dict)}
    old = backbone.published_in
    return CardFacts(
        name="Spatial building embeddings",
        backbone_name=backbone.name,
        licence=read_licence(backbone.folder) or (read_licence(old.folder) if old else {}),
        licence_files=[path.name for path in backbone.list_licences()],
        architecture=checkpoint.architecture,
        pooling_type=backbone.pooling_type,
        views=describe_views(backbone.section),
        dtype=dtype,
        metrics=metrics,
        settings=settings,
        training_inputs=list(checkpoint.provenance.get("inputs", [])),
        split_hash=checkpoint.provenance.get("split_hash"),
        versions={package: installed_version(package) for package in ("torch", "transformers")},
        num_training_samples=training["reference_shape"][0] if training else 0,
        republished=old is not None,
        old_results=read_results(old.folder) if old else [],
    )


def describe_views(section: EmbeddingModelSection) -> str:
    """Say at which size and over which views of a picture the backbone's output is taken, nothing at the defaults."""
    text = ""
    if section.scales:
        text = f" as the normalised mean over {', '.join(map(str, section.scales))} pixels"
    elif section.input_size is not None:
        text = f" at {section.input_size} pixels"
    return text + (", the mean with the mirror image's" if section.flip else "")


def try_model(folder: Path, backbone: Backbone, checkpoint: Checkpoint) -> None:
    """Load the folder as a user does and embed a grey image.

    Raises PipelineError if a weight is missing or left over, InputError if backbone and projector do not fit.
    """
    from PIL import Image
    from transformers import AutoImageProcessor
    from transformers.utils import logging as transformers_logging

    from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel

    transformers_logging.disable_progress_bar()
    loaded: Any = SpatialEmbeddingsModel.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    wrong = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise PipelineError(
            f"{backbone.folder}: this transformers cannot load it as part of a model ({len(wrong)} weights do not fit, "
            f"{wrong[0]}, ...): use another version of transformers"
        )
    model.eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    pixels = processor(images=[Image.new("RGB", (256, 256), (128, 128, 128))], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features, _ = model.extract(pixels)
        check_width(checkpoint, backbone, features.shape[1])
        embedding = model.projector(features).numpy()
    check_embeddings(embedding, ["a grey image"], checkpoint.architecture["output_dim"])
