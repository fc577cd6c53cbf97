"""Open, write, replace and remove what this project makes, never through a link, and keep other processes out.

Only this module locks, renames and removes. A folder of outputs may be a link of the user's; below it, folders with a
name that only this project gives may not. An unfinished output has a hidden name; renaming makes it appear whole.
"""

import atexit
import errno
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from pipeline import LOGGER
from pipeline.errors import HeldError, PipelineError

# Side tables, the parts of an embeddings dataset, and folders on the way to their names.
_OWN_NAME = re.compile(r"_.+|parts|\.(.+\.)?unfinished|\..+\.(old|tmp)")
_DEPTH = 4  # so deep do they lie in each other; names above are the user's


@contextmanager
def opened_folder(folder: Path, *, make: bool = False) -> Iterator[int]:
    """Yield a folder's descriptor; `make` it if need be. Raises OSError (ELOOP) if one that is ours is a link."""
    parts = folder.absolute().parts
    first = max(1, len(parts) - _DEPTH)
    while first < len(parts) and not _OWN_NAME.fullmatch(parts[first]):
        first += 1
    place = Path(*parts[:first])
    if make:
        place.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in parts[first:]:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptor)
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor, place = below, place / name
        place = folder  # relative, if it was
        yield descriptor
    except OSError as error:
        if isinstance(error.filename, str):  # the name alone, where it was used with the descriptor
            error.filename = str(place / error.filename)
            if Path(error.filename).is_symlink():
                raise _refuse(error.filename) from None
        raise
    finally:
        os.close(descriptor)


def list_names(folder: Path) -> list[str]:
    with opened_folder(folder) as descriptor, os.scandir(descriptor) as entries:
        return sorted(entry.name for entry in entries)


def open_file(path: Path, flags: int) -> int:
    """Open a file of this project's and return its descriptor; make its folder where `flags` make the file.

    Raises OSError (ELOOP) where it or a folder that is ours is a link, and for writing to a pipe or to a second name.
    """
    with opened_folder(path.parent, make=bool(flags & os.O_CREAT)) as folder:
        descriptor = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=folder)
    status = os.fstat(descriptor)
    if flags & (os.O_WRONLY | os.O_RDWR) and (status.st_nlink > 1 or stat.S_ISFIFO(status.st_mode)):
        os.close(descriptor)
        raise _refuse(str(path))
    return descriptor


def open_without_waiting(path: Path) -> BufferedReader:
    """Open a file to read; raise OSError for a pipe, a device or a file of the kernel's, which may never end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 (not ours)
    with suppress(OSError):  # the kernel's log cannot be read while it is empty
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode) and (status.st_size > 0 or not os.pread(file.fileno(), 1, 0)):
            return file
    file.close()
    raise OSError(errno.EINVAL, "not a file", str(path))


@contextmanager
def naming_failures(path: Path) -> Iterator[None]:
    """Turn a failure to write beside `path` into a PipelineError that names `path`; pass on other errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise PipelineError(f"cannot write {path} ({error.filename} is {error.strerror}): move it away") from error
        places = (path.parent, "/proc")  # there is what `pin` gives
        if error.filename is not None and not any(Path(str(error.filename)).is_relative_to(place) for place in places):
            raise  # something else that the block touched
        reason = os.strerror(error.errno) if error.errno else str(error)
        problem = f"cannot write {path} ({reason}): free space or allow writing there, then run this again"
        raise PipelineError(problem) from error


def _refuse(path: str) -> OSError:
    return OSError(errno.ELOOP, "a link or pipe, and nothing is made or removed through one", path)


def make_folder(folder: Path) -> None:
    """Make a folder of this project's, and those above it, unless it is there; refuse a link (OSError)."""
    with opened_folder(folder, make=True):
        pass


def pin(folder: Path) -> Path:
    """Return a path that stays with a folder of this project's, whatever takes its name, until this process ends.

    It is for libraries that open files by their paths. Without /proc it is the folder's own.
    """
    with opened_folder(folder, make=True) as descriptor:
        pinned = Path(f"/proc/{os.getpid()}/fd/{os.dup(descriptor)}")
    return pinned if pinned.is_dir() else folder


