"""A target of submissions: a pipeline by its configuration, or one dataset of stage 8 without any."""

import importlib
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import InputError, StaleOutputError
from pipeline.files.identity import hash_json
from pipeline.files.units import Unit, UnitState, find_state
from pipeline.stages import ANCHOR, ROW_GROUP, WORKER, Stage
from publish_model.new_data.embed_options import EmbedOptions


@dataclass(frozen=True)
class Target:
    """A pipeline (`config`) or a dataset (`embedding`), and the folder of its logs."""

    log_dir: Path
    config: Config | None = None
    overrides: tuple[str, ...] = ()
    embedding: EmbedOptions | None = None

    def list_arguments(self, stage: Stage) -> list[str]:
        if stage.unit == ROW_GROUP:
            return spell_options(self.embedding or importlib.import_module(stage.module).read_options(self.config))
        return self.list_settings()

    def list_settings(self) -> list[str]:
        """Return the configuration and its overrides as they stand on a command line."""
        assert self.config is not None
        overrides = [part for override in self.overrides for part in ("--set", override)]
        return ["--config", str(self.config.file_path), *overrides]

    @property
    def settings(self) -> str:  # a queued job keeps the overrides that it was submitted with
        return hash_json(self.overrides)[:8]

    def name_jobs(self, stage: Stage) -> str:
        """Return the name of the stage's jobs, without `-`, the hash of the overrides, `-` and the number of shards.

        Where the stage writes tells this target's jobs from another's that shares its log folder. Raises ConfigError if
        that is not set.
        """
        place = self.log_dir.parent if self.config is None else self.config.path(stage.writes)
        return f"{stage.name}-{hash_json(str(place))[:8]}"

    def list_units(self, stage: Stage) -> list[Unit]:
        """Return a stage's units in the order in which shards take them; InputError if their input is missing."""
        module = importlib.import_module(stage.module)
        units: list[Unit] = module.list_row_groups(self.embedding) if self.embedding else module.list_units(self.config)
        return units

    def is_shard_done(self, states: list[UnitState]) -> bool:
        """Whether a shard is done: all its units are complete, and not too many of their rows were rejected.

        With too many the stage exits with 1 although its outputs are there, and nothing may be made from them.
        """
        rows, rejected = (sum(state.counts.get(key, 0) for state in states) for key in ("in", "rejected"))
        allowed = 1.0 if self.config is None else self.config.data.max_reject_fraction
        return all(state.is_complete for state in states) and rejected <= allowed * rows

    def find_done(self, stage: Stage, units: list[Unit], shard_count: int) -> list[bool]:
        """Return for each shard whether it is done.

        A study is done when it has its trials, and a part that --limit cuts when it has its rows: the jobs see to that.
        Raises StaleOutputError where an output was made from other inputs or settings: the job would refuse it too, but
        at night.
        """
        states = [look_at(unit) for unit in units]
        if problem := next((state.problem for state in states if state.problem), ""):
            raise StaleOutputError(problem)
        if stage.unit == WORKER or (self.embedding is not None and self.embedding.limit):
            return [False] * shard_count
        return [self.is_shard_done(take_shard(stage, states, shard, shard_count)) for shard in range(shard_count)]


def look_at(unit: Unit) -> UnitState:
    """Return a unit's state; one whose inputs or outputs cannot be read is for its job to report."""
    try:
        return find_state(unit)
    except InputError:
        return UnitState()


def take_shard(stage: Stage, states: list[UnitState], shard: int, shard_count: int) -> list[UnitState]:
    """Return the states of a shard's units; all shards of stage 5 make one output."""
    return states if stage.unit == ANCHOR else states[shard::shard_count]


def spell_options(options: EmbedOptions) -> list[str]:
    words = ["--input", str(options.input), "--output", str(options.output), "--model-id", options.model_id]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in ("input", "output", "model_id") or value == field.default:
            continue
        words.append("--no-filter-valid" if field.name == "filter_valid" else f"--{field.name.replace('_', '-')}")
        if not isinstance(value, bool):
            words.append(",".join(value) if isinstance(value, tuple) else str(value))
    return words
