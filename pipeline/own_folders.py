"""Open what this project makes in an output, never through a link.

The output itself may be a link that the user made; below it, folders with a name that only this project gives may not.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Side tables, the parts of an embeddings dataset, and folders on the way to their names.
_OWN_NAME = re.compile(r"_.+|parts|\.(.+\.)?unfinished|\..+\.(old|tmp)")
_DEPTH = 4  # so deep do they lie in each other; names above are the user's


@contextmanager
def opened_folder(folder: Path, *, make: bool = False) -> Iterator[int]:
    """Yield a folder's descriptor, for `dir_fd`; `make` it and those above if need be.

    Raises OSError (ELOOP) if one that this project makes is a link, others as `os.open` does.
    """
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
            place /= name
            above, descriptor = descriptor, _open_below(place, descriptor, make=make)
            os.close(above)
        yield descriptor
    except OSError as error:
        if isinstance(error.filename, str):  # the name alone, where it was used with the descriptor
            error.filename = str(folder / error.filename)
        raise
    finally:
        os.close(descriptor)


def _open_below(place: Path, above: int, *, make: bool) -> int:
    if make:
        with suppress(FileExistsError):
            os.mkdir(place.name, dir_fd=above)
    try:
        return os.open(place.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
    except OSError as error:
        raise _name(error, place) from None


def list_names(folder: Path) -> list[str]:
    """Return the sorted names in a folder.

    Raises OSError as `opened_folder` does.
    """
    with opened_folder(folder) as descriptor, os.scandir(descriptor) as entries:
        return sorted(entry.name for entry in entries)


def open_file(path: Path, flags: int) -> int:
    """Open a file of this project's and return its descriptor; make its folder where `flags` make the file.

    Raises OSError (ELOOP) if it, or its folder where this project makes that, is a link, others as `os.open` does.
    """
    with opened_folder(path.parent, make=bool(flags & os.O_CREAT)) as folder:
        try:
            return os.open(path.name, flags | os.O_NOFOLLOW, 0o666, dir_fd=folder)
        except OSError as error:
            raise _name(error, path) from None


def _name(error: OSError, path: Path) -> OSError:
    """Return an error with the whole path, and one and the same for every link."""
    if path.is_symlink():
        return OSError(errno.ELOOP, "a link, and nothing is made or removed through one", str(path))
    error.filename = str(path)
    return error