def refuse_folder(path: Path) -> None:
    """Raise OSError (EISDIR) for a folder without a name of this project's: it is the user's, in a file's place."""
    if path.is_dir() and not path.is_symlink() and not any(map(_OWN_NAME.fullmatch, path.absolute().parts[-_DEPTH:])):
        raise OSError(errno.EISDIR, "a folder of yours, where this project writes a file", str(path))


def remove(path: Path) -> None:
    """Remove a file, a folder of this project's with its content, or a link, if it is there.

    Raises OSError behind a link, and for a folder of the user's.
    """
    refuse_folder(path)
    with suppress(FileNotFoundError), opened_folder(path.parent) as folder:
        while stat.S_ISDIR(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
            with suppress(FileNotFoundError):  # another process is removing it too
                shutil.rmtree(path.name, dir_fd=folder)
        os.unlink(path.name, dir_fd=folder)


def discard(path: Path) -> None:
    """Remove a file or folder that nobody needs any more; ignore a failure."""
    with suppress(OSError):
        remove(path)


def move(path: Path, target: Path) -> None:
    """Rename a file or folder, replacing a file of that name; raise PipelineError if it cannot be written there."""
    with (
        naming_failures(target),
        opened_folder(path.parent) as source,
        opened_folder(target.parent, make=True) as folder,
    ):
        os.replace(path.name, target.name, src_dir_fd=source, dst_dir_fd=folder)


def link(path: Path, target: Path) -> None:
    """Give a file a second name in its folder unless something has that name."""
    with opened_folder(path.parent) as folder:
        try:
            os.link(path.name, target.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.rename(path.name, target.name, src_dir_fd=folder, dst_dir_fd=folder)


def sync_file(path: Path) -> None:
    descriptor = open_file(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the disk; some network file systems refuse this, and lose nothing by it."""
    with opened_folder(folder) as descriptor, suppress(OSError):
        os.fsync(descriptor)


def temporary_path(path: Path) -> Path:
    """Return a new name beside `path`, hidden, for a file or folder that this process fills and then renames."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(8)}.tmp")


def is_temporary(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"\..+\.(\w+)-(\d+)-[0-9a-f]{16}\.tmp", name)


@functools.cache  # once a process is enough, as a dataset has many files
def clear_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed processes of this host."""
    for name in list_names(folder):
        if (holder := is_temporary(name)) and holder[1] == _host():
            try:
                os.kill(int(holder[2]), 0)
            except ProcessLookupError:
                discard(folder / name)
            except (PermissionError, OverflowError):
                pass


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def private_folder(prefix: str) -> Path:
    """Return a new temporary folder, removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"_{prefix}"))
    atexit.register(discard, folder)
    return folder


@contextmanager
def locked(path: Path, doing: str, lock: Path | None = None, *, shared: bool = False) -> Iterator[None]:
    """Keep other processes from making `path` while the block runs; a killed process holds nothing.

    Those that take it as `shared` keep out only those that do not. Raises HeldError "`path`: process N on HOST
    `doing`" if another process holds the lock.
    """
    lock = lock or path.with_name(f".{path.name}.lock")
    while True:
        with naming_failures(lock):
            descriptor = open_file(lock, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 256).decode(errors="replace").partition("\n")[0] or "another process"
            os.close(descriptor)
            raise HeldError(f"{path}: {holder} {doing}") from None
        except OSError:
            LOGGER.warning("%s: this file system has no locks: let one process at a time work there", lock.parent)
            remove(lock)
            break
        if os.fstat(descriptor).st_nlink:  # else its last holder has removed it since it was opened
            break
        os.close(descriptor)
    try:
        with naming_failures(lock):
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):  # others share it: the last of them removes it
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(lock)
        os.close(descriptor)


