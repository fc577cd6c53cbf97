"""Turn a plan into sbatch commands, submit them and keep the records."""

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import PROJECT_ROOT, Config
from pipeline.errors import ConfigError
from pipeline.stages import ROW_GROUP, Stage
from publish_model.generate_embeddings_from_parquet import read_options
from slurm.control import records, scheduler
from slurm.control.plan import ActiveTask, Plan, PlannedJob, Source
from slurm.control.records import Record
from slurm.control.shards import format_shards


@dataclass(frozen=True)
class Request:
    """What all jobs of one call have in common."""

    account: str | None = None
    max_concurrent: int | None = None
    dry_run: bool = False
    sbatch_options: tuple[str, ...] = ()
    stage_options: tuple[str, ...] = ()


@dataclass
class Target:
    """Where a pipeline, or a dataset of stage 8 alone, keeps its logs, and what its stages are told."""

    log_dir: Path
    config: Config | None = None
    overrides: list[str] = field(default_factory=list)
    dataset_options: list[str] = field(default_factory=list)
    dataset_output: Path | None = None

    def arguments(self, stage: Stage) -> list[str]:
        """Return the stage's command line, without its shard."""
        if self.config is None:
            return list(self.dataset_options)
        if stage.unit == ROW_GROUP:
            options = read_options(self.config)
            return [
                "--input", str(options.input), "--output", str(options.output), "--model-id", options.model_id,
                "--dtype", options.dtype, "--device", options.device,
            ]  # fmt: skip
        overrides = [part for override in self.overrides for part in ("--set", override)]
        return ["--config", str(self.config.file_path), *overrides]

    def output(self, stage: Stage) -> str:
        """Return what tells this pipeline's jobs from another's."""
        return str(self.dataset_output if self.config is None else stage.list_outputs(self.config)[0])


def find_active(target: Target, stages: Sequence[Stage], kept: list[Record]) -> dict[int, list[ActiveTask]]:
    """Return, by stage, the shards that earlier submissions have in the queue; none where there is no SLURM."""
    queued = scheduler.list_queued()
    by_job: dict[str, list[scheduler.QueuedTask]] = {}
    for task in queued or []:
        by_job.setdefault(task.job_id, []).append(task)
    active: dict[int, list[ActiveTask]] = {}
    for stage in stages:
        own = [record for record in kept if record.stage == stage.number and record.output == target.output(stage)]
        for record in own:
            for task in by_job.get(record.job_id, []):
                is_array = task.shard is not None
                found = ActiveTask(record.job_id, task.shard or 0, record.shard_count, task.is_waiting, is_array)
                active.setdefault(stage.number, []).append(found)
    return active


def name_job_file(stage: Stage) -> str:
    """Return a stage's job file, from the project's root."""
    folder = "publish_model/slurm" if stage.unit == ROW_GROUP else "slurm"
    return f"{folder}/{stage.name}.sbatch"


def build_command(job: PlannedJob, target: Target, request: Request, ids: dict[PlannedJob, str]) -> list[str]:
    """Return the sbatch command of a job; `ids` names the jobs that it waits for."""
    stage = job.stage
    command = ["sbatch", "--parsable"]
    if request.account:
        command.append(f"--account={request.account}")
    if stage.is_array:
        most = f"%{request.max_concurrent}" if request.max_concurrent else ""
        shards = "0-0" if job.shards == [0] else format_shards(job.shards)
        command.append(f"--array={shards}{most}")
    log = scheduler.escape_pattern(Path(records.log_pattern(stage, target.log_dir, stage.is_array)))
    command.append("--output=" + log.replace("{job}", "%A" if stage.is_array else "%j").replace("{shard}", "%a"))
    dependency = format_dependency(job, ids)
    if dependency:
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    command += [*environment_options(stage), *request.sbatch_options, str(PROJECT_ROOT / name_job_file(stage))]
    if stage.is_array:
        command += ["--shards", str(job.shard_count)]
    return [*command, *target.arguments(stage), *request.stage_options]


def format_dependency(job: PlannedJob, ids: dict[PlannedJob, str]) -> str:
    """Write what a job waits for as sbatch reads it."""

    def name(source: Source) -> str:
        return ids[source] if isinstance(source, PlannedJob) else source

    parts = []
    if job.whole_after:
        parts.append("afterok:" + ":".join(map(name, job.whole_after)))
    if job.shards_after is not None:
        # Task by task: one damaged tar then holds up its own shard, not the night's work of all others.
        parts.append("aftercorr:" + name(job.shards_after))
    return ",".join(parts)


def environment_options(stage: Stage) -> list[str]:
    """Return the sbatch options of $SBATCH_OPTIONS and, for one stage, of $SBATCH_OPTIONS_N."""
    return [
        option
        for name in ("SBATCH_OPTIONS", f"SBATCH_OPTIONS_{stage.label}")
        for option in shlex.split(os.environ.get(name, ""))
    ]


def check_secrets(options: Sequence[str]) -> None:
    """Raise ConfigError where a token would get into an sbatch line, whose text the accounting keeps."""
    tokens = [os.environ[name] for name in scheduler.SECRETS if os.environ.get(name)]
    for option in options:
        if any(f"{name}=" in option for name in scheduler.SECRETS) or any(token in option for token in tokens):
            raise ConfigError("a token on an sbatch line would be kept by the accounting: use it with prepare.sh alone")


def carry_out(plan: Plan, target: Target, request: Request) -> list[Record]:
    """Submit a plan's jobs, or print their commands, and return the records.

    Raises PipelineError where SLURM refuses a job; those before it stay submitted and are recorded.
    """
    environment = [option for job in plan.jobs for option in environment_options(job.stage)]
    check_secrets([*environment, *request.sbatch_options, *request.stage_options])
    ids: dict[PlannedJob, str] = {}
    if request.dry_run:
        for job_id, shards in plan.replaced.items():
            print(shlex.join(["scancel", *(f"{job_id}_{shard}" for shard in shards)]))
        for job in plan.jobs:
            print(shlex.join(build_command(job, target, request, ids)), flush=True)
            same = sum(other.stage == job.stage for other in ids)
            ids[job] = f"JOB{job.stage.label}" + (f"-{same + 1}" if same else "")
        return []
    for job_id, shards in plan.replaced.items():
        scheduler.cancel(job_id, shards)
    submission = records.Submission(target.log_dir)
    for job in plan.jobs:
        command = build_command(job, target, request, ids)
        ids[job] = scheduler.submit(command)
        submission.add(make_record(job, target, ids, command))
    return submission.records


def make_record(job: PlannedJob, target: Target, ids: dict[PlannedJob, str], command: list[str]) -> Record:
    """Describe a job that was submitted."""
    stage = job.stage
    return Record(
        stage=stage.number,
        name=stage.name,
        job_id=ids[job],
        shards=format_shards(job.shards) if stage.is_array else "",
        shard_count=job.shard_count,
        dependency=format_dependency(job, ids),
        output=target.output(stage),
        log_pattern=records.log_pattern(stage, target.log_dir, stage.is_array),
        submitted=time.time(),
        command=command,
    )
