"""The per-tar stages' work: which tars, which outputs, what is kept, what failed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cli import Options, StageResult
from pipeline.config import Config
from pipeline.errors import ConfigError, InputError
from pipeline.files.listing import is_parquet, list_files, warn_of_others
from pipeline.files.tables import identify, is_complete, open_parquet, read_provenance
from pipeline.ids import parse_dataset_id
from pipeline.log import logger

# The folder in which the public download keeps its tars.
UNALIGNED = "dataset_unaligned"
MAX_NAMED = 10  # of those that an error lists


@dataclass(frozen=True)
class TarUnit:
    """One tar and what a stage makes of it; `intermediate_path` is stage 1's output for the tar."""

    dataset_id: int
    tar_path: Path
    intermediate_path: Path
    output_path: Path

    def identify_tar(self) -> list[dict[str, Any]]:
        """Tell the tar apart by name and size; a tar that is gone is no input any more."""
        return [identify(self.tar_path)] if self.tar_path.is_file() else []


def list_units(config: Config, options: Options, output_key: str, suffix: str = "") -> list[TarUnit]:
    """Return this shard's units for the tars named on the command line, or else all that there are.

    All are the tars of raw_dir and, for the stages that read intermediates (`suffix` given), also the intermediates
    whose tar is gone: what was made of them still counts. Raises InputError where there is nothing.
    """
    intermediates_dir, output_dir = config.path("intermediates_dir"), config.path(output_key)
    intermediates = list_intermediates(intermediates_dir) if suffix else {}
    tars = _take_named(options.tar_files) if options.tar_files else _find_tars(config.path("raw_dir"), intermediates)
    units = [
        TarUnit(
            dataset_id,
            tar_path,
            intermediates.get(dataset_id, intermediates_dir / f"{dataset_id:04d}.parquet"),
            output_dir / f"{dataset_id:04d}{suffix}.parquet",
        )
        for dataset_id, tar_path in sorted(tars.items())
    ]
    return options.shard.take(units)


def _take_named(tar_files: Iterable[Path]) -> dict[int, Path]:
    tars: dict[int, Path] = {}
    for path in tar_files:
        if tars.setdefault(parse_dataset_id(path), path) != path:
            raise ConfigError(f"--tar-file {path}: another one has this name too, and so the same output: give one")
    return tars


def find_tar_dir(raw_dir: Path) -> Path:
    """Return the folder of the tars: raw_dir, or `dataset_unaligned` in it, where a download may have put them.

    Raises InputError where both hold tars, so that none is left out unsaid.
    """
    places = [
        place
        for place in (raw_dir, raw_dir / UNALIGNED)
        if place.is_dir() and any(path.suffix.lower() == ".tar" for path in list_files(place))
    ]
    if len(places) > 1:
        raise InputError(
            f"{raw_dir}: holds tars, and its folder {UNALIGNED} does too: set [paths].raw_dir to the one, or move them "
            "together"
        )
    return places[0] if places else raw_dir


def list_tars(raw_dir: Path) -> list[Path]:
    """Return the raw tars of a folder by dataset id; names that begin with a dot are passed over, others are counted.

    Raises InputError if the folder is missing, cannot be read, or holds no tar or one whose name gives no dataset id.
    """
    if not raw_dir.is_dir():
        raise InputError(f"{raw_dir}: no such folder: set [paths].raw_dir to the folder of the NNNN.tar files")
    raw_dir = find_tar_dir(raw_dir)
    files = list_files(raw_dir)
    tars = [path for path in files if path.suffix.lower() == ".tar"]
    warn_of_others(raw_dir, (path.name for path in files if path not in set(tars)), "*.tar")
    if not tars:
        raise InputError(f"{raw_dir}: holds no .tar file: set [paths].raw_dir to the folder of the NNNN.tar files")
    return sorted(tars, key=parse_dataset_id)


def list_intermediates(intermediates_dir: Path) -> dict[int, Path]:
    """Return stage 1's outputs by dataset id; none where there is no such folder.

    Raises InputError if the folder cannot be read.
    """
    if not intermediates_dir.is_dir():
        return {}
    found = (path for path in list_files(intermediates_dir) if is_parquet(path))
    return {int(path.stem): path for path in found if path.stem.isascii() and path.stem.isdigit()}


