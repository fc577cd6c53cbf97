"""Units of a stage's work, whether each is complete, and the work of the stages that go tar by tar."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cli import Options, StageResult
from pipeline.config import Config
from pipeline.errors import ConfigError, InputError, StaleOutputError
from pipeline.files.identity import identify, identify_tar
from pipeline.files.listing import find_tars, is_parquet, list_intermediates
from pipeline.files.outputs import check_outside_datasets
from pipeline.files.tables import matches, read_provenance
from pipeline.ids import dataset_name, parse_dataset_id
from pipeline.log import logger
from pipeline.stages import Stage
from pipeline.workspace import refuse_folder

Provenance = dict[str, Any]


@dataclass(frozen=True)
class UnitState:
    """Whether a unit is complete; `note`: it was taken over from another program; `problem`: what makes it stale."""

    is_complete: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    note: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Unit:
    """One unit of a stage's work: a tar, a row group, or all of it. It is complete when all `outputs` are there.

    `describe(unit)` gives the provenance that the outputs must carry, `take_over(unit)` the state of an output
    that carries none and is kept all the same, None if rows are to be added to it. `check()`
    looks at what provenance cannot tell.
    """

    name: str
    outputs: tuple[Path, ...]
    describe: Callable[[Any], Provenance] | None = None
    take_over: Callable[[Any], UnitState | None] | None = None
    check: Callable[[], None] | None = None

    @property
    def marks(self) -> tuple[Path, ...]:
        """The outputs that carry the provenance: the first JSON file, without one all of them."""
        return tuple(path for path in self.outputs if path.suffix == ".json")[:1] or self.outputs


def find_state(unit: Unit) -> UnitState:
    """Return whether a unit is complete or stale; raise InputError where an input is missing or an output damaged."""
    there = [path for path in unit.outputs if path.exists()]
    try:
        if unit.check is not None:
            unit.check()
        recorded = {path: read_provenance(path) for path in unit.marks if unit.describe and path.exists()}
        if unit.take_over and None in recorded.values():
            return unit.take_over(unit) or UnitState()
        if unit.describe and recorded:
            wanted = unit.describe(unit)
            for path, found in recorded.items():
                matches(path, found, wanted)
    except StaleOutputError as error:
        return UnitState(problem=str(error))
    if len(there) == len(unit.outputs):
        first = next(iter(recorded.values()), None) or {}
        return UnitState(True, first.get("counts", {}), first.get("reasons", {}))
    return UnitState()


def find_complete(unit: Unit, overwrite: bool) -> UnitState | None:
    """Return the state of a complete unit that stays, else None; raise StaleOutputError where it may not stay.

    Raises OSError where a folder stands in the place of a parquet.
    """
    for path in filter(is_parquet, unit.outputs):
        refuse_folder(path)
    state = UnitState() if overwrite else find_state(unit)
    if state.problem:
        raise StaleOutputError(state.problem)
    return state if state.is_complete else None


def keep_complete(unit: Unit, result: StageResult, overwrite: bool) -> bool:
    """Return whether a unit is complete and stays, and add it to `result` then; raise StaleOutputError as above."""
    check_outside_datasets(unit.outputs[0])
    for path in filter(Path.exists, unit.marks):
        made_by = result.stage if is_parquet(path) else None
        with contextlib.suppress(InputError):  # damaged
            made_by = (read_provenance(path) or {}).get("stage")
        if made_by != result.stage and (made_by or (overwrite and not unit.take_over)):
            maker = made_by or "another program"
            raise ConfigError(f"{path}: {maker} wrote it, so it stays: set another path for the output")
    state = find_complete(unit, overwrite)
    if state is None:
        return False
    if state.note:
        logger.warning("kept %s: %s", unit.outputs[0], state.note)
    else:
        logger.info("%s: kept %s, which is complete", result.stage, ", ".join(map(str, unit.outputs)))
    result.add(state.counts, state.reasons)
    result.kept += unit.outputs
    return True


@dataclass(frozen=True, kw_only=True)
class TarUnit(Unit):
    """One tar and what a stage makes of it; `intermediate_path` is stage 1's output for the tar."""

    dataset_id: int
    tar_path: Path
    intermediate_path: Path

    @property
    def output_path(self) -> Path:
        return self.outputs[0]

    @property
    def note(self) -> Path:
        return self.intermediate_path.parent / "_inputs" / f"{self.tar_path.name}.json"

    def identify_tar(self) -> list[dict[str, Any]]:
        """Identify the tar by its content, unless stage 1 reads it later; one that is gone is not an input any more."""
        if not self.tar_path.is_file():
            return []
        return [identify_tar(self.tar_path, self.note, read=self.intermediate_path.exists())]

    def check_tar(self, provenance: Provenance) -> None:
        """Raise InputError if the tar is not the one that the intermediate of this provenance was made from."""
        recorded = {one.get("digest") for one in provenance.get("inputs", [])} - {None}
        if recorded and any(found["digest"] not in recorded for found in self.identify_tar()):
            raise InputError(
                f"{self.tar_path}: not the one that {self.intermediate_path.name} was made from: run stage 1 again"
            )


