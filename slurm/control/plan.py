"""Work out which jobs to submit: the shards that are neither done nor in the queue, and what each waits for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.errors import ConfigError, InputError
from pipeline.files.units import Unit
from pipeline.stages import ROW_GROUP, STAGES, TAR, TUNE, Stage
from slurm.control.target import Target

# A task more is a model loaded once more: 64 GPUs are a large share of a cluster, and leave each of them minutes of
# work at a million images (docs/slurm.md).
DEFAULT_MAX_SHARDS = 64


@dataclass(frozen=True)
class ActiveTask:
    """One shard of a stage that an earlier submission has in the queue; `name` is JOB, or JOB_TASK of an array."""

    name: str
    shard: int
    shard_count: int
    is_waiting: bool


@dataclass(eq=False)
class PlannedJob:
    """One sbatch call. `whole_after` must end well as a whole, `shards_after` shard by shard."""

    stage: Stage
    shards: list[int]
    shard_count: int
    whole_after: list["Source"] = field(default_factory=list)
    shards_after: "Source | None" = None


# What a shard waits for: a job that is planned here, or the id of one that is in the queue (JOB or JOB_TASK).
Source = PlannedJob | str


@dataclass
class Plan:
    """The jobs to submit in order, the waiting tasks they take the place of, and what is left alone and why."""

    jobs: list[PlannedJob] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def count_shards(
    stage: Stage, num_units: int | None, array_size: int | None, max_array_size: int, active: list[ActiveTask]
) -> int:
    """Return into how many shards a stage is cut; another number than that of the tasks in the queue is refused."""
    if not stage.is_array:
        return 1
    most = min(num_units or max_array_size, max_array_size) if stage.unit in (TAR, ROW_GROUP) else max_array_size
    counts = {task.shard_count for task in active}
    if counts:
        settled = max(counts)
        wanted = array_size and min(array_size, most)
        if len(counts) > 1 or (wanted and wanted != settled):
            raise ConfigError(
                f"stage {stage.label} has jobs in the queue that cut it into {settled} shards, not {wanted}: wait for "
                "them or scancel them, or leave out --array-size"
            )
        return settled
    usual = min(num_units or 1, DEFAULT_MAX_SHARDS) if stage.unit == TAR else 1
    return min(array_size or usual, most)


class Planner:
    """Goes through the stages in order and remembers what the later ones have to wait for."""

    def __init__(self, target: Target, active: dict[int, list[ActiveTask]], max_array_size: int) -> None:
        self.target, self.active, self.max_array_size = target, active, max_array_size
        self.plan = Plan()
        # By stage and shard: what the stages behind it wait for; done shards are not among them.
        self._pending: dict[int, dict[int, Source]] = {}

    def look_at(self, stage: Stage) -> None:
        """Note which tasks of a stage that is not asked for are in the queue: the others wait for them all the same."""
        self._pending[stage.number] = {task.shard: task.name for task in self.active.get(stage.number, [])}

    def add(self, stage: Stage, array_size: int | None, only: Iterable[int] | None = None) -> None:
        """Plan the jobs of a stage, `only` for some shards where they are given.

        Raises StaleOutputError where outputs were made from other inputs or settings.
        """
        active = self.active.get(stage.number, [])
        try:
            units: list[Unit] | None = self.target.list_units(stage)
        except InputError as error:
            units = None
            if stage.unit != ROW_GROUP:
                self.plan.notes.append(f"stage {stage.number}: {error}")
        # All stages that are cut as this one is count: shard 3 must be the same tars.
        alike = [other for other in STAGES.values() if other.unit == TAR] if stage.unit == TAR else [stage]
        tasks = [task for other in alike for task in self.active.get(other.number, [])]
        num_units = None if units is None else len(units)
        shard_count = count_shards(stage, num_units, array_size, self.max_array_size, tasks)
        waits = {shard: self._find_sources(stage, shard) for shard in range(shard_count)}
        done = set[int]()
        if units is not None and not all(waits.values()):
            is_done = self.target.find_done(stage, units, shard_count)
            # One whose input is still to be made is not done, whatever lies there.
            done = {shard for shard, sources in waits.items() if is_done[shard] and not sources}
        # What these wait for is going to fail, or has: they would be cancelled with it.
        new = {shard for shard, sources in waits.items() if any(isinstance(one, PlannedJob) for one in sources)}
        replaced = [task for task in active if task.is_waiting and task.shard in new]
        self.plan.replaced += [task.name for task in replaced]
        # Tasks are waited for one by one: others of their array may have failed, and be submitted anew.
        pending: dict[int, Source] = {task.shard: task.name for task in active if task not in replaced}
        num_kept = len(pending)
        wanted = range(shard_count) if only is None else sorted(set(only))
        if any(shard >= shard_count for shard in wanted):
            raise ConfigError(f"stage {stage.label} has shards 0 to {shard_count - 1}: correct --shards")
        todo = [shard for shard in wanted if shard not in done and shard not in pending]
        for job in _group(stage, shard_count, todo, waits):
            self.plan.jobs.append(job)
            pending.update(dict.fromkeys(job.shards, job))
        self._pending[stage.number] = pending
        if num_kept or done or not todo:
            counts = f"{len(done)} done, {num_kept} in the queue, {len(todo)} to submit"
            self.plan.notes.append(f"stage {stage.label} {stage.name}: of {shard_count}: {counts}")

    def _find_sources(self, stage: Stage, shard: int) -> list[Source]:
        """Return what one shard waits for."""
        sources = [source for number in stage.after for source in self._pending.get(number, {}).values()]
        if stage.shard_after is not None and shard in self._pending.get(stage.shard_after, {}):
            sources.append(self._pending[stage.shard_after][shard])
        return list(dict.fromkeys(sources))


def _group(stage: Stage, shard_count: int, todo: list[int], waits: dict[int, list[Source]]) -> list[PlannedJob]:
    """Return one job for all shards that wait for the same."""
    groups: dict[Source | None, PlannedJob] = {}
    for shard in todo:
        if stage.shard_after is None:
            group = groups.setdefault(None, PlannedJob(stage, [], shard_count, whole_after=waits[shard]))
        else:
            source = waits[shard][0] if waits[shard] else None
            # Task T of a job J in the queue is named J_T; what follows it shard by shard waits for J.
            source = source.partition("_")[0] if isinstance(source, str) else source
            group = groups.setdefault(source, PlannedJob(stage, [], shard_count, shards_after=source))
        group.shards.append(shard)
    return list(groups.values())


def make_plan(
    target: Target,
    stages: Sequence[Stage],
    active: dict[int, list[ActiveTask]],
    only: Iterable[int] | None = None,
    array_size: int | None = None,
    max_array_size: int = 1001,
) -> Plan:
    """Plan some stages, behind what of the others is in the queue.

    `array_size` cuts a stage that is asked for alone, else those that work by tars or row groups.
    """
    planner = Planner(target, active, max_array_size)
    for stage in (*STAGES.values(), TUNE):
        if stage in stages:
            is_cut = len(stages) == 1 or stage.unit in (TAR, ROW_GROUP)
            planner.add(stage, array_size if is_cut else None, only)
        else:
            planner.look_at(stage)
    return planner.plan
