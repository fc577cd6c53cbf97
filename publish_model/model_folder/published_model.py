"""The code and settings of published folders; find, identify and load such a model; without importing torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import EmbeddingModelSection
from pipeline.embeddings_dataset.checks import NORM_TOLERANCE
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.errors import InputError
from pipeline.files.identity import hash_json
from pipeline.files.tables import read_provenance
from pipeline.inference.model_files import (
    check_unchanged,
    find_missing_files,
    identify_model,
    list_changed,
    read_settings,
)
from pipeline.log import logger
from pipeline.reference.model_folder import in_own_format, locate_published
from pipeline.retrieval.pair_table import PairTable
from pipeline.workspace import read_json

if TYPE_CHECKING:
    from pipeline.inference.backbone import Embedder

# How often pairs of validation images reach a cosine, of two buildings and of one.
RATES_NAME = "pair_rates.json"
MODEL_TYPE = "spatial_embeddings"
CODE_DIR = Path(__file__).resolve().parents[1]
# Stage 2 and training use the same two files for pooling and projector.
CODE_PATHS = (
    CODE_DIR / "configuration_spatial_embeddings.py",
    CODE_DIR / "modeling_spatial_embeddings.py",
    CODE_DIR.parent / "pipeline" / "inference" / "pooling.py",
    CODE_DIR.parent / "pipeline" / "retrieval" / "projector.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_spatial_embeddings.SpatialEmbeddingsConfig",
    "AutoModel": "modeling_spatial_embeddings.SpatialEmbeddingsModel",
}
# Keys of a backbone's configuration about its storage, which do not hold for the published copy.
STORAGE_KEYS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
# Settings that name code, however deep they stand.
CODE_KEYS = ("auto_map", "custom_pipelines")


def read_code() -> dict[str, bytes]:
    """Return the code files of a published folder by name.

    transformers keeps the classes that it loaded first, by the folder's base name and the configuration's file: this
    ends with a hash of the others, so that two folders in one process each run their own.
    """
    code = {path.name: path.read_bytes() for path in CODE_PATHS}
    digest = hashlib.sha256(b"".join(code.values())).hexdigest()[:16]
    code[CODE_PATHS[0].name] += f"\n# The model's code as a whole: {digest}\n".encode()
    return code


def has_own_code(folder: Path) -> bool:
    """Whether the code in a model folder is what this version publishes, so that its own classes load the weights."""
    if read_settings(folder / "config.json").get("model_type") != MODEL_TYPE:
        return False
    for name, code in read_code().items():
        path = folder / name
        if path.is_file() and (path.stat().st_size != len(code) or path.read_bytes() != code):
            logger.warning("%s: not the code that this version publishes", folder / name)
            return False
    return True


def describe_model(
    backbone_name: str, backbone_config: dict[str, Any], section: EmbeddingModelSection, architecture: dict[str, Any]
) -> dict[str, Any]:
    """Return the published config.json without the weights' type; it contains no path of this machine."""
    return {
        "architectures": [AUTO_MAP["AutoModel"].partition(".")[2]],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        "backbone_model_name": backbone_name,
        "backbone_config": drop_code({key: value for key, value in backbone_config.items() if key not in STORAGE_KEYS}),
        "pooling_type": section.pooling_type,
        "scales": section.scales,
        "flip": section.flip,
        "projector": architecture,
        "embedding_dim": architecture["output_dim"],
    }


def drop_code(settings: Any) -> Any:
    """Return a backbone's settings without what names code: it would run wherever the published model is trusted."""
    if isinstance(settings, dict):
        return {key: drop_code(one) for key, one in settings.items() if str(key).strip().lower() not in CODE_KEYS}
    return [drop_code(one) for one in settings] if isinstance(settings, list) else settings


@dataclass(frozen=True)
class PublishedModel:
    """A published model's folder and id by content, the id under which it was asked for, and how it is to run.

    Its own code is run only if `trust_remote_code` is set.
    """

    model_id: str
    folder: Path
    identity: str
    device: str
    batch_size: int | str
    trust_remote_code: bool

    def name_version(self, precision: str) -> str:
        """Return a short id of everything that determines the embeddings: files (pooling included) and precision."""
        return hash_json({"model": self.identity, "precision": precision})[:16]

    def load(self, dtype: str) -> "Embedder":
        """Load its weights into this project's classes, or trusted ones, to compute in a type.

        Raises InputError if the folder was replaced meanwhile, or the embedding of a grey picture is not L2-normalised.
        """
        import torch
        from transformers import AutoModel

        from pipeline.inference.backbone import Embedder
        from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel

        embedder = Embedder(
            self.folder,
            device=self.device,
            dtype=dtype,
            batch_size=self.batch_size,
            trust_remote_code=self.trust_remote_code,
            model_class=SpatialEmbeddingsModel if has_own_code(self.folder) else AutoModel,
        )
        check_unchanged(self.folder, self.identity)
        (trial,) = embedder.embed([embedder.prepare(torch.full((3, 256, 256), 128, dtype=torch.uint8))])
        if abs(float(np.linalg.norm(trial)) - 1.0) > NORM_TOLERANCE:
            raise InputError(
                "--model-id: its embeddings are not L2-normalised: give a model that stage 7 has published, "
                "not a backbone"
            )
        return embedder

    def check_made(self, dataset: EmbeddingsDataset) -> None:
        """Raise InputError if another model made a dataset's embeddings."""
        recipe = dataset.recipe
        if self.name_version(str(recipe["precision"])) != recipe["embedding_version"]:
            raise InputError(f"{self.model_id}: not the model that the embeddings of {dataset.folder} were made with")


def find_model(
    model_id: str,
    *,
    download: bool,
    device: str = "auto",
    batch_size: int | str = 32,
    trust_remote_code: bool = False,
) -> PublishedModel:
    """Return a published model by its folder or hub id, fetched if `download` is set and it is not here.

    Raises InputError if there is none, or a file of it is missing.
    """
    located = locate_published(model_id, download=download)
    if located is None:
        raise InputError(f"the model {model_id!r} is not on this machine: give --model-id its folder")
    folder = in_own_format(located, describe_model, download=download)
    if missing := find_missing_files(folder):  # found before a dataset is begun that bears the broken model's id
        raise InputError(f"{folder}: {missing[0]} is missing: fetch or copy the model folder again")
    if changed := list_changed(folder):
        logger.warning("%s: changed since it was published, or another model's: %s", folder, changed)
    return PublishedModel(model_id, folder, identify_model(folder), device, batch_size, trust_remote_code)


def read_pairs(folder: Path, kind: str) -> PairTable:
    """Return the table of `all` or `near` pairs that a published folder carries.

    Raises InputError if it has none, or another model's.
    """
    try:
        content, published = read_json(folder / RATES_NAME), read_provenance(folder / "config.json") or {}
        own, table = hash_json(published.get("weights")), PairTable.of(content[kind])
        up, down, right = (np.diff(table.columns[name]) for name in ("cosine", "false_rate", "right_partners"))
        is_own = content.get("model", own) == own and all(np.isfinite(one).all() for one in table.columns.values())
        is_sound = bool(is_own and len(up) and (up > 0).all() and (down < 0).all() and (right <= 0).all())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise InputError(
            f"{folder / RATES_NAME}: no rates of false pairs of this model ({kind}): publish it again with stage 7 "
            "beside its splits, or give --threshold"
        )
    return table
