"""Work out which jobs to submit: the shards that are neither done nor under way, and what each waits for."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.config import Config
from pipeline.errors import ConfigError, InputError
from pipeline.files.units import Unit
from pipeline.stages import ANCHOR, NO_NEW_DATA, ROW_GROUP, STAGES, TAR, TUNE, WORKER, Stage, has_new_data
from slurm.control.work import find_done, list_units

# A task more is a model loaded once more: 64 GPUs are a large share of a cluster, and leave each of them minutes of
# work at a million images (docs/slurm.md).
DEFAULT_MAX_SHARDS = 64


@dataclass(frozen=True)
class ActiveTask:
    """One shard of a stage that an earlier submission has in the queue."""

    job_id: str
    shard: int
    shard_count: int
    is_waiting: bool
    is_array: bool = True


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


@dataclass(frozen=True)
class Cut:
    """How the work is cut: the sizes asked for, and what the cluster allows."""

    array_size: int | None = None
    anchor_shards: int | None = None
    max_array_size: int = 1001


@dataclass
class Plan:
    """The jobs to submit in order, the waiting tasks they take the place of, and what is left alone and why."""

    jobs: list[PlannedJob] = field(default_factory=list)
    replaced: dict[str, list[int]] = field(default_factory=dict)  # shards by job id
    notes: list[str] = field(default_factory=list)


def count_shards(stage: Stage, num_units: int | None, cut: Cut, active: list[ActiveTask]) -> int:
    """Return into how many shards a stage is cut; shards in the queue have settled that.

    Raises ConfigError where another number is asked for while they are.
    """
    if not stage.is_array:
        return 1
    asked = cut.anchor_shards if stage.unit == ANCHOR else cut.array_size
    most = num_units if stage.unit in (TAR, ROW_GROUP) and num_units else cut.max_array_size
    most = min(most, cut.max_array_size)
    counts = {task.shard_count for task in active}
    if counts:
        settled = max(counts)
        wanted = asked and min(asked, most)
        if len(counts) > 1 or (wanted and wanted != settled):
            raise ConfigError(
                f"stage {stage.label} has jobs in the queue that cut it into {settled} shards, not {wanted}: wait for "
                "them or scancel them, or leave out --array-size"
            )
        return settled
    if asked is None:
        asked = min(num_units or 1, DEFAULT_MAX_SHARDS) if stage.unit == TAR else 1
    return min(asked, most)


class Planner:
    """Goes through the stages in order and remembers what the later ones have to wait for."""

    def __init__(self, config: Config, cut: Cut, active: dict[int, list[ActiveTask]]) -> None:
        self.config, self.cut, self.active = config, cut, active
        self.plan = Plan()
        # By stage and shard: what the stages behind it wait for; done shards are not among them.
        self._pending: dict[int, dict[int, Source]] = {}

    def look_at(self, stage: Stage) -> None:
        """Note what of a stage that is not asked for is under way: the others wait for it all the same."""
        self._pending[stage.number] = self._name_active(self.active.get(stage.number, []))

    def add(self, stage: Stage, only: Iterable[int] | None = None) -> None:
        """Plan the jobs of a stage, `only` for some shards where they are given.

        Raises StaleOutputError where outputs were made from other inputs or settings.
        """
        active = self.active.get(stage.number, [])
        units = self._list_units(stage)
        num_units = None if units is None else len(units)
        shard_count = count_shards(stage, num_units, self.cut, self._like(stage))
        waits = {shard: self._sources(stage, shard) for shard in range(shard_count)}
        done = self._find_done(stage, shard_count, waits, units)
        replaced = [task for task in active if task.is_waiting and self._waits_for_new(waits[task.shard])]
        for task in replaced:  # what it waits for is going to fail, or has: it would be cancelled with it
            self.plan.replaced.setdefault(task.job_id, []).append(task.shard)
        kept = [task for task in active if task not in replaced]
        pending = self._name_active(kept)
        wanted = range(shard_count) if only is None else sorted(set(only))
        if any(shard >= shard_count for shard in wanted):
            raise ConfigError(f"stage {stage.label} has shards 0 to {shard_count - 1}: correct --shards")
        todo = [shard for shard in wanted if not done[shard] and shard not in pending]
        for job in self._group(stage, shard_count, todo, waits):
            self.plan.jobs.append(job)
            pending.update(dict.fromkeys(job.shards, job))
        self._pending[stage.number] = pending
        self._note(stage, shard_count, todo, len(kept), sum(done))

    def _like(self, stage: Stage) -> list[ActiveTask]:
        """Return the tasks in the queue of all stages that are cut as this one is: shard 3 must be the same tars."""
        alike = [other for other in STAGES.values() if other.unit == TAR] if stage.unit == TAR else [stage]
        return [task for other in alike for task in self.active.get(other.number, [])]

    def _list_units(self, stage: Stage) -> list[Unit] | None:
        """Return the stage's units, None where they cannot be told yet."""
        try:
            return list_units(stage, self.config)
        except InputError as error:
            if stage.unit != ROW_GROUP:
                self.plan.notes.append(f"stage {stage.number}: {error}")
            return None

    def _find_done(
        self, stage: Stage, shard_count: int, waits: dict[int, list[Source]], units: list[Unit] | None
    ) -> list[bool]:
        """Return which shards are done; one whose input is still to be made is not, whatever lies there."""
        # A study is done when it has its trials, which the workers count.
        if units is None or stage.unit == WORKER or all(waits.values()):
            return [False] * shard_count
        whole = find_done(stage, units, shard_count, self.config.data.max_reject_fraction)
        return [whole[shard] and not waits[shard] for shard in range(shard_count)]

    def _sources(self, stage: Stage, shard: int) -> list[Source]:
        """Return what one shard waits for."""
        sources: list[Source] = []
        for number in stage.after:
            sources += self._pending.get(number, {}).values()
        if stage.shard_after is not None:
            pending = self._pending.get(stage.shard_after, {})
            sources += [pending[shard]] if shard in pending else []
        return list(dict.fromkeys(sources))

    @staticmethod
    def _waits_for_new(sources: list[Source]) -> bool:
        return any(isinstance(source, PlannedJob) for source in sources)

    @staticmethod
    def _name_active(tasks: list[ActiveTask]) -> dict[int, Source]:
        """Name the tasks one by one: others of their array may have failed, and be submitted anew."""
        return {task.shard: f"{task.job_id}_{task.shard}" if task.is_array else task.job_id for task in tasks}

    def _group(
        self, stage: Stage, shard_count: int, todo: list[int], waits: dict[int, list[Source]]
    ) -> list[PlannedJob]:
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

    def _note(self, stage: Stage, shard_count: int, todo: list[int], num_active: int, num_done: int) -> None:
        if todo and not num_active and not num_done:
            return
        parts = [f"{num_done} done", f"{num_active} in the queue", f"{len(todo)} to submit"]
        self.plan.notes.append(f"stage {stage.label} {stage.name}: of {shard_count}: {', '.join(parts)}")


def make_plan(
    config: Config, first: int, last: int, cut: Cut, active: dict[int, list[ActiveTask]],
    only: Iterable[int] | None = None,
) -> Plan:  # fmt: skip
    """Plan the stages from `first` to `last`, stage 8 only where new data are set; TUNE's number plans the search.

    Raises ConfigError before anything is planned where a path is not set.
    """
    planner = Planner(config, cut, active)
    for stage in STAGES.values():
        if stage.number == 8 and first <= 8 <= last and not has_new_data(config):
            planner.plan.notes.append(NO_NEW_DATA)
        elif first <= stage.number <= last:
            planner.add(stage, only)
        else:
            planner.look_at(stage)
    if first == last == TUNE.number:
        planner.add(TUNE, only)
    return planner.plan
