"""Find a model's files and tell models apart by content, without importing torch."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import Config, EmbeddingModelSection
from pipeline.errors import ConfigError, InputError, hide_credentials, one_line, unreadable
from pipeline.files.identity import digest_file, hash_json
from pipeline.files.tables import PROVENANCE_KEY, describe_difference
from pipeline.log import logger
from pipeline.workspace import read_json, read_json_object

# The published model of the tools that take no configuration.
DEFAULT_MODEL_ID = "alexwaolson/spatial-building-embeddings"

# Names of licence files in model folders.
LICENCE_FILES = ["LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "license*", "notice*"]
# The files of a model: settings, weights, remote code and licence, without flax and onnx copies.
MODEL_FILES = ["*.json", "*.safetensors", "*.py", *LICENCE_FILES, "README.md"]
# Only files that change the embeddings count: no model card, rates of validation or settings of other libraries.
_IDENTITY_SUFFIXES = (".json", ".safetensors", ".bin", ".py")
_NO_IDENTITY = {"pair_rates.json", "modules.json", "sentence_bert_config.json"}


def embedding_settings(section: EmbeddingModelSection) -> dict[str, Any]:
    """Return the settings that shape an embedding, for the provenance."""
    return {
        "pooling_type": section.pooling_type, "image_size": section.image_size, "scales": sorted(section.scales),
        "flip": section.flip, "trust_remote_code": section.trust_remote_code,
    }  # fmt: skip


def compare_embedded(old: Any, new: Any) -> str | None:
    """Name the first setting in which the settings of two embeddings differ; None if they agree or one is not known.

    Precision is no difference: a projector serves embeddings of any.
    """
    both = [
        {"settings": {key: value for key, value in one.items() if key not in ("dtype", "embedding_dtype")}}
        for one in (old, new)
        if isinstance(one, dict)
    ]
    return describe_difference(*both) if len(both) == 2 else None


def locate_backbone(config: Config, *, download: bool) -> Path | None:
    """Return the local folder of `[embedding_model].model_name`: itself, or the hub's snapshot of it.

    Without `download` only this machine is searched, and None returned if the model is not here.
    Raises ConfigError where the key is not set, InputError where the model cannot be found.
    """
    name = config.embedding_model.model_name
    if name is None:
        raise ConfigError(f"{config.file_path}: [embedding_model].model_name: not set, and this stage needs it")
    return locate_model(
        name, "set [embedding_model].model_name to a model folder or a hub id", download=download,
        folder=config.expand(name, "[embedding_model].model_name"),
    )  # fmt: skip


def locate_model(
    name: str,
    remedy: str,
    *,
    download: bool,
    folder: Path | None = None,
    is_whole: Callable[[Path], bool] = lambda found: not find_missing_files(found),
) -> Path | None:
    """Return a model's folder: the one named so, else the hub's snapshot of `OWNER/MODEL` or `OWNER/MODEL@REVISION`.

    `folder` is what the name means as a path, if not the current folder's. Without `download` only this machine is
    searched, and None returned if the model is not here. A folder that happens to be called as the default model does
    not take its place. A snapshot is fetched again unless it `is_whole`. Raises InputError where there is none.
    """
    if "://" in name:
        raise InputError(f"{hide_credentials(name)}: an address, no model's name: {remedy}")
    folder = folder or Path(os.path.expanduser(name))  # noqa: PTH111 (which fails for a user who does not exist)
    if name and name != DEFAULT_MODEL_ID and folder.is_dir():
        return folder
    if not name or name.startswith(("/", ".", "~", "$")) or name.count("/") > 1:
        if download:
            raise InputError(f"{folder}: no such model folder: {remedy}")
        return None
    snapshot, problem = take_snapshot(name, MODEL_FILES, is_whole, download)
    if snapshot is not None:
        logger.info("%s: revision %s of the hub", name, snapshot.name)
    elif download:
        raise InputError(
            f"{name}: the model is neither a local folder nor in the hub cache, and cannot be fetched "
            f"({problem}): correct the name, or fetch it where there is internet "
            f"(slurm/prepare.sh --model-id {name})"
        )
    return snapshot


def take_snapshot(
    repo_id: str, patterns: list[str], is_whole: Callable[[Path], bool], download: bool
) -> tuple[Path | None, str]:
    """Return a hub repository's whole local snapshot, else a fetched one where allowed, else None and the reason."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    problem = "its files here are incomplete"
    name, _, revision = repo_id.partition("@")
    for is_local in (True, False) if download else (True,):
        try:
            found = snapshot_download(
                name, revision=revision or None, allow_patterns=patterns, local_files_only=is_local
            )
            if not is_local or is_whole(Path(found)):
                return Path(found), ""
        except (HfHubHTTPError, OSError, ValueError) as error:
            problem = one_line(error)[:200]
    return None, problem