def drop_missing(
    result: StageResult, config: Config, outputs: Iterable[Path], what: str, *, allowed: bool, setting: str
) -> None:
    """Count as dropped the images of intermediates for which there is no file NNNN_`what`.parquet among `outputs`.

    Without a folder of intermediates there is nothing to compare with. Raises InputError naming those without unless
    they are `allowed`, by `setting`.
    """
    if config.paths.intermediates_dir is None:
        logger.info("[paths].intermediates_dir is not set: no one looks whether %s are missing", what)
        return
    intermediates = list_intermediates(config.path("intermediates_dir"))
    made = {path.stem for path in outputs}
    missing = [path for path in intermediates.values() if f"{path.stem}_{what}" not in made]
    if not missing:
        return
    names = ", ".join(path.stem for path in missing[:MAX_NAMED]) + (", ..." if len(missing) > MAX_NAMED else "")
    said = f"{len(missing)} of {len(intermediates)} tars of {missing[0].parent} have no {what} ({names})"
    if not allowed:
        raise InputError(f"{said}: run the stage that makes them, or set {setting} = true to go on without")
    num_images = sum(open_parquet(path).metadata.num_rows for path in missing)
    logger.warning("%s: %d images are left out", said, num_images)
    result.add({"in": num_images, "dropped": num_images}, {f"missing_{what}": num_images})


def _find_tars(raw_dir: Path, intermediates: dict[int, Path]) -> dict[int, Path]:
    tar_dir = find_tar_dir(raw_dir)
    known = {dataset_id: tar_dir / f"{path.stem}.tar" for dataset_id, path in intermediates.items()}
    if not known or raw_dir.is_dir():
        try:
            known |= {parse_dataset_id(path): path for path in list_tars(raw_dir)}
        except InputError:
            if not known:
                raise
    return known


def do_tars(
    result: StageResult,
    config: Config,
    options: Options,
    output_key: str,
    suffix: str = "",
    *,
    describe: Callable[[TarUnit], dict[str, Any]],
    make: Callable[[TarUnit, dict[str, Any]], None],
    take_over: Callable[[TarUnit], dict[str, int]] | None = None,
) -> StageResult:
    """Do this shard's part of a stage that works tar by tar, and return its counts; see `list_units` and `run_units`.

    Raises InputError if a tar failed, PipelineError if too many items were rejected.
    """
    config.require_paths(*dict.fromkeys(["intermediates_dir", output_key, *([] if options.tar_files else ["raw_dir"])]))
    units = list_units(config, options, output_key, suffix)
    run_units(units, result, describe=describe, make=make, overwrite=options.overwrite, take_over=take_over)
    result.check_reject_fraction(config)
    return result


def run_units(
    units: Iterable[TarUnit],
    result: StageResult,
    describe: Callable[[TarUnit], dict[str, Any]],
    make: Callable[[TarUnit, dict[str, Any]], None],
    overwrite: bool,
    take_over: Callable[[TarUnit], dict[str, int]] | None = None,
) -> None:
    """Make what is not there yet, tar by tar, and add every tar's counts to `result`.

    `describe` gives the provenance that an output must have, `make` writes the output and its rejects and puts
    `counts` and `reasons` into the provenance. `take_over` gives the counts of an output without provenance that is to
    be kept, and raises InputError for one that is not. A tar that cannot be read fails alone: the others are done
    first.
    Raises StaleOutputError before anything is made, InputError in the end where tars failed.
    """
    planned: list[tuple[TarUnit, dict[str, Any]]] = []
    failures: list[str] = []
    for unit in units:
        try:
            provenance = describe(unit)
            if take_over and not overwrite and _is_foreign(unit.output_path):
                result.add(take_over(unit))
                result.kept.append(unit.output_path)
            elif is_complete(unit.output_path, provenance, overwrite):
                _add_kept(unit, result)
            else:
                planned.append((unit, provenance))
        except InputError as error:
            failures.append(str(error))
            logger.error("%s", error)
    total = len(planned) + len(result.kept) + len(failures)
    for number, (unit, provenance) in enumerate(planned, start=1):
        logger.info("%s: %s (%d of %d)", result.stage, unit.tar_path.name, number, len(planned))
        try:
            make(unit, provenance)
        except InputError as error:
            failures.append(str(error))
            logger.error("%s", error)
            continue
        result.add(provenance["counts"], provenance["reasons"])
        result.written.append(unit.output_path)
    if failures:
        more = f" (and {len(failures) - 1} more, see the log)" if len(failures) > 1 else ""
        others = ", the others are done" if total > len(failures) else ""
        failed = InputError(f"{len(failures)} of {total} tars failed{others}: {failures[0]}{more}")
        failed.result = result
        raise failed


def _is_foreign(path: Path) -> bool:
    return path.exists() and read_provenance(path) is None


def _add_kept(unit: TarUnit, result: StageResult) -> None:
    found = read_provenance(unit.output_path) or {}
    logger.info("%s: kept %s, which is complete", result.stage, unit.output_path)
    result.add(found.get("counts", {}), found.get("reasons"))
    result.kept.append(unit.output_path)
