"""Replaced and damaged files wait in `_removed/` of their dataset until it is complete again.

`_removed/N/` holds what one run set aside; `_removed/N_not_ours/` what this project did not write, which stays there.
"""

from collections.abc import Iterable
from pathlib import Path

from pipeline.embeddings_dataset.dataset import is_foreign_state
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.embeddings_dataset.parts import ForeignError, hash_rows, is_ours, read_part, rejects_beside
from pipeline.errors import DamagedError
from pipeline.files import workspace
from pipeline.files.tables import open_parquet, reading
from pipeline.log import logger

FOLDER, NOT_OURS = "_removed", "_not_ours"


def move(folder: Path, doomed: Iterable[Path]) -> None:
    """Move parts, each with its rejects, rejects and the state to a new folder in `_removed/`."""
    listed = sorted(doomed)
    listed += [rejects_beside(path) for path in listed if path.parent.name == "parts"]
    target = _name_target(folder)
    for path in dict.fromkeys(path for path in listed if path.exists()):
        workspace.move(path, target / path.relative_to(folder))
        logger.info("%s: moved to %s", path, target)


def move_all(folder: Path) -> None:
    """Move the state first, so that what a kill leaves still tells its origin, then all parts and rejects."""
    target = _name_target(folder)
    not_ours = target.with_name(target.name + NOT_OURS)
    files = [path for name in ("state.json", "parts/*", "_rejects/*") for path in sorted(folder.glob(name))]
    owners = {path: _is_ours(path) for path in files}
    is_foreign = False in owners.values() and True not in owners.values()  # then damaged files are foreign too
    strange = [path for path, ours in owners.items() if ours is False or (ours is None and is_foreign)]
    if strange:
        logger.warning("%s: not written by this project: kept in %s", strange[0], not_ours)
    for path in owners:
        workspace.move(path, (not_ours if path in strange else target) / path.relative_to(folder))


def discard(folder: Path) -> None:
    """Remove what was set aside; what this project did not write stays, and is named."""
    removed = folder / FOLDER
    kept = sorted(removed.glob(f"*{NOT_OURS}"))
    for path in kept:
        logger.warning("%s: not written by this project: move it away", path)
    doomed = set(removed.glob("*")) - set(kept) if kept else [removed]
    for path in doomed:
        workspace.discard(path)


def discard_ids(folder: Path, id_hashes: frozenset[int]) -> None:
    """Remove what was set aside and holds one of some ids, or cannot be searched; name what is not ours."""
    for path in sorted((folder / FOLDER).rglob("*.parquet")):
        try:
            with reading(path), open_parquet(path) as file:
                hashes = hash_rows(file.read([ID_COLUMN])) if ID_COLUMN in file.schema_arrow.names else []
            if id_hashes.isdisjoint(hashes):
                continue
        except DamagedError:
            pass
        if NOT_OURS in path.relative_to(folder).parts[1]:
            logger.warning("%s: may hold deleted ids, and was not written by this project: remove it yourself", path)
        else:
            workspace.remove(path)
            logger.warning("%s: removed, as it may hold the ids", path)


def _is_ours(path: Path) -> bool | None:
    """Return whether this project wrote a file, None where it is damaged so that it cannot tell."""
    if path.name == "state.json":
        return not is_foreign_state(path)
    if path.suffix != ".parquet":
        return path.name.startswith(".") and path.name.endswith(".tmp")
    if path.parent.name == "_rejects":
        return is_ours(path) or rejects_beside(path).exists()
    try:
        read_part(path)
    except ForeignError:
        return False
    except DamagedError:
        return None
    return True


def _name_target(folder: Path) -> Path:
    numbers = [int(path.name.split("_")[0]) for path in (folder / FOLDER).glob("[0-9]*")]
    return folder / FOLDER / str(max(numbers, default=0) + 1)
