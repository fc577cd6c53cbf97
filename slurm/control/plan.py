"""Work out which jobs to submit: the shards that are neither done nor in the queue, and what each waits for."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError, InputError
from pipeline.files.units import Unit
from pipeline.stages import BY_LABEL, ROW_GROUP, STAGES, TAR, Stage
from slurm.control.scheduler import QueuedTask
from slurm.control.target import Target

# A task more is a model loaded once more: 64 GPUs are a large share of a cluster, and leave each of them minutes of
# work at a million images (docs/slurm.md).
DEFAULT_MAX_SHARDS = 64
ALL = BY_LABEL.values()


@dataclass(eq=False)
class PlannedJob:
    """One sbatch call, and what it waits for: as a whole, or shard by shard where the stage allows that."""

    stage: Stage
    shards: list[int]
    shard_count: int
    after: tuple["Source", ...]


# What a shard waits for: a job that is planned here, or the id of one that is in the queue (JOB or JOB_TASK).
Source = PlannedJob | str


def count_shards(stage: Stage, num_units: int | None, array_size: int | None, active: list[QueuedTask]) -> int:
    """Return into how many shards a stage is cut; another number than that of the tasks in the queue is refused."""
    if not stage.is_array:
        return 1
    if array_size and num_units and stage.unit in (TAR, ROW_GROUP):
        array_size = min(array_size, num_units)
    counts = {task.shard_count for task in active}
    if counts:
        settled = max(counts)
        if len(counts) > 1 or (array_size and array_size != settled):
            raise ConfigError(
                f"stage {stage.label} has jobs in the queue that cut it into {settled} shards, not {array_size}: wait "
                "for them or scancel them, or leave out --array-size"
            )
        return settled
    return array_size or (min(num_units or 1, DEFAULT_MAX_SHARDS) if stage.unit == TAR else 1)


class Plan:
    """The jobs to submit in order, what is left alone and why, and what later stages have to wait for."""

    def __init__(
        self, target: Target, stages: Sequence[Stage], active: dict[int, list[QueuedTask]],
        array_size: int | None = None,
    ) -> None:  # fmt: skip
        """Plan some stages, behind what of the others is in the queue.

        `array_size` cuts a stage that is asked for alone, else those that work by tars or row groups. Raises
        StaleOutputError where outputs were made from other inputs or settings.
        """
        self.target, self.active = target, active
        self.jobs: list[PlannedJob] = []
        self.notes: list[str] = []
        # By stage and shard: what the stages behind it wait for; done shards are not among them.
        self.pending: dict[int, dict[int, Source]] = {
            stage.number: {task.shard: task.name for task in active.get(stage.number, [])} for stage in ALL
        }
        for stage in ALL:
            if stage in stages:
                is_cut = len(stages) == 1 or stage.unit in (TAR, ROW_GROUP)
                self._add(stage, array_size if is_cut else None)

    def _add(self, stage: Stage, array_size: int | None) -> None:
        try:
            units: list[Unit] | None = self.target.list_units(stage)
        except InputError as error:
            units = None
            if stage.unit != ROW_GROUP:
                self.notes.append(f"stage {stage.number}: {error}")
        # All stages that are cut as this one is count: shard 3 must be the same tars.
        alike = [other for other in STAGES.values() if other.unit == TAR] if stage.unit == TAR else [stage]
        tasks = [task for other in alike for task in self.active.get(other.number, [])]
        num_units = None if units is None else len(units)
        shard_count = count_shards(stage, num_units, array_size, tasks)
        waits = {shard: self._find_sources(stage, shard) for shard in range(shard_count)}
        done = set[int]()
        if units is not None and not all(waits.values()):
            is_done = self.target.find_done(stage, units, shard_count)
            # One whose input is still to be made is not done, whatever lies there.
            done = {shard for shard, sources in waits.items() if is_done[shard] and not sources}
        # Tasks are waited for one by one: others of their array may have failed, and be submitted anew.
        pending = self.pending[stage.number]
        num_kept = len(pending)
        todo = [shard for shard in range(shard_count) if shard not in done and shard not in pending]
        for job in _group(stage, shard_count, todo, waits):
            self.jobs.append(job)
            pending.update(dict.fromkeys(job.shards, job))
        if num_kept or done or not todo:
            counts = f"{len(done)} done, {num_kept} in the queue, {len(todo)} to submit"
            self.notes.append(f"stage {stage.label} {stage.name}: of {shard_count}: {counts}")

    def _find_sources(self, stage: Stage, shard: int) -> list[Source]:
        """Return what one shard waits for."""
        sources = [source for number in stage.after for source in self.pending[number].values()]
        if stage.shard_after is not None and shard in self.pending[stage.shard_after]:
            sources.append(self.pending[stage.shard_after][shard])
        return list(dict.fromkeys(sources))


def _group(stage: Stage, shard_count: int, todo: list[int], waits: dict[int, list[Source]]) -> list[PlannedJob]:
    """Return one job for all shards that wait for the same."""
    groups: dict[tuple[Source, ...], PlannedJob] = {}
    for shard in todo:
        after = tuple(waits[shard])
        if stage.shard_after is not None:
            # Task T of a job J in the queue is named J_T; what follows it shard by shard waits for J.
            after = tuple(source.partition("_")[0] if isinstance(source, str) else source for source in after)
        groups.setdefault(after, PlannedJob(stage, [], shard_count, after)).shards.append(shard)
    return list(groups.values())
