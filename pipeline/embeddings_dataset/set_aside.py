"""Replaced and damaged files wait in `_removed/1/` (or 2, ...) of their dataset until it is complete again."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from pipeline import own_folders
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.parts import ForeignError, list_part_files, read_part, rejects_beside
from pipeline.errors import DamagedError
from pipeline.files import workspace
from pipeline.log import logger

FOLDER = "_removed"


def move(folder: Path, doomed: Iterable[Path]) -> None:
    """Move parts, each with its rejects, rejects and the state to a new folder in `_removed/`."""
    listed = [path for one in doomed for path in (one, *([rejects_beside(one)] if one.parent.name == "parts" else []))]
    numbers = [int(path.name) for path in (folder / FOLDER).glob("*") if path.name.isdecimal()]
    target = folder / FOLDER / str(max(numbers, default=0) + 1)
    for path in dict.fromkeys(path for path in listed if path.exists()):
        own_folders.move(path, target / path.relative_to(folder))
        logger.info("%s: moved to %s", path, target)


def move_all(dataset: EmbeddingsDataset) -> None:
    """Move the state first, so that what a kill leaves still tells its origin, then all parts and rejects.

    Raises ForeignError, and moves nothing, where this project did not write the state or a part.
    """
    parts = [dataset.path_of(name) for name in list_part_files(dataset.folder)]
    if dataset.find_begun() is None and parts:  # all are damaged, and nothing says whose they are
        raise ForeignError(parts[0])
    for path in parts:
        with contextlib.suppress(DamagedError):
            read_part(path)
    rejects = sorted((dataset.folder / "_rejects").glob("rg*.parquet"))
    move(dataset.folder, [dataset.state_path, *parts, *rejects])


def list_files(folder: Path) -> list[Path]:
    """Return the parts and rejects that wait there, the last set aside last."""
    listed = (folder / FOLDER).glob("*/*/rg*.parquet")
    return sorted((path for path in listed if path.parts[-3].isdecimal()), key=lambda path: (int(path.parts[-3]), path))


def discard(folder: Path) -> None:
    """Remove what was set aside; other files there stay, and are named."""
    workspace.remove_made(folder / FOLDER, r"\d+")