def list_tar_units(
    stage: Stage,
    config: Config,
    options: Options,
    describe: Callable[[TarUnit], Provenance],
    take_over: Callable[[TarUnit], UnitState | None] | None = None,
) -> list[TarUnit]:
    """Return this shard's units for the tars named on the command line, or else all that there are.

    For the stages behind the first these are also the intermediates whose tar is gone: what was made of them counts.
    Raises InputError where there is nothing, ConfigError where a path is not set.
    """
    needed = [name for name in (*stage.reads, stage.writes) if name != "raw_dir" or not options.tar_files]
    config.require_paths(*needed)
    intermediates_dir, place = config.path("intermediates_dir"), config.path(stage.writes)
    intermediates = list_intermediates(intermediates_dir) if place != intermediates_dir else {}
    tars = {parse_dataset_id(path): path for path in options.tar_files}
    if len(tars) < len(set(options.tar_files)):
        raise ConfigError("--tar-file: two have one name, and so the same output: give one of them")
    if not tars:
        tars = find_tars(config.path("raw_dir"), intermediates)
    units = [
        TarUnit(
            tar_path.name, (place / stage.outputs[0].format(dataset_name(dataset_id)),), describe, take_over,
            dataset_id=dataset_id, tar_path=tar_path,
            intermediate_path=intermediates.get(dataset_id, intermediates_dir / f"{dataset_name(dataset_id)}.parquet"),
        )
        for dataset_id, tar_path in sorted(tars.items())
    ]  # fmt: skip
    return options.shard.take(units)


def refuse_missing(config: Config, outputs: Iterable[Path], what: str) -> None:
    """Raise InputError naming the intermediates for which there is no file NNNN_`what`.parquet among `outputs`.

    Warns of files that were made from an earlier intermediate. Without a folder of intermediates there is nothing to
    compare with.
    """
    if config.paths.intermediates_dir is None:
        return
    intermediates = list_intermediates(config.path("intermediates_dir"))
    made = {path.stem: path for path in outputs}
    missing = [path for path in intermediates.values() if f"{path.stem}_{what}" not in made]
    if missing:
        names = ", ".join(path.stem for path in missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise InputError(
            f"{len(missing)} of {len(intermediates)} tars of {missing[0].parent} have no {what} ({names}): run the "
            "stage that makes them, or move these files away to go on without"
        )
    for source in intermediates.values():
        output = made[f"{source.stem}_{what}"]
        recorded = (read_provenance(output) or {}).get("inputs", [])
        if any(one.get("name") == source.name for one in recorded) and identify(source) not in recorded:
            logger.warning("%s: made from an earlier %s: run the stage that makes it again", output, source.name)


def do_tars(
    units: list[TarUnit],
    result: StageResult,
    overwrite: bool,
    make: Callable[[TarUnit, Provenance], Provenance],
) -> None:
    """Make the outputs that are not there yet, tar by tar, and add every tar's counts to `result`.

    `make` writes an output and its rejects, and returns their provenance: the one given, with `counts` and `reasons`.
    Raises StaleOutputError before anything is made, InputError in the end where tars failed.
    """
    planned: list[tuple[TarUnit, Provenance]] = []
    failures: list[str] = []
    for unit in units:
        try:
            if not keep_complete(unit, result, overwrite):
                assert unit.describe is not None
                planned.append((unit, unit.describe(unit)))
        except InputError as error:
            failures.append(str(error))
            logger.error("%s", error)
    for number, (unit, provenance) in enumerate(planned, start=1):
        logger.info("%s: %s (%d of %d)", result.stage, unit.tar_path.name, number, len(planned))
        try:
            made = make(unit, provenance)
        except InputError as error:
            failures.append(str(error))
            logger.error("%s", error)
            continue
        result.add(made["counts"], made["reasons"])
        result.written.append(unit.output_path)
    if failures:
        more = f" (and {len(failures) - 1} more, see the log)" if len(failures) > 1 else ""
        others = ", the others are done" if len(units) > len(failures) else ""
        raise InputError(f"{len(failures)} of {len(units)} tars failed{others}: {failures[0]}{more}", result)
