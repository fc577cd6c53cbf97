"""Say which units a stage has, and which shards of them are done: as the stage itself judges it."""

import importlib

from pipeline.config import Config
from pipeline.errors import InputError, StaleOutputError
from pipeline.files.units import COMPLETE, STALE, UNFINISHED, Unit, UnitState, find_state
from pipeline.stages import ANCHOR, Stage


def list_units(stage: Stage, config: Config) -> list[Unit]:
    """Return a stage's units in the order in which shards take them.

    Raises InputError where the input that tells their number is missing.
    """
    units: list[Unit] = importlib.import_module(stage.module).list_units(config)
    return units


def look_at(unit: Unit) -> UnitState:
    """Return a unit's state; one whose inputs or outputs cannot be read is for its job to report."""
    try:
        return find_state(unit)
    except InputError as error:
        return UnitState(UNFINISHED, problem=str(error))


def take_shard(stage: Stage, states: list[UnitState], shard: int, shard_count: int) -> list[UnitState]:
    """Return the states of a shard's units; all shards of stage 5 make one output."""
    return states if stage.unit == ANCHOR else states[shard::shard_count]


def is_done(states: list[UnitState], max_reject_fraction: float) -> bool:
    """Whether a shard is done: all its units are complete, and not too many of their rows were rejected.

    With too many the stage exits with 1 although its outputs are there, and nothing may be made from them.
    """
    rows, rejected = (sum(state.counts.get(key, 0) for state in states) for key in ("in", "rejected"))
    return all(state.status == COMPLETE for state in states) and rejected <= max_reject_fraction * rows


def find_done(stage: Stage, units: list[Unit], shard_count: int, max_reject_fraction: float) -> list[bool]:
    """Return for each shard whether it is done.

    Raises StaleOutputError where an output was made from other inputs or settings: the job would refuse it too, but at
    night.
    """
    states = [look_at(unit) for unit in units]
    for state in states:
        if state.status == STALE:
            raise StaleOutputError(state.problem)
    shards = (take_shard(stage, states, shard, shard_count) for shard in range(shard_count))
    return [is_done(own, max_reject_fraction) for own in shards]
