"""Plan which shards to submit, neither done nor in the queue, and what each waits for; submit them by sbatch."""

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import PROJECT_ROOT
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.files.units import Unit
from pipeline.inference.model_files import locate_backbone
from pipeline.stages import BY_LABEL, ROW_GROUP, STAGES, TAR, WHOLE, WORKER, Stage
from pipeline.workspace import locked
from slurm.control import scheduler
from slurm.control.scheduler import QueuedTask
from slurm.control.target import Target

# A variable that is set to a secret (--export=ALL,WANDB_API_KEY=...), and a URL with a password.
SECRET = re.compile(
    r"(?:^|[=,])[A-Z0-9_]*(?:TOKEN|KEY|SECRET|PASS)[A-Z0-9_]*="
    r"|://[^/\s@]*:[^/\s]+@|://\S*[?&](?i:\w*(?:pass|token|key|secret)\w*)="
)
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
    """The jobs to submit in order, and what later stages have to wait for."""

    def __init__(
        self, target: Target, stages: Sequence[Stage], active: dict[int, list[QueuedTask]],
        array_size: int | None = None,
    ) -> None:  # fmt: skip
        """Plan some stages, behind what of the others is in the queue, and say on stderr what is left alone, and why.

        `array_size` cuts a stage that is asked for alone, else those that work by tars or row groups. Raises
        StaleOutputError where outputs were made from other inputs or settings.
        """
        self.target, self.active = target, active
        self.jobs: list[PlannedJob] = []
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
                print(f"stage {stage.number}: {error}", file=sys.stderr)
        # All stages that are cut as this one is count: shard 3 must be the same tars.
        alike = [other for other in STAGES.values() if other.unit == TAR] if stage.unit == TAR else [stage]
        tasks = [task for other in alike for task in self.active.get(other.number, [])]
        shard_count = count_shards(stage, None if units is None else len(units), array_size, tasks)
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
            print(f"stage {stage.label} {stage.name}: of {shard_count}: {counts}", file=sys.stderr)

    def _find_sources(self, stage: Stage, shard: int) -> list[Source]:
        sources = [source for number in stage.after for source in self.pending[number].values()]
        if stage.shard_after is not None and shard in self.pending[stage.shard_after]:
            sources.append(self.pending[stage.shard_after][shard])
        return list(dict.fromkeys(sources))


def _group(stage: Stage, shard_count: int, todo: list[int], waits: dict[int, list[Source]]) -> list[PlannedJob]:
    groups: dict[tuple[Source, ...], PlannedJob] = {}
    for shard in todo:
        after = tuple(waits[shard])
        if stage.shard_after is not None:
            # Task T of a job J in the queue is named J_T; what follows it shard by shard waits for J.
            after = tuple(source.partition("_")[0] if isinstance(source, str) else source for source in after)
        groups.setdefault(after, PlannedJob(stage, [], shard_count, after)).shards.append(shard)
    return list(groups.values())


@dataclass(frozen=True)
class Request:
    """The stages of a target to submit, the command line (see submit.py), and options to pass on."""

    target: Target
    stages: list[Stage]
    arguments: argparse.Namespace
    sbatch_options: list[str]
    stage_options: list[str]


def submit(request: Request) -> None:
    """Submit what is neither done nor in the queue, or print the commands.

    Raises PipelineError where SLURM is missing or refuses a job; the jobs before it stay submitted.
    """
    if request.arguments.dry_run:
        carry_out(plan_now(request), request)
        return
    if scheduler.list_queued() is None:
        raise PipelineError("squeue does not answer here: submit on a login node of the cluster, or give --dry-run")
    folder = request.target.log_dir / "slurm"  # without it a job dies without a log
    # Two submissions at a time would submit the same shards.
    with locked(folder, "is submitting: wait for it, then run this again", folder / ".lock"):
        plan = plan_now(request)
        check_weights(plan, request.target)
        carry_out(plan, request)
    if not plan.jobs:
        print("nothing to submit")


def plan_now(request: Request) -> Plan:
    """Plan with what is in the queue now; raise ConfigError where an option holds a secret."""
    active = find_active(request.target)
    own = [task for stage in request.stages for task in active.get(stage.number, [])]
    for task in (task for task in own if task.settings not in ("", request.target.settings)):
        raise ConfigError(
            f"job {task.name} in the queue makes {task.jobs.partition('-')[0]}'s output with other --set options: wait "
            "for it or scancel it, then run this again"
        )
    plan = Plan(request.target, request.stages, active, request.arguments.array_size)
    environment = [option for job in plan.jobs for option in environment_options(job.stage)]
    check_secrets([*environment, *request.sbatch_options, *request.stage_options])
    return plan


