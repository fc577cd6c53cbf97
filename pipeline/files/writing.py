"""Write files and folders in one piece: all of it appears under its name, or nothing does."""

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

_cleared: set[Path] = set()


def temporary_path(path: Path) -> Path:
    """Name the hidden file beside `path` that this process writes before the rename."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")


def remove_stale_temporaries(path: Path) -> None:
    """Remove what killed processes of this host left of earlier tries at `path`; other hosts' are not ours to judge."""
    # A process that has our own number died before us: in a container every run may get the same one.
    _remove_stale(path.parent, re.escape(path.name), own_is_stale=True)


def _clear_once(folder: Path) -> None:
    """Remove what killed processes left of any file of a folder; once a process, as a dataset has many files."""
    if folder not in _cleared:
        _remove_stale(folder, ".+", own_is_stale=False)  # another thread of ours may be writing there
        _cleared.add(folder)


def _remove_stale(folder: Path, name_pattern: str, *, own_is_stale: bool) -> None:
    pattern = re.compile(rf"\.{name_pattern}\.{re.escape(_host())}-(\d+)\.tmp")
    for candidate in folder.iterdir():
        match = pattern.fullmatch(candidate.name)
        pid = int(match.group(1)) if match else None
        if pid is not None and (own_is_stale if pid == os.getpid() else not _is_running(pid)):
            if candidate.is_dir():
                shutil.rmtree(candidate, ignore_errors=True)
            else:
                candidate.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def writing_to(path: Path) -> Iterator[Path]:
    """Yield a hidden name to write to; when the block ends well it is synced to disk and renamed to `path`.

    Whatever goes wrong, `path` holds either what it held before or all of the new content.
    Raises PipelineError naming `path` where the disk is full or the folder cannot be written.
    """
    temporary = temporary_path(path)
    try:
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear_once(path.parent)
            yield temporary
            sync_file(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of a failure beside `path` that `path` could not be written; others are the block's own."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not Path(str(error.filename)).is_relative_to(path.parent):
            raise  # something else that the block touched
        raise write_failure(path, error) from error


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the rename to the disk; some network file systems refuse this, and lose nothing by it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_failure(path: Path, error: OSError) -> PipelineError:
    """Say in one line why `path` could not be written and what to do."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return PipelineError(f"cannot write {path} ({reason}): free space or allow writing there, then run this again")


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one piece."""
    with writing_to(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_json_once(path: Path, content: Any) -> bool:
    """Write JSON in one piece where nothing has the name, and return whether this process did.

    Of several processes the first writes it, and it stays. Raises PipelineError where the disk is full or the folder
    cannot be written.
    """
    temporary = temporary_path(path)
    try:
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            sync_file(temporary)
            try:
                _put_if_absent(temporary, path)
            except FileExistsError:
                return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def _put_if_absent(temporary: Path, path: Path) -> None:
    """Give a file a name unless it is taken, which raises FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        temporary.replace(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file says, empty where it is missing, damaged or no object: for what one can do without."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` to fill; when the block ends well it is synced to disk and renamed.

    A folder that is there already is moved aside first and removed after. Raises PipelineError naming `path` where
    the disk is full or the place cannot be written.
    """
    temporary, old = temporary_path(path), temporary_path(_old_path(path))
    if path.is_file():
        raise PipelineError(f"{path}: a file, where a folder is to be written: remove it or give another path")
    try:
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _bring_back(path)
            remove_stale_temporaries(path)
            remove_stale_temporaries(_old_path(path))
            temporary.mkdir()
            yield temporary
            for file_path in temporary.rglob("*"):
                if file_path.is_file():
                    sync_file(file_path)
            sync_folder(temporary)
            # For an instant there is neither the old nor the new one: a full folder cannot be renamed over.
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            sync_folder(path.parent)
    finally:
        if not path.exists() and old.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _old_path(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _bring_back(path: Path) -> None:
    """Put the old folder back that a run had moved aside when it was killed."""
    for left in path.parent.glob(f".{_old_path(path).name}.{_host()}-*.tmp"):
        if not path.exists():
            left.rename(path)


# ------------------------------------------------------------------------------------------------ replacing

# Where what is being replaced lies until what replaces it is complete.
REPLACED = "_replaced"


@contextmanager
def replacing(folder: Path, paths: list[Path]) -> Iterator[None]:
    """Move files and folders of a folder to its `_replaced/` while the block makes others in their place.

    Where the block fails before one of the files is there again, they come back; else they stay until
    `discard_replaced`. What a killed run has moved there is what was complete, and stays instead of what is there now.
    """
    aside = folder / REPLACED
    keeps_earlier = aside.is_dir()
    for path in paths:
        if keeps_earlier:
            _remove(path)
        elif path.exists():
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
    try:
        yield
    except BaseException:
        if paths and not any(path.is_file() for path in paths):
            for kept in sorted(aside.iterdir()) if aside.is_dir() else []:
                _remove(folder / kept.name)
                kept.rename(folder / kept.name)
            discard_replaced(folder)
        raise


def discard_replaced(folder: Path) -> None:
    """Remove what has been replaced, now that what replaces it is complete."""
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
