"""List what folders hold: what cannot be read is an error, and what is no data is counted."""

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from pipeline.errors import InputError, one_line
from pipeline.log import logger

PARQUET_SUFFIXES = (".parquet", ".pq")
TAR_SUFFIX = ".tar"
_NUM_EXAMPLES = 3


def is_parquet(path: PurePath | str) -> bool:
    """Whether a name ends as a parquet's does, in any case."""
    return str(path).lower().endswith(PARQUET_SUFFIXES)


def list_files(folder: Path, hidden: tuple[str, ...] = (".",)) -> list[Path]:
    """Return the files that stand in a folder, links to files among them, by name.

    Names that begin with one of `hidden` are passed over. A folder that is named as data is listed, so that whoever
    reads it fails on it and it is not left out. Raises InputError if the folder is missing or cannot be read.
    """
    with _naming(folder), os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(hidden)]
        names = sorted(entry.name for entry in found if _is_named_as_data(entry.name) or not _is_folder(entry))
    return [folder / name for name in names]


def list_outputs(folder: Path, stage: int, ending: str) -> list[Path]:
    """Return the parquets of a stage by name, those whose names end with `ending` but for the suffix.

    Other files are counted. Raises InputError if there are none, or the folder is missing or cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: run stage {stage}, or correct the path")
    files = list_files(folder)
    found = [path for path in files if is_parquet(path) and path.stem.endswith(ending)]
    if not found:
        raise InputError(f"{folder}: holds no *{ending}.parquet: run stage {stage}, or correct the path")
    warn_of_others(folder, (path.name for path in set(files) - set(found)), f"*{ending}.parquet")
    return found


def walk_files(folder: Path, hidden: tuple[str, ...] = (".",)) -> Iterator[os.DirEntry[str]]:
    """Yield whatever is no folder in a folder and below it; names that begin with one of `hidden` are passed over.

    Links to folders are followed, but every folder is walked once, and none that holds `folder` itself.
    Raises InputError if one of the folders is missing or cannot be read.
    """
    # Links wait, so that what they lead to goes by its own name where it has one here.
    own, linked = [os.fspath(folder)], list[str]()
    root, seen, num_repeated = os.path.realpath(folder), set[str](), 0
    while own or linked:
        place = own.pop() if own else linked.pop(0)
        real = os.path.realpath(place)
        if real in seen or root.startswith(real.rstrip(os.sep) + os.sep):
            num_repeated += 1
            continue
        seen.add(real)
        found: list[os.DirEntry[str]] = []
        with _naming(place), os.scandir(place) as entries:
            for entry in sorted((e for e in entries if not e.name.startswith(hidden)), key=lambda e: e.name):
                if not _is_folder(entry):
                    found.append(entry)
                else:
                    (linked if entry.is_symlink() else own).append(entry.path)
        yield from found
    if num_repeated:
        logger.warning(
            "%s: %d links lead to folders that are read already, or hold this one: passed over", folder, num_repeated
        )


def _is_named_as_data(name: str) -> bool:
    return is_parquet(name) or name.lower().endswith(TAR_SUFFIX)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself leads nowhere, as a broken one does
            return False
        raise


def warn_of_others(folder: Path, names: Iterable[str], wanted: str) -> None:
    """Warn of files that are not what is wanted of a folder: how many, with which endings, and some of them."""
    listed = sorted(names)
    if listed:
        endings = Counter(PurePath(name).suffix.lower() or "no ending" for name in listed)
        counts = ", ".join(f"{ending} {count}" for ending, count in endings.most_common())
        examples = ", ".join(listed[:_NUM_EXAMPLES])
        logger.warning(
            "%s: %d files are not %s and are passed over (%s), as %s", folder, len(listed), wanted, counts, examples
        )


@contextmanager
def _naming(folder: Path | str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{folder}: no such folder: correct the path") from None
    except NotADirectoryError:
        raise InputError(f"{folder}: a file, where a folder is to be read: correct the path") from None
    except OSError as error:
        place = error.filename if error.filename is not None else folder
        raise InputError(
            f"{place}: cannot be read ({error.strerror or one_line(error)}): allow reading it, or move it elsewhere"
        ) from None
