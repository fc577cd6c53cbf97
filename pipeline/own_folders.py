"""Open, move and remove what this project makes in an output, never through a link.

The output itself may be a link that the user made; below it, folders with a name that only this project gives may not.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from pipeline.errors import PipelineError

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
    """Return the sorted names in a folder."""
    with opened_folder(folder) as descriptor, os.scandir(descriptor) as entries:
        return sorted(entry.name for entry in entries)


def open_file(path: Path, flags: int) -> int:
    """Open a file of this project's and return its descriptor; make its folder where `flags` make the file.

    Raises OSError (ELOOP) if it or a folder that is ours is a link, or it is to be written and a pipe or of a second
    name.
    """
    with opened_folder(path.parent, make=bool(flags & os.O_CREAT)) as folder:
        descriptor = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=folder)
    status = os.fstat(descriptor)
    if flags & (os.O_WRONLY | os.O_RDWR) and (status.st_nlink > 1 or stat.S_ISFIFO(status.st_mode)):
        os.close(descriptor)
        raise _refuse(str(path))
    return descriptor


def open_without_waiting(path: Path) -> BufferedReader:
    """Open a file to read; raise OSError for a pipe or a device, which may never end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 (not ours)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a file", str(path))
    return file


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
    try:
        with opened_folder(path.parent) as source, opened_folder(target.parent, make=True) as folder:
            os.replace(path.name, target.name, src_dir_fd=source, dst_dir_fd=folder)
    except OSError as error:
        raise write_failure(target, error) from error


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
    """Force a file's bytes to the disk."""
    descriptor = open_file(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the disk; some network file systems refuse this, and lose nothing by it."""
    with opened_folder(folder) as descriptor, suppress(OSError):
        os.fsync(descriptor)


def write_failure(path: Path, error: OSError) -> PipelineError:
    """Say in one line why `path` could not be written and what to do."""
    if error.errno in (errno.ELOOP, errno.EISDIR):
        return PipelineError(f"cannot write {path} ({error.filename} is {error.strerror}): move it away")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return PipelineError(f"cannot write {path} ({reason}): free space or allow writing there, then run this again")
