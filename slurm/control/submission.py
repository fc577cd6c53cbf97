"""Turn a plan into sbatch commands, submit them and keep the records."""

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config import PROJECT_ROOT
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.files.workspace import write_json
from pipeline.inference.model_files import locate_backbone
from pipeline.stages import ROW_GROUP, STAGES, TUNE, Stage
from slurm.control import records, scheduler
from slurm.control.plan import ActiveTask, Plan, PlannedJob, make_plan
from slurm.control.records import Record
from slurm.control.target import Target

# A variable that is set to a secret (--export=ALL,WANDB_API_KEY=...), and a URL with a password.
SECRET = re.compile(
    r"(?:^|[=,])[A-Z0-9_]*(?:TOKEN|KEY|SECRET|PASS)[A-Z0-9_]*="
    r"|://[^/\s@]*:[^/\s]+@|://\S*[?&](?i:\w*(?:pass|token|key|secret)\w*)="
)


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

    Raises PipelineError where SLURM is missing or refuses a job; the jobs before it stay submitted and are recorded.
    """
    if request.arguments.dry_run:
        carry_out(plan_now(request), request)
        return
    if scheduler.list_queued() is None:
        raise PipelineError("squeue does not answer here: submit on a login node of the cluster, or give --dry-run")
    with records.holding(request.target.log_dir):
        plan = plan_now(request)
        check_weights(plan, request.target)
        submitted = carry_out(plan, request)
    print(records.format_table(submitted) if submitted else "nothing to submit")


def plan_now(request: Request) -> Plan:
    """Plan with what is in the queue now, and say on stderr what is left alone, and why."""
    arguments = request.arguments
    plan = make_plan(request.target, request.stages, find_active(request.target), arguments.array_size)
    for note in plan.notes:
        print(note, file=sys.stderr)
    environment = [option for job in plan.jobs for option in environment_options(job.stage)]
    check_secrets([*environment, *request.sbatch_options, *request.stage_options])
    return plan


def find_active(target: Target) -> dict[int, list[ActiveTask]]:
    """Return, by stage, the shards that earlier submissions have in the queue; none where there is no SLURM."""
    queued = scheduler.list_queued() or {}
    active: dict[int, list[ActiveTask]] = {}
    for record in records.read_records(target.log_dir) if queued else []:
        for shard in record.list_shards() if is_of_target(record, target) else []:
            job, task = record.job_id, shard if record.shards else None
            if (job, task) in queued:
                name = job if task is None else f"{job}_{task}"
                active.setdefault(record.stage, []).append(ActiveTask(name, shard, record.shard_count))
    return active


def is_of_target(record: Record, target: Target) -> bool:
    """Whether a job is the target's, and not another's that shares its log folder."""
    try:
        return record.output == target.find_place(STAGES.get(record.stage, TUNE))
    except ConfigError:  # the configuration does not say any more where that stage writes
        return False


def check_weights(plan: Plan, target: Target) -> None:
    """Raise InputError where a job needs the backbone and it is neither a folder nor in the hub's cache."""
    config = target.config
    if config is None or not any(job.stage.number in (2, 7) for job in plan.jobs):
        return
    if locate_backbone(config, download=False) is None:
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
    """Return a stage's job file, from the project's root."""
    folder = "publish_model/slurm" if stage.unit == ROW_GROUP else "slurm"
    return f"{folder}/{stage.name}.sbatch"


def build_command(job: PlannedJob, request: Request, ids: dict[PlannedJob, str]) -> list[str]:
    """Return the sbatch command of a job; `ids` names the jobs that it waits for."""
    stage, target = job.stage, request.target
    command = ["sbatch", "--parsable"]
    if request.arguments.account:
        command.append(f"--account={request.arguments.account}")
    if stage.is_array:
        most = f"%{request.arguments.max_concurrent}" if request.arguments.max_concurrent else ""
        shards = "0-0" if job.shards == [0] else scheduler.format_shards(job.shards)
        command.append(f"--array={shards}{most}")
    log_dir = Path(str(target.log_dir).replace("%", "%%"))  # percent signs of a path are no patterns
    command.append("--output=" + records.log_path(log_dir, stage, "%A" if stage.is_array else "%j", "%a"))
    dependency = format_dependency(job, ids)
    if dependency:
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    command += [*environment_options(stage), *request.sbatch_options, str(PROJECT_ROOT / name_job_file(stage))]
    if stage.is_array:
        command += ["--shards", str(job.shard_count)]
    return [*command, *target.list_arguments(stage), *request.stage_options]


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


def carry_out(plan: Plan, request: Request) -> list[Record]:
    """Submit a plan's jobs and return their records, or print the commands; jobs are then called JOB and their stage.

    The records are written job by job: a kill in between forgets none.
    """
    target = request.target
    path = records.submissions_dir(target.log_dir) / f"{time.time_ns()}.json"  # later calls sort behind it
    submitted: list[Record] = []
    ids: dict[PlannedJob, str] = {}
    for job in plan.jobs:
        command = build_command(job, request, ids)
        if request.arguments.dry_run:
            print(shlex.join(command), flush=True)
            ids[job] = f"JOB{job.stage.label}"
            continue
        ids[job] = scheduler.read_job_id(scheduler.tell(command))
        shards = scheduler.format_shards(job.shards) if job.stage.is_array else ""
        needs, place, account = format_dependency(job, ids), target.find_place(job.stage), request.arguments.account
        record = Record(job.stage.number, ids[job], shards, job.shard_count, needs, place, account or "")
        submitted.append(record)
        write_json(path, [asdict(record) for record in submitted])
    return submitted