def find_active(target: Target) -> dict[int, list[QueuedTask]]:
    """Return, by stage, the shards that earlier submissions have in the queue; none where there is no SLURM."""
    queued = scheduler.list_queued() or []
    active: dict[int, list[QueuedTask]] = {}
    for stage in ALL if queued else ():
        with contextlib.suppress(ConfigError):  # the configuration does not say where that stage writes
            active[stage.number] = [task for task in queued if task.jobs == target.name_jobs(stage)]
    return active


def check_weights(plan: Plan, target: Target) -> None:
    """Raise InputError where a job needs the backbone and it is neither a folder nor in the hub's cache."""
    config, needs_it = target.config, any(job.stage.number in (2, 7) for job in plan.jobs)
    if config is not None and needs_it and locate_backbone(config, download=False) is None:
        raise InputError(
            f"{config.embedding_model.model_name}: the backbone is not on this machine, and jobs run offline: run "
            f"slurm/prepare.sh --config {config.file_path}"
        )


def check_secrets(options: Sequence[str]) -> None:
    """Raise ConfigError where a token or password would get into an sbatch line, whose text the accounting keeps."""
    tokens = [os.environ[name] for name in scheduler.SECRETS if os.environ.get(name)]
    for option in options:
        if SECRET.search(option) or any(token in option for token in tokens):
            raise ConfigError(
                "a token or password on an sbatch line would be kept by the accounting: give a hub's token to "
                "prepare.sh alone, export others before you submit, and keep a database's in its own file (~/.pgpass)"
            )


def name_job_file(stage: Stage) -> str:
    return f"{'publish_model/slurm' if stage.unit == ROW_GROUP else 'slurm'}/{stage.name}.sbatch"


def build_command(job: PlannedJob, request: Request, ids: dict[PlannedJob, str]) -> list[str]:
    """Return the sbatch command of a job; `ids` names the jobs that it waits for."""
    stage, target, arguments = job.stage, request.target, request.arguments
    command = ["sbatch", "--parsable", *([f"--account={arguments.account}"] if arguments.account else [])]
    if stage.is_array:
        most = f"%{arguments.max_concurrent}" if arguments.max_concurrent else ""
        shards = "0-0" if job.shards == [0] else scheduler.format_shards(job.shards)
        command.append(f"--array={shards}{most}")
    if dependency := format_dependency(job, ids):
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    log_dir = str(target.log_dir).replace("%", "%%")  # percent signs of a path are no patterns
    return [
        *command, *environment_options(stage), *request.sbatch_options,
        f"--job-name={target.name_jobs(stage)}-{target.settings}-{job.shard_count}",
        f"--output={log_dir}/slurm/%x-{'%A_%a' if stage.is_array else '%j'}.log",
        str(PROJECT_ROOT / name_job_file(stage)),
        *(["--shards", str(job.shard_count)] if stage.unit not in (WHOLE, WORKER) else []),
        *target.list_arguments(stage), *request.stage_options,
    ]  # fmt: skip


def format_dependency(job: PlannedJob, ids: dict[PlannedJob, str]) -> str:
    """Write what a job waits for as sbatch reads it, empty for nothing."""
    names = [ids[source] if isinstance(source, PlannedJob) else source for source in job.after]
    # Task by task: one damaged tar then holds up its own shard, not the night's work of all others.
    kind = "afterok" if job.stage.shard_after is None else "aftercorr"
    return ":".join([kind, *names]) if names else ""


def environment_options(stage: Stage) -> list[str]:
    """Return the sbatch options of $SBATCH_OPTIONS and, for one stage, of $SBATCH_OPTIONS_N."""
    names = ("SBATCH_OPTIONS", f"SBATCH_OPTIONS_{stage.label}")
    return [option for name in names for option in shlex.split(os.environ.get(name, ""))]


def carry_out(plan: Plan, request: Request) -> None:
    """Submit a plan's jobs and print a table of them, or print the commands; a job is then called JOB and its stage."""
    line = "{:<5}  {:<32}  {:<9}  {:<14}  {}".format
    if plan.jobs and not request.arguments.dry_run:
        print(line("stage", "name", "job", "shards", "waits for"))
    ids: dict[PlannedJob, str] = {}
    for job in plan.jobs:
        command, stage = build_command(job, request, ids), job.stage
        if request.arguments.dry_run:
            print(shlex.join(command), flush=True)
            ids[job] = f"JOB{stage.label}"
            continue
        ids[job] = scheduler.read_job_id(scheduler.tell(command))
        shards = f"{scheduler.format_shards(job.shards)} of {job.shard_count}" if stage.is_array else "-"
        print(line(stage.number or "-", stage.name, ids[job], shards, format_dependency(job, ids) or "-"), flush=True)
