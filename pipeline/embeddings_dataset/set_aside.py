"""What is replaced or damaged is moved to `_removed/` of its dataset, and goes when the dataset is complete again.

`_removed/N/` holds what one run set aside; `_removed/N_not_ours/` what this project did not write, which stays there.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.embeddings_dataset.parts import (
    STAGE,
    ForeignError,
    hash_rows,
    is_foreign_state,
    read_part,
    rejects_beside,
)
from pipeline.errors import DamagedError
from pipeline.files.failures import write_failure
from pipeline.files.tables import open_parquet, read_provenance, reading
from pipeline.log import logger

FOLDER, NOT_OURS = "_removed", "_not_ours"


def move(folder: Path, doomed: Iterable[Path]) -> None:
    """Move parts, each with its rejects, rejects and the state to a new folder in `_removed/`."""
    listed = sorted(doomed)
    listed += [rejects_beside(path) for path in listed if path.parent.name == "parts"]
    target = _name_target(folder)
    for path in dict.fromkeys(path for path in listed if path.exists()):
        _move(folder, path, target)
        logger.info("%s: moved to %s", path, target)


def move_all(folder: Path) -> None:
    """Move the state first, so that what a kill leaves still says what it is, then all parts and rejects."""
    target = _name_target(folder)
    not_ours = target.with_name(target.name + NOT_OURS)
    whose = {path: _is_ours(path) for path in _list_all(folder)}
    is_ours = any(whose.values()) or False not in whose.values()  # of a damaged file its neighbours tell whose it is
    strange = [path for path, ours in whose.items() if ours is False or (ours is None and not is_ours)]
    if strange:
        logger.warning("%s: not written by this project: kept in %s", strange[0], not_ours)
    for path in strange:
        _move(folder, path, not_ours)
    for name in ("state.json", "parts", "_rejects"):
        if (folder / name).exists():
            _move(folder, folder / name, target)


def discard(folder: Path) -> None:
    """Remove what was set aside; what this project did not write stays, and is named."""
    removed = folder / FOLDER
    if not removed.is_dir():
        return
    for path in sorted(removed.iterdir()):
        if path.name.endswith(NOT_OURS):
            logger.warning("%s: not written by this project: move it away", path)
        else:
            shutil.rmtree(path, ignore_errors=True)  # another shard may be at it too
    try:
        removed.rmdir()
    except OSError:
        logger.debug("%s: left where it is", removed)


def discard_ids(folder: Path, id_hashes: frozenset[int]) -> None:
    """Remove what was set aside and holds one of some ids, or cannot be searched; what is not ours is only named."""
    for path in sorted((folder / FOLDER).rglob("*.parquet")):
        try:
            with reading(path), open_parquet(path) as file:
                hashes = hash_rows(file.read([ID_COLUMN])) if ID_COLUMN in file.schema_arrow.names else []
            if id_hashes.isdisjoint(hashes):
                continue
        except DamagedError:
            hashes = []
        if NOT_OURS in path.relative_to(folder).parts[1]:
            logger.warning("%s: may hold deleted ids, and was not written by this project: remove it yourself", path)
        else:
            path.unlink()
            logger.warning("%s: removed, as it may hold the ids", path)


def _list_all(folder: Path) -> list[Path]:
    places = [folder / "parts", folder / "_rejects"]
    return [
        *(path for path in [folder / "state.json"] if path.exists()),
        *(path for place in places if place.is_dir() for path in sorted(place.iterdir())),
    ]


def _is_ours(path: Path) -> bool | None:
    """Whether this project wrote a file, None where it is damaged so that it cannot tell."""
    if path.name == "state.json":
        return not is_foreign_state(path)
    if path.suffix != ".parquet":
        return path.name.startswith(".") and path.name.endswith(".tmp")
    try:
        if path.parent.name == "parts":
            read_part(path)
            return True
        return (read_provenance(path) or {}).get("stage") == STAGE or rejects_beside(path).exists()
    except ForeignError:
        return False
    except DamagedError:
        return None


def _name_target(folder: Path) -> Path:
    removed = folder / FOLDER
    numbers = [int(path.name.split("_")[0]) for path in removed.glob("[0-9]*")] if removed.is_dir() else []
    return removed / str(max(numbers, default=0) + 1)


def _move(folder: Path, path: Path, target: Path) -> None:
    place = target / path.relative_to(folder)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    except OSError as error:
        raise write_failure(place, error) from error
