"""Find a model's files and tell models apart by content, without importing torch."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline.config import Config, EmbeddingModelSection
from pipeline.errors import ConfigError, InputError, one_line

# A licence's own text, as model folders call it.
LICENCE_FILES = ["LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "license*", "notice*"]
# What a model is made of: its settings, weights, remote code and licence; not the flax and onnx copies beside them.
MODEL_FILES = ["*.json", "*.safetensors", "*.py", *LICENCE_FILES, "README.md"]
# What a backbone is apart from its weights, which may take 27 GB; its licence goes where they go.
SETTINGS_FILES = ["config.json", "*processor_config.json", *LICENCE_FILES, "README.md"]
# Only what changes the numbers: a model card does not, nor what is said of the training images or to other libraries.
_IDENTITY_SUFFIXES = (".json", ".safetensors", ".bin", ".py")
_NO_IDENTITY = {"training_similarity.json", "modules.json", "sentence_bert_config.json"}
# 256 pieces of 4 KiB of each weight file: retraining changes nearly every tensor, and 27 GB are told apart in a second.
_NUM_PIECES, _PIECE_BYTES = 256, 4096


def describe_views(section: EmbeddingModelSection) -> dict[str, Any]:
    """Return which outputs of the backbone are taken over which views of a picture, by whose code, for the provenance.

    What there was no choice of once is left out at its default, so that embeddings made then are still taken for what
    they are.
    """
    chosen = {"image_size": section.image_size, "scales": sorted(section.scales), "flip": section.flip}
    chosen["trust_remote_code"] = section.trust_remote_code
    defaults = {"image_size": "auto", "scales": [], "flip": False, "trust_remote_code": False}
    return {"pooling_type": section.pooling_type} | {key: chosen[key] for key in chosen if chosen[key] != defaults[key]}


def locate_backbone(config: Config, *, download: bool) -> Path | None:
    """Return the local folder of `[embedding_model].model_name`: itself, or the hub's snapshot of it.

    Without `download` only this machine is searched, and None says that the model is not here.
    Raises ConfigError where the key is not set, InputError where the model cannot be had.
    """
    name = config.embedding_model.model_name
    if name is None:
        raise ConfigError(f"{config.file_path}: [embedding_model].model_name: not set, and this stage needs it")
    folder = config.expand(name, "[embedding_model].model_name")
    if folder.is_dir():
        return folder
    if name.startswith(("/", ".", "~", "$")) or name.count("/") > 1:
        if not download:
            return None
        raise InputError(f"{folder}: no such folder: set [embedding_model].model_name to a model folder or a hub id")
    return locate_hub_model(name, download=download)


def locate_hub_model(repo_id: str, *, download: bool) -> Path | None:
    """Return the local snapshot of a hub model, fetched first where `download` allows it.

    Raises InputError where it is to be fetched and cannot be.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=MODEL_FILES, local_files_only=True))
    except (OSError, ValueError):
        folder = None
    if folder is None or find_missing_files(folder):
        if not download:
            return None
        try:
            folder = Path(snapshot_download(repo_id, allow_patterns=MODEL_FILES))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise InputError(
                f"{repo_id}: the model is neither a local folder nor in the hub cache, and cannot be fetched "
                f"({one_line(error)[:200]}): correct the name, or fetch it where there is internet "
                f"(slurm/prepare.sh --model-id {repo_id})"
            ) from None
    if download and names_its_backbone(folder):  # a later job without internet needs that too
        locate_backbone_settings(folder, download=True)
    return folder


def find_missing_files(folder: Path) -> list[str]:
    """Return what a model folder lacks, none where it is whole; an interrupted fetch or copy leaves one too."""
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        names = {"model.safetensors"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [index.name]
    missing = sorted(name for name in names | {"config.json"} if not (folder / name).is_file())
    has_processor = any(folder.glob("*processor_config.json")) or names_its_backbone(folder)
    return missing + ([] if has_processor else ["preprocessor_config.json"])


def names_its_backbone(folder: Path) -> bool:
    """Whether a folder is one that the reference implementation published: its backbone's settings lie elsewhere."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    is_named = isinstance(config, dict) and isinstance(config.get("backbone_model_name"), str)
    return is_named and not isinstance(config.get("backbone_config"), dict)


def locate_backbone_settings(folder: Path, download: bool) -> Path:
    """Return where the configuration and the image processor of the backbone lie that a model folder names.

    Raises InputError where they are neither here nor, with `download`, to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["backbone_model_name"]
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    found = None
    for local_files_only in (True, False) if download else (True,):
        try:
            found = Path(snapshot_download(name, allow_patterns=SETTINGS_FILES, local_files_only=local_files_only))
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = one_line(error)[:200]
            continue
        if (found / "config.json").is_file() and any(found.glob("*processor_config.json")):
            return found
        reason = "config.json or preprocessor_config.json is missing there"
    raise InputError(
        f"{folder}: its backbone {name!r} is no folder here, and its settings are not to be had ({reason}): correct "
        "backbone_model_name in its config.json, or fetch the model where there is internet"
    )


def identify_model(folder: Path) -> str:
    """Return a short id of a model folder's settings, code and weights, the same wherever the folder lies.

    Raises InputError if the folder holds no config.json.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a model folder (no config.json): correct the model's name or path")
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _IDENTITY_SUFFIXES and path.name not in _NO_IDENTITY and path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            _hash_pieces(path, digest)
    return digest.hexdigest()[:16]


def _hash_pieces(path: Path, digest: "hashlib._Hash") -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _NUM_PIECES * _PIECE_BYTES:
            digest.update(file.read())
            return
        for piece in range(_NUM_PIECES):
            file.seek((size - _PIECE_BYTES) * piece // (_NUM_PIECES - 1), os.SEEK_SET)
            digest.update(file.read(_PIECE_BYTES))
