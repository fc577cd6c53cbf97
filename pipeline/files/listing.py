"""List the files of folders: a folder that cannot be read is an error, files that are not data are counted."""

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from pipeline.errors import InputError, one_line
from pipeline.ids import parse_dataset_id, parse_dataset_name, tar_name
from pipeline.log import logger

PARQUET_SUFFIXES = (".parquet", ".pq")
TAR_SUFFIX = ".tar"
# The folder in which the public download keeps its tars.
UNALIGNED = "dataset_unaligned"


def is_parquet(path: PurePath | str) -> bool:
    """Whether a name has a parquet's ending, in any case."""
    return str(path).lower().endswith(PARQUET_SUFFIXES)


def list_files(folder: Path, hidden: tuple[str, ...] = (".",)) -> list[Path]:
    """Return the files of a folder, links to files among them, by name; skip names that begin with one of `hidden`.

    A folder with the name of a data file is listed too, so that its reader fails instead of missing it. Raises
    InputError if the folder is missing or cannot be read.
    """
    with _naming(folder), os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(hidden)]
        names = [
            entry.name
            for entry in found
            if entry.name.lower().endswith((*PARQUET_SUFFIXES, TAR_SUFFIX)) or not _is_folder(entry)
        ]
    return [folder / name for name in sorted(names)]


def list_outputs(folder: Path, stage: int, ending: str) -> list[Path]:
    """Return a stage's parquets, NAME`ending`.parquet, by name, and count other files in the log.

    Raises InputError if there are none, or the folder is missing or cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: run stage {stage}, or correct the path")
    files = list_files(folder)
    found = [path for path in files if is_parquet(path) and path.stem.endswith(ending)]
    if not found:
        raise InputError(f"{folder}: holds no *{ending}.parquet: run stage {stage}, or correct the path")
    warn_of_others(folder, (path.name for path in set(files) - set(found)), f"*{ending}.parquet")
    return found


def find_tar_dir(raw_dir: Path) -> Path:
    """Return the folder of the tars: raw_dir, or `dataset_unaligned` in it, where the download puts them.

    Raises InputError if both hold tars.
    """
    places = [
        place
        for place in (raw_dir, raw_dir / UNALIGNED)
        if place.is_dir() and any(path.suffix.lower() == TAR_SUFFIX for path in list_files(place))
    ]
    if len(places) > 1:
        raise InputError(
            f"{raw_dir}: holds tars, and its folder {UNALIGNED} does too: set [paths].raw_dir to the one, or move them "
            "together"
        )
    return places[0] if places else raw_dir


def list_intermediates(intermediates_dir: Path) -> dict[int, Path]:
    """Return stage 1's outputs by dataset id; none if there is no such folder.

    Raises InputError if the folder cannot be read.
    """
    if not intermediates_dir.is_dir():
        return {}
    found = (path for path in list_files(intermediates_dir) if is_parquet(path))
    ids = {path: parse_dataset_name(path.stem) for path in found}
    return {dataset_id: path for path, dataset_id in ids.items() if dataset_id is not None}


def find_tars(raw_dir: Path, intermediates: Iterable[int] = ()) -> dict[int, Path]:
    """Return the tars by dataset id: those of raw_dir, and those of intermediates whose tar is gone.

    Counts other files in the log. Raises InputError if there is none, the folder cannot be read, or a tar is not named
    NNNN.tar.
    """
    place, tars = find_tar_dir(raw_dir), list[Path]()
    if raw_dir.is_dir():
        files = list_files(place)
        tars = [path for path in files if path.suffix.lower() == TAR_SUFFIX]
        warn_of_others(place, (path.name for path in set(files) - set(tars)), "*.tar")
    found = {dataset_id: place / tar_name(dataset_id) for dataset_id in intermediates}
    found |= {parse_dataset_id(path): path for path in tars}
    if not found:
        problem = "holds no .tar file" if raw_dir.is_dir() else "no such folder"
        raise InputError(f"{raw_dir}: {problem}: set [paths].raw_dir to the folder of the NNNN.tar files")
    return found


def walk_files(folder: Path, hidden: tuple[str, ...] = (".",)) -> Iterator[os.DirEntry[str]]:
    """Yield all files in and below a folder; skip names that begin with one of `hidden`.

    Links to folders are followed, but every folder is walked once, and none that contains `folder`.
    Raises InputError if one of the folders is missing or cannot be read.
    """
    # Links wait, so that a folder below is found under its own name first.
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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself, like a broken one
            return False
        raise


def warn_of_others(folder: Path, names: Iterable[str], wanted: str) -> None:
    """Warn about unwanted files of a folder, with their endings and three examples."""
    listed = sorted(names)
    if listed:
        endings = Counter(PurePath(name).suffix.lower() or "no ending" for name in listed)
        counts = ", ".join(f"{ending} {count}" for ending, count in endings.most_common())
        logger.warning(
            "%s: %d files are not %s and are passed over (%s), as %s",
            folder, len(listed), wanted, counts, ", ".join(listed[:3]),
        )  # fmt: skip


@contextmanager
def _naming(folder: Path | str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{folder}: no such folder: correct the path") from None
    except NotADirectoryError:
        raise InputError(f"{folder}: a file, where a folder is to be read: correct the path") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(
            f"{error.filename or folder}: cannot be read ({reason}): allow reading it, or move it elsewhere"
        ) from None
