"""List the files of folders: one that cannot be read is an InputError, files that are not data are counted."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from pipeline.errors import InputError, unreadable
from pipeline.ids import parse_dataset_id, parse_dataset_name, tar_name
from pipeline.log import logger

PARQUET_SUFFIXES = (".parquet", ".pq")
TAR_SUFFIX = ".tar"


def is_parquet(path: PurePath | str) -> bool:
    """Whether a name has a parquet's ending, in any case."""
    return str(path).lower().endswith(PARQUET_SUFFIXES)


def list_files(folder: Path, hidden: tuple[str, ...] = (".",)) -> list[Path]:
    """Return the files of a folder, links to files among them, by name; skip names that begin with one of `hidden`.

    A folder with the name of a data file is listed too, so that its reader fails instead of missing it.
    """
    with _naming(folder), os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(hidden)]
    endings = (*PARQUET_SUFFIXES, TAR_SUFFIX)
    return sorted(
        folder / entry.name for entry in found if entry.name.lower().endswith(endings) or not _is_folder(entry)
    )


def list_outputs(folder: Path, stage: int, ending: str) -> list[Path]:
    """Return a stage's parquets, NAME`ending`.parquet, by name; raise InputError if there are none."""
    files = list_files(folder) if folder.is_dir() else []
    found = [path for path in files if is_parquet(path) and path.stem.endswith(ending)]
    if not found:
        problem = f"holds no *{ending}.parquet" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {problem}: run stage {stage}, or correct the path")
    warn_of_others(folder, (path.name for path in set(files) - set(found)), f"*{ending}.parquet")
    return found


def list_intermediates(intermediates_dir: Path) -> dict[int, Path]:
    """Return stage 1's outputs by dataset id; none if there is no such folder."""
    if not intermediates_dir.is_dir():
        return {}
    found = (path for path in list_files(intermediates_dir) if is_parquet(path))
    ids = {path: parse_dataset_name(path.stem) for path in found}
    return {dataset_id: path for path, dataset_id in ids.items() if dataset_id is not None}


def find_tars(raw_dir: Path, intermediates: Iterable[int] = ()) -> dict[int, Path]:
    """Return the tars by dataset id, also of intermediates whose tar is gone; raise InputError if there is none."""
    tars = list[Path]()
    if raw_dir.is_dir():
        files = list_files(raw_dir)
        tars = [path for path in files if path.suffix.lower() == TAR_SUFFIX]
        warn_of_others(raw_dir, (path.name for path in set(files) - set(tars)), "*.tar")
    found = {dataset_id: raw_dir / tar_name(dataset_id) for dataset_id in intermediates}
    found |= {parse_dataset_id(path): path for path in tars}
    if not found:
        problem = "holds no .tar file" if raw_dir.is_dir() else "no such folder"
        raise InputError(f"{raw_dir}: {problem}: set [paths].raw_dir to the folder of the NNNN.tar files")
    return found


def walk_files(folder: Path, hidden: tuple[str, ...] = (".",)) -> Iterator[os.DirEntry[str]]:
    """Yield all files in and below a folder, and behind links to folders, but for names that begin with `hidden`."""
    places, seen, num_repeated = [os.fspath(folder)], set[str](), 0
    root = os.path.realpath(folder)
    while places:
        place = places.pop()
        real = os.path.realpath(place)
        if real in seen or root.startswith(real.rstrip(os.sep) + os.sep):
            num_repeated += 1
            continue
        seen.add(real)
        with _naming(place), os.scandir(place) as entries:
            found = sorted((entry for entry in entries if not entry.name.startswith(hidden)), key=lambda one: one.name)
        for entry in found:
            if not _is_folder(entry):
                yield entry
            else:  # links wait, so that a folder below is found under its own name first
                places.insert(0 if entry.is_symlink() else len(places), entry.path)
    if num_repeated:
        logger.warning(
            "%s: %d links lead to folders that are read already, or hold this one: passed over", folder, num_repeated
        )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and Path(entry.path).is_dir())


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
    except OSError as error:
        raise unreadable(folder, error) from None
