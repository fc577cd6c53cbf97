"""Find and identify a published model without importing torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.errors import InputError
from pipeline.files.tables import hash_json
from pipeline.inference.model_files import (
    find_missing_files,
    identify_model,
    locate_hub_model,
    read_settings,
)
from pipeline.reference.model_folder import ReferenceModel, open_reference
from publish_model.model_folder.model_code import CODE_PATHS, describe_model

if TYPE_CHECKING:
    from pipeline.inference.backbone import Embedder


@dataclass(frozen=True)
class PublishedModel:
    """A published model's folder, the id under which it was asked for, and how it is to run.

    `reference` is there where another program published it.
    """

    model_id: str
    folder: Path
    pooling: str
    reference: ReferenceModel | None
    device: str
    batch_size: int | str

    def name_version(self, precision: str) -> str:
        """Return a short id of everything that determines the embeddings: files, pooling and precision."""
        files = self.reference.identify() if self.reference else identify_model(self.folder)
        return name_version(files, self.pooling, precision)

    def load(self, dtype: str) -> "Embedder":
        """Load it to compute in a type; a model of the reference implementation is rebuilt for this process first."""
        from pipeline.inference.backbone import Embedder

        folder = self.reference.build_folder(describe_model, CODE_PATHS) if self.reference else self.folder
        return Embedder(folder, device=self.device, dtype=dtype, batch_size=self.batch_size, trust_remote_code=True)

    def check_made(self, dataset: EmbeddingsDataset) -> None:
        """Raise InputError if another model made a dataset's embeddings."""
        recipe = dataset.recipe
        if self.name_version(str(recipe["precision"])) != recipe["embedding_version"]:
            raise InputError(f"{self.folder}: not the model that the embeddings of {dataset.folder} were made with")


def name_version(files: str, pooling: str, precision: str) -> str:
    """Return the short id of a model's files, pooling and precision together."""
    return hash_json({"model": files, "pooling": pooling, "precision": precision})[:16]


def find_model(model_id: str, *, download: bool, device: str = "auto", batch_size: int | str = 32) -> PublishedModel:
    """Return a published model by its folder or hub id, fetched if `download` is set and it is not here.

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
    folder = folder.resolve()
    config = read_settings(folder / "config.json", "correct --model-id")
    missing = find_missing_files(folder)
    if missing:  # found before a dataset is begun that bears the broken model's id
        raise InputError(f"{folder}: {missing[0]} is missing: fetch or copy the model folder again")
    reference = open_reference(folder, download=download)
    pooling = str(config.get("pooling_type", "pooler_output"))
    return PublishedModel(model_id, folder, pooling, reference, device, batch_size)