def find_missing_files(folder: Path) -> list[str]:
    """Return the files that a model folder lacks, for instance after an interrupted fetch."""
    index = folder / "model.safetensors.index.json"
    names = read_index(index) if index.is_file() else {"model.safetensors"}
    missing = sorted(name for name in names | {"config.json"} if not (folder / name).is_file())
    return missing if any(folder.glob("*processor_config.json")) else [*missing, "preprocessor_config.json"]


def read_index(path: Path) -> set[str]:
    """Return the files that an index of weights names.

    Raises InputError where it is damaged or names a file outside its folder, or of another kind.
    """
    try:
        names = set(read_json(path)["weight_map"].values())
        outside = sorted(name for name in names if name != Path(name).name or not name.endswith(".safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path.parent}: {path.name} cannot be read ({one_line(error)}): fetch it again") from None
    if outside:
        raise InputError(
            f"{path}: names weights outside its folder or no safetensors ({one_line(outside[0])[:100]}): fetch it again"
        )
    return names


def read_settings(path: Path, remedy: str = "fetch the model again") -> dict[str, Any]:
    """Return the content of a model folder's JSON file.

    Raises InputError if it is missing or damaged.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path.parent}: not a model folder ({path.name}: {one_line(error)}): {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path.parent}: not a model folder ({path.name} holds no settings): {remedy}")
    return content


def is_within(path: Path) -> bool:
    """Whether a file of a model folder lies there, or where the hub's cache keeps it, rather than behind a link out."""
    place, folder = path.resolve(), path.parent.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    return place.is_relative_to(folder) or place.is_relative_to(blobs)


def identify_model(folder: Path) -> str:
    """Return a short id of a model folder's settings, code and weights, the same wherever the folder lies.

    Raises InputError if the folder holds no config.json.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a model folder (no config.json): correct the model's name or path")
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _IDENTITY_SUFFIXES and path.name not in _NO_IDENTITY and path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0{_digest(path)}\0".encode())
    return digest.hexdigest()[:16]


def check_unchanged(folder: Path, identity: str | None) -> None:
    """Raise InputError if a model's folder, which has been loaded, is no longer the one that was identified."""
    if identify_model(folder) != identity:
        raise InputError(f"{folder}: replaced while it was read: run this again")


def digest_published(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return the digest of each file that shapes a published model's embeddings; `settings` are its config.json's."""
    files = [*sorted(folder.glob("*.safetensors")), *folder.glob("preprocessor_config.json")]
    stored = json.loads(json.dumps(settings))  # where the number of a label is text
    return {path.name: _digest(path) for path in files} | {"config.json": hash_json(stored)}


def list_changed(folder: Path) -> str:
    """Return the names of a published folder's files that are not as published, as far as its config.json says."""
    settings = read_json_object(folder / "config.json")
    published = settings.pop(PROVENANCE_KEY.decode(), None)
    recorded = published.get("weights") if isinstance(published, dict) else None
    if not isinstance(recorded, dict):
        return ""
    found = digest_published(folder, settings)
    return ", ".join(name for name in {**recorded, **found} if found.get(name) != recorded.get(name))


def _digest(path: Path) -> str:
    """Return the digest of all bytes of a file; this process reads it once as long as size and time stay."""
    try:
        return _digest_once(path, path.stat().st_size, path.stat().st_mtime_ns)
    except OSError as error:
        raise unreadable(path, error) from None


@functools.lru_cache(maxsize=1024)
def _digest_once(path: Path, _size: int, _changed: int) -> str:
    return digest_file(path)