@contextmanager
def writing_folder(path: Path, *, resumable: bool = False, made: str = ".*") -> Iterator[Path]:
    """Yield a hidden folder beside `path` to fill; when the block ends well, sync it and give it that name.

    An earlier folder stays until then; files in it whose names `made`, a pattern, does not match are the user's, and
    move on to the new one. A `resumable` folder is held by one process, and keeps what a failed block put into it for
    the next. Raises PipelineError naming `path` if it cannot be written, or a folder of the user's has such a name.
    """
    if path.is_file():
        raise PipelineError(f"{path}: a file, where a folder is to be written: remove it or give another path")
    old = path.with_name(f".{path.name}.old")
    with ExitStack() as stack, naming_failures(path):
        if resumable:
            folder = path.with_name(f".{path.name}.unfinished")
            stack.enter_context(locked(folder, "is at it: wait for that one, or stop it"))
        else:
            folder = temporary_path(path)
            stack.callback(discard, folder)
        make_folder(folder)
        clear_temporaries(path.parent)
        _bring_back(old, path, made)  # where a run was killed between the two renames
        for name in list_names(path) if path.exists() else []:
            if re.fullmatch(made, name):
                refuse_folder(path / name)
        yield folder
        for file_path in folder.rglob("*"):
            if file_path.is_file():
                sync_file(file_path)
        sync_folder(folder)
        try:
            if path.exists():  # a full folder cannot be renamed over: for an instant there is neither
                move(path, old)
            move(folder, path)
            sync_folder(path.parent)
        finally:
            _bring_back(old, path, made)


def _bring_back(old: Path, path: Path, made: str) -> None:
    """Give the old folder its name again if that is free; else move the user's files out of it, and remove it."""
    with suppress(FileNotFoundError):
        names = list_names(old)
        if not path.exists():
            move(old, path)
            return
        for name in names:
            if not re.fullmatch(made, name) and not (path / name).exists():
                move(old / name, path / name)
        discard(old)


def remove_made(folder: Path, names: str) -> None:
    """Remove files below a folder that `names`, a pattern `FOLDER/FILE`, matches, and empty folders; name the rest."""
    with suppress(FileNotFoundError):
        list_names(folder)  # no link
        for path in sorted(folder.rglob("*"), reverse=True):
            is_folder = path.is_dir() and not path.is_symlink()
            pattern = names.partition("/")[0] + "(/.*)?" if is_folder else names
            if re.fullmatch(pattern, path.relative_to(folder).as_posix()) and not (is_folder and list_names(path)):
                remove(path)
        if others := list_names(folder):
            LOGGER.warning("%s: not written by this project: move it away", folder / others[0])
        else:
            remove(folder)


@contextmanager
def replacing(folder: Path, paths: list[Path]) -> Iterator[None]:
    """Move files and folders of a folder to `_replaced/1` there while the block makes others in their place.

    When the block ends well they are removed. When it fails before one of the files is there again they come back, else
    they wait for the run that goes on. Files that a killed run has moved there stay, as they were complete. Raises
    OSError for a folder of the user's in a file's place.
    """
    aside = folder / "_replaced" / "1"
    keeps_earlier = aside.is_dir()
    for path in paths:
        refuse_folder(path)
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
            remove_made(aside.parent, f"{aside.name}/.+")
        raise
    remove_made(aside.parent, f"{aside.name}/.+")


@contextmanager
def writing_to(path: Path, *, once: bool = False) -> Iterator[Path]:
    """Yield a hidden name to write to; when the block ends well, sync it and rename it to `path`.

    With `once` a file that has that name stays. Raises PipelineError naming `path` if it cannot be written.
    """
    temporary = temporary_path(path)
    str(path).encode()  # for those that read it: Parquet's library takes UTF-8 alone
    try:
        with naming_failures(path), opened_folder(path.parent, make=True) as folder:
            os.close(open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            clear_temporaries(path.parent)
            pinned = Path(f"/proc/{os.getpid()}/fd/{folder}/{temporary.name}")  # a link may take the folder's name
            yield pinned if pinned.exists() else temporary
            sync_file(temporary)
            (link if once else move)(temporary, path)
            sync_folder(path.parent)
    finally:
        discard(temporary)


def write_json(path: Path, content: Any, *, once: bool = False) -> None:
    """Write JSON in one piece; `once`, unless the file is there."""
    with writing_to(path, once=once) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object, empty if the file is missing, damaged or holds something else."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; raise OSError for a pipe, ValueError if it is damaged or absurdly long."""
    with open_without_waiting(path) as file:
        if os.fstat(file.fileno()).st_size > 2**30:  # hashes of ids are the longest: 11 bytes each
            raise ValueError("absurdly long")
        return parse_json(file.read())


def parse_json(text: str | bytes) -> Any:
    """Return the value that JSON stands for; raise ValueError if it is none, or nested without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
