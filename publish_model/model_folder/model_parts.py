"""The parts that stage 7 makes a published model of: the backbone, the trained projector, and what was measured."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import EmbeddingModelSection
from pipeline.errors import InputError, one_line
from pipeline.inference.loading import find_vision_config
from pipeline.inference.model_files import LICENCE_FILES, is_within, read_settings
from pipeline.inference.stored_weights import Tensor
from pipeline.log import logger
from pipeline.reference.model_folder import ReferenceModel
from pipeline.retrieval.checkpoint import Checkpoint
from publish_model.model_folder.weights import list_backbone, list_published_backbone

LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Backbone:
    """The pretrained model that is published: its folder, its public name, and the settings that it is run with.

    `published_in` is the reference implementation's folder that holds its weights; `folder` then need not.
    """

    folder: Path
    name: str
    section: EmbeddingModelSection
    published_in: ReferenceModel | None = None

    def read_config(self) -> dict[str, Any]:
        """Return its config.json, or the vision tower's part of it if the model takes text as well."""
        content = read_settings(self.folder / "config.json")
        if "vision_config" in content:
            return dict(find_vision_config(self.folder).to_dict())
        return content

    @property
    def processor_dir(self) -> Path:
        """The folder of its image processor."""
        return self.published_in.find_processor().parent if self.published_in else self.folder

    def list_tensors(self, scratch_dir: Path) -> list[Tensor]:
        """List its weights under the names that AutoModel reads."""
        if self.published_in:
            return list_published_backbone(self.published_in.folder, self.folder)
        return list_backbone(self.folder, self.section.pooling_type, scratch_dir)

    def list_licences(self) -> list[Path]:
        """List the licence texts that came with it; a link out of the folder could publish any file of the user's."""
        folders = reversed(self._list_folders())  # a text of `folder` is preferred
        paths = {path.name: path for folder in folders for pattern in LICENCE_FILES for path in folder.glob(pattern)}
        found = sorted(path for path in paths.values() if path.is_file() and path.suffix != ".py")
        for path in found:
            if not is_within(path):
                logger.warning("%s: a link out of the model's folder, which is not followed", path)
        return [path for path in found if is_within(path)]

    def read_licence(self) -> dict[str, str]:
        """Return what its own card says of its licence: `license`, `license_name`, `license_link`."""
        for folder in self._list_folders():
            found = _read_card_metadata(folder)
            licence = {key: str(found[key]) for key in LICENCE_KEYS if found.get(key)}
            if licence:
                return licence
        return {}

    def read_results(self) -> list[str]:
        """Return the results that the card of `published_in` names in its metadata, one line each."""
        from huggingface_hub.repocard_data import model_index_to_eval_results

        index = _read_card_metadata(self.published_in.folder).get("model-index") if self.published_in else None
        try:
            results = model_index_to_eval_results(index)[1] if index else []
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            return []  # of another form
        return [f"{one.metric_name or one.metric_type}: {one.metric_value} ({one.dataset_name})" for one in results]

    def _list_folders(self) -> list[Path]:
        return [self.folder, *([self.published_in.folder] if self.published_in else [])]


@dataclass(frozen=True)
class ModelParts:
    """What a published model is made of."""

    backbone: Backbone
    checkpoint: Checkpoint
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # of the validation split, where measured
    training: dict[str, Any] | None = None  # the content of training_similarity.json


def _read_card_metadata(folder: Path) -> dict[str, Any]:
    """Return a card's metadata, empty without any. Raises InputError where they cannot be read."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    path = folder / "README.md"
    try:
        return (metadata_load(path) or {}) if path.is_file() else {}
    except (YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(
            f"{path}: its metadata cannot be read ({one_line(error)[:100]}): fetch the model again"
        ) from None
