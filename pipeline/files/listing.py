"""List the files of folders: one that cannot be read is an InputError, files that are not data are counted."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath

from pipeline.errors import InputError, unreadable
from pipeline.ids import parse_dataset_id, parse_dataset_name, tar_name
from pipeline.log import logger

PARQUET_SUFFIXES = (".parquet", ".pq")
TAR_SUFFIX = ".tar"


def is_parquet(path: PurePath | str) -> bool:
    return str(path).lower().endswith(PARQUET_SUFFIXES)


def list_files(folder: Path) -> list[Path]:
    """Return the files of a folder, links to files among them, by name, but for those whose names begin with a dot.

    A folder with the name of a data file is listed too, so that its reader fails instead of missing it.
    """
    try:
        with os.scandir(folder) as entries:
            found = [folder / entry.name for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise unreadable(folder, error) from None
    endings = (*PARQUET_SUFFIXES, TAR_SUFFIX)
    return sorted(path for path in found if path.name.lower().endswith(endings) or not path.is_dir())


def _choose(folder: Path, wanted: str, is_wanted: Callable[[Path], bool]) -> tuple[list[Path], str]:
    """Return the wanted files of a folder, and the problem if there are none; warn of others."""
    if not folder.is_dir():
        return [], "no such folder"
    files = list_files(folder)
    found = list(filter(is_wanted, files))
    warn_of_others(folder, (path.name for path in set(files) - set(found)), wanted)
    return found, f"holds no {wanted}"


def list_outputs(folder: Path, stage: int, ending: str) -> list[Path]:
    """Return a stage's parquets, NAME`ending`.parquet, by name; raise InputError if there are none."""
    found, problem = _choose(folder, f"*{ending}.parquet", lambda path: is_parquet(path) and path.stem.endswith(ending))
    if not found:
        raise InputError(f"{folder}: {problem}: run stage {stage}, or correct the path")
    return found


def list_intermediates(intermediates_dir: Path) -> dict[int, Path]:
    """Return stage 1's outputs by dataset id; none if there is no such folder."""
    if not intermediates_dir.is_dir():
        return {}
    ids = {path: parse_dataset_name(path.stem) for path in list_files(intermediates_dir) if is_parquet(path)}
    return {dataset_id: path for path, dataset_id in ids.items() if dataset_id is not None}


def find_tars(raw_dir: Path, intermediates: Iterable[int] = ()) -> dict[int, Path]:
    """Return the tars by dataset id, also of intermediates whose tar is gone; raise InputError if there is none."""
    tars, problem = _choose(raw_dir, f"*{TAR_SUFFIX}", lambda path: path.suffix.lower() == TAR_SUFFIX)
    found = {dataset_id: raw_dir / tar_name(dataset_id) for dataset_id in intermediates}
    found |= {parse_dataset_id(path): path for path in tars}
    if not found:
        raise InputError(f"{raw_dir}: {problem}: set [paths].raw_dir to the folder of the NNNN.tar files")
    return found


def walk_files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, and behind links to folders, but for names that begin with a dot."""

    def refuse(error: OSError) -> None:
        raise unreadable(folder, error) from None

    root, waiting, seen, num_repeated = folder.resolve(), [folder], set[Path](), 0
    # Links to folders wait, so that a folder below is found under its own name first.
    for place, folders, names in (found for start in waiting for found in os.walk(start, onerror=refuse)):
        real = Path(place).resolve()
        if real in seen or (real != root and root.is_relative_to(real)):
            folders.clear()
            num_repeated += 1
            continue
        seen.add(real)
        folders[:] = sorted(one for one in folders if one[0] != ".")
        waiting += filter(Path.is_symlink, (Path(place, one) for one in folders))
        yield from (os.path.join(place, name) for name in sorted(names) if name[0] != ".")  # noqa: PTH118 (a million)
    if num_repeated:
        logger.warning(
            "%s: %d links lead to folders that are read already, or hold this one: passed over", folder, num_repeated
        )


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
