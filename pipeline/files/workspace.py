"""Work in a folder: keep others out, set old output aside until the new is whole, clear up behind killed runs.

Only this module locks, renames and removes files (tests/test_layering.py holds that). An unfinished output has a hidden
name beside its place; renaming it makes it appear in one piece.
"""

import atexit
import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.log import logger

# The folder for files that appear together, when all are complete.
UNFINISHED = ".unfinished"
# The folder for old output until its successor is complete.
REPLACED = "_replaced"


# ------------------------------------------------------------------------------------------------ moving and removing


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link; it may be missing.

    Raises OSError if something is left.
    """
    while path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):  # another process is removing it too
            shutil.rmtree(path)
    path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a file or folder that nobody needs any more; ignore a failure."""
    with contextlib.suppress(OSError):
        remove(path)


def move(path: Path, target: Path) -> None:
    """Rename a file or folder, make the target's folder if need be, and replace a file of that name.

    Raises PipelineError if it cannot be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    except OSError as error:
        raise write_failure(target, error) from error


def move_unless_taken(path: Path, target: Path) -> bool:
    """Rename a file unless something has the name, and return whether it was free."""
    try:
        os.link(path, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        path.rename(target)
    else:
        path.unlink()
    return True


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the disk; some network file systems refuse this, and lose nothing by it."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


# ------------------------------------------------------------------------------------------------ temporary names


def temporary_path(path: Path) -> Path:
    """Return the hidden file or folder beside `path` that this process fills and then renames."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")


@functools.cache
def clear_once(folder: Path) -> None:
    """Remove the temporary files of killed processes of this host; once a process, as a dataset has many files."""
    pattern = re.compile(rf"\..+\.{re.escape(_host())}-(\d+)\.tmp")
    for candidate in folder.iterdir():
        match = pattern.fullmatch(candidate.name)
        if match and not _is_running(int(match.group(1))):
            discard(candidate)


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def private_folder(prefix: str) -> Path:
    """Return a new temporary folder, removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(discard, folder)
    return folder


# ------------------------------------------------------------------------------------------------ locking


def lock_path(path: Path) -> Path:
    """Return the hidden file beside `path` that is locked while `path` is being made."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(path: Path, doing: str, lock: Path | None = None) -> Iterator[None]:
    """Keep other processes from making `path` while the block runs; a killed process holds nothing.

    `lock` is the file to lock, `lock_path` by default; a file system without locks gives a warning. Raises
    PipelineError "`path`: process N on HOST `doing`" if another process holds the lock.
    """
    lock = lock or lock_path(path)
    descriptor = _acquire(path, doing, lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, doing: str, lock: Path) -> int:
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise write_failure(lock, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 256).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise PipelineError(f"{path}: {holder} {doing}") from None
        except OSError as error:
            _warn_of_no_locks(lock.parent, error.strerror)
            return descriptor
        if os.fstat(descriptor).st_nlink:  # else its last holder has removed it since it was opened
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)


@functools.cache
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    logger.warning("%s: cannot be locked (%s): do not make the same output twice at a time", folder, reason)


# ------------------------------------------------------------------------------------------------ replacing


@contextmanager
def writing_folder(path: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside `path` to fill; when the block ends well, sync and rename it.

    An earlier folder stays until then. A `resumable` one is held by one process, and keeps what a failed block put into
    it for the next. Raises PipelineError naming `path` if it cannot be written.
    """
    if path.is_file():
        raise PipelineError(f"{path}: a file, where a folder is to be written: remove it or give another path")
    with contextlib.ExitStack() as stack, naming_failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if resumable:
            folder = path.with_name(f".{path.name}.unfinished")
            stack.enter_context(locked(folder, "is at it: wait for that one, or stop it"))
        else:
            folder = temporary_path(path)
            stack.callback(discard, folder)
            clear_once(path.parent)
            remove(folder)  # of a killed process with our number, as in containers
        old = path.with_name(f".{path.name}.old")
        _bring_back(old, path)  # where a run was killed between the two renames
        folder.mkdir(exist_ok=resumable)
        yield folder
        for file_path in folder.rglob("*"):
            if file_path.is_file():
                sync_file(file_path)
        sync_folder(folder)
        try:
            # A full folder cannot be renamed over: for an instant there is neither.
            if path.exists():
                path.rename(old)
            folder.rename(path)
            sync_folder(path.parent)
        finally:
            _bring_back(old, path)


def _bring_back(old: Path, path: Path) -> None:
    """Give the old folder its name again if that is free, and remove it if not."""
    if old.exists() and not path.exists():
        old.rename(path)
    discard(old)


@contextmanager
def writing_together(folder: Path, names: list[str]) -> Iterator[Path]:
    """Yield a hidden folder to write files of these names in; when the block ends well, move them to `folder`.

    Earlier files stay until then; a kill while they are replaced leaves a gap, never a mixture of old and new.
    """
    unfinished = folder / UNFINISHED
    remove(unfinished)  # of a killed run
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for name in names:
            remove(folder / name)
        for name in names:
            (unfinished / name).rename(folder / name)
        sync_folder(folder)
    finally:
        discard(unfinished)


@contextmanager
def replacing(folder: Path, paths: list[Path]) -> Iterator[None]:
    """Move files and folders of a folder to its `_replaced/` while the block makes others in their place.

    When the block ends well they are removed. When it fails before one of the files is there again they come back, else
    they wait for the run that goes on. Files that a killed run has moved there stay, as they were complete.
    """
    aside = folder / REPLACED
    keeps_earlier = aside.is_dir()
    for path in paths:
        if keeps_earlier:
            remove(path)
        elif path.exists():
            move(path, aside / path.name)
    try:
        yield
    except BaseException:
        if paths and not any(path.is_file() for path in paths):
            for kept in sorted(aside.iterdir()) if aside.is_dir() else []:
                remove(folder / kept.name)
                move(kept, folder / kept.name)
            discard(aside)
        raise
    discard(aside)


@contextmanager
def naming_failures(path: Path) -> Iterator[None]:
    """Turn a failure to write beside `path` into a PipelineError that names `path`; pass on other errors."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not Path(str(error.filename)).is_relative_to(path.parent):
            raise  # something else that the block touched
        raise write_failure(path, error) from error


def write_failure(path: Path, error: OSError) -> PipelineError:
    """Say in one line why `path` could not be written and what to do."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return PipelineError(f"cannot write {path} ({reason}): free space or allow writing there, then run this again")


# ------------------------------------------------------------------------------------------------ writing a file


@contextmanager
def writing_to(path: Path) -> Iterator[Path]:
    """Yield a hidden name to write to; when the block ends well, sync it and rename it to `path`.

    Raises PipelineError naming `path` if the disk is full or the folder cannot be written.
    """
    with _filling(path) as temporary:
        clear_once(path.parent)
        yield temporary
        sync_file(temporary)
        move(temporary, path)
        sync_folder(path.parent)


@contextmanager
def _filling(path: Path) -> Iterator[Path]:
    temporary = temporary_path(path)
    try:
        with naming_failures(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
    finally:
        discard(temporary)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one piece."""
    with writing_to(path) as temporary:
        _dump(temporary, content)


def write_json_once(path: Path, content: Any) -> bool:
    """Write JSON in one piece unless another process has, and return whether this one did.

    Raises PipelineError if the disk is full or the folder cannot be written.
    """
    with _filling(path) as temporary:
        _dump(temporary, content)
        sync_file(temporary)
        return move_unless_taken(temporary, path)


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object, empty if the file is missing, damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
