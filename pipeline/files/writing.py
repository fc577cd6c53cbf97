"""Write a file in one piece: all of it appears under its name, or nothing does."""

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.files import workspace


@contextmanager
def writing_to(path: Path) -> Iterator[Path]:
    """Yield a hidden name to write to; when the block ends well it is synced to disk and renamed to `path`.

    Whatever goes wrong, `path` holds either what it held before or all of the new content.
    Raises PipelineError naming `path` where the disk is full or the folder cannot be written.
    """
    with _filling(path) as temporary:
        workspace.clear_once(path.parent)
        yield temporary
        workspace.sync_file(temporary)
        workspace.move(temporary, path)
        workspace.sync_folder(path.parent)


@contextmanager
def _filling(path: Path) -> Iterator[Path]:
    temporary = workspace.temporary_path(path)
    try:
        with workspace.naming_failures(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            workspace.remove(temporary)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one piece."""
    with writing_to(path) as temporary:
        _dump(temporary, content)


def write_json_once(path: Path, content: Any) -> bool:
    """Write JSON in one piece where nothing has the name, and return whether this process did.

    Of several processes the first writes it, and it stays. Raises PipelineError where the disk is full or the folder
    cannot be written.
    """
    with _filling(path) as temporary:
        _dump(temporary, content)
        workspace.sync_file(temporary)
        return workspace.move_unless_taken(temporary, path)


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object, empty where the file is missing, damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
