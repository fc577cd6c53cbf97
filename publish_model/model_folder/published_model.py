"""Find and identify a published model without importing torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.errors import InputError, one_line
from pipeline.files.tables import hash_json
from pipeline.inference.model_files import find_missing_files, identify_model, locate_hub_model
from publish_model.model_folder.reference_model import ReferenceModel, open_reference


@dataclass(frozen=True)
class PublishedModel:
    """A published model's folder and the id that it was asked for; `reference` if another program published it."""

    model_id: str
    folder: Path
    pooling: str
    reference: ReferenceModel | None = None

    def name_version(self, precision: str) -> str:
        """Return a short id of everything that determines the embeddings: files, pooling and precision."""
        files = self.reference.identify() if self.reference else identify_model(self.folder)
        return name_version(files, self.pooling, precision)

    def prepare(self) -> Path:
        """Return a folder that transformers loads with our code: its own, or one rebuilt for this process.

        Raises InputError if a model of the reference implementation cannot be rebuilt.
        """
        return self.reference.build_folder() if self.reference else self.folder


def name_version(files: str, pooling: str, precision: str) -> str:
    """Return the short id of a model's files, pooling and precision together."""
    return hash_json({"model": files, "pooling": pooling, "precision": precision})[:16]


def check_model(dataset: EmbeddingsDataset, model: PublishedModel) -> None:
    """Raise InputError if a published model is not the one that made a dataset's embeddings."""
    if model.name_version(str(dataset.recipe.get("precision"))) != dataset.embedding_version:
        raise InputError(f"{model.folder}: not the model that the embeddings of {dataset.folder} were made with")


def find_model(model_id: str, *, download: bool) -> PublishedModel:
    """Return a published model by its folder or hub id; fetch it if `download` is set and it is not here.

    Raises InputError if there is none, or a file of it is missing.
    """
    folder = Path(model_id).expanduser()
    if not (model_id and folder.is_dir()):
        is_hub_id = model_id.count("/") <= 1 and not model_id.startswith(("/", ".", "~"))
        if download and not is_hub_id:
            raise InputError(
                f"{folder}: no such model folder: give --model-id a folder that stage 7 wrote, or a hub id"
            )
        located = locate_hub_model(model_id, download=download) if model_id and is_hub_id else None
        if located is None:
            raise InputError(f"the model {model_id!r} is not on this machine: give --model-id its folder")
        folder = located
    folder, pooling = folder.resolve(), _read_pooling(folder)
    return PublishedModel(model_id, folder, pooling, open_reference(folder, download=download))


def _read_pooling(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a model folder (config.json: {one_line(error)}): correct --model-id") from None
    if not isinstance(config, dict):
        raise InputError(f"{folder}: not a model folder (config.json holds no settings): correct --model-id")
    missing = find_missing_files(folder)
    if missing:  # before a dataset is begun with the broken model
        raise InputError(f"{folder}: {missing[0]} is missing: fetch or copy the model folder again")
    return str(config.get("pooling_type", "pooler_output"))
