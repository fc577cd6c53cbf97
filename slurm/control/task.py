"""Become the stage that a job is for: find its shard and its device, then run its script in this process.

    python slurm/control/task.py STAGE [--shards N] [the stage's own options]
    python slurm/control/task.py requeue

The shard is $SLURM_ARRAY_TASK_ID of N (by default as many as the array goes up to). With `requeue`, after SLURM's
warning, this task goes back into the queue, unless it has been there often enough: exit code 1, it stays a failure.
Called by slurm/control/common.sh.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import PROJECT_ROOT, count_cores
from pipeline.errors import ConfigError, PipelineError
from pipeline.ids import Shard
from pipeline.stages import BY_LABEL, ROW_GROUP, WORKER, Stage
from publish_model.new_data.embed_options import parse as parse_embed_options
from slurm.control import scheduler
from slurm.control.target import Target, make_dataset_target

DEFAULT_MAX_REQUEUES = 8


@dataclass(frozen=True)
class Task:
    """A stage, the shard of it, the options it was given, and what they name."""

    stage: Stage
    shard: Shard
    options: list[str]
    target: Target


def read_task(argv: Sequence[str], environment: Mapping[str, str]) -> Task:
    """Read a task's command line and SLURM's variables."""
    parser = cli.make_parser(__doc__ or "", config=False)
    parser.add_argument("stage", choices=tuple(BY_LABEL))
    parser.add_argument("--shards", type=int, default=None)
    arguments, options = parser.parse_known_args(list(argv))
    stage = BY_LABEL[arguments.stage]
    if stage.unit == ROW_GROUP:
        target = make_dataset_target(parse_embed_options("", options))
    else:
        config = cli.config_from(cli.make_parser("").parse_known_args(options)[0])
        target = Target(config.log_dir, config)
    index = int(environment.get("SLURM_ARRAY_TASK_ID") or 0)
    total = arguments.shards or int(environment.get("SLURM_ARRAY_TASK_MAX") or 0) + 1
    if index >= total:
        raise ConfigError(f"task {index} of an array that is cut into {total} shards: submit it with submit_stage.sh")
    return Task(stage, Shard(index, total) if stage.is_array else Shard(), options, target)


def build_command(task: Task, environment: Mapping[str, str]) -> list[str]:
    """Return the stage's command, with what follows from where it runs."""
    config, embedding = task.target.config, task.target.embedding
    command = [sys.executable, str(PROJECT_ROOT / task.stage.script), *task.options]
    if task.stage.is_array and task.stage.unit != WORKER:
        command += ["--shard", f"{task.shard.index}/{task.shard.count}"]
    if task.stage.uses_gpu and must_have_gpu(environment):
        if embedding is not None and embedding.device == "auto":
            command += ["--device", "cuda"]
        if config is not None and config.infrastructure.device == "auto":
            command += ["--set", "infrastructure.device=cuda"]
    cores = int(environment.get("SLURM_CPUS_PER_TASK") or 0)
    if config is not None and config.infrastructure.num_workers == "auto" and 0 < cores < count_cores():
        command += ["--set", f"infrastructure.num_workers={cores}"]  # a cluster that does not confine jobs to theirs
    return command


def must_have_gpu(environment: Mapping[str, str]) -> bool:
    """Whether the CPU will not do; a driver that torch cannot use must not turn a night of H100 into one of CPU."""
    wanted = environment.get("REQUIRE_GPU", "auto")
    return wanted == "1" or (wanted == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))


def name_task(environment: Mapping[str, str]) -> str:
    """Return the id by which a task is requeued; an array's own id would requeue all its tasks."""
    if environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def check_tries(task_id: str, environment: Mapping[str, str]) -> str:
    """Return what to say of the next try of a task; PipelineError if there is none."""
    tries = int(environment.get("SLURM_RESTART_COUNT") or 0)
    most = int(environment.get("MAX_REQUEUES") or DEFAULT_MAX_REQUEUES)
    if tries >= most:
        raise PipelineError(
            f"task {task_id}: begun {tries + 1} times already (MAX_REQUEUES is {most}): give it more --time or "
            "smaller shards"
        )
    return f"task {task_id} goes back into the queue (try {tries + 2}, {most} requeues at most)"


def main(argv: Sequence[str] | None = None) -> None:
    """Become the stage, or put this task back into the queue."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["requeue"]:
        task_id = name_task(os.environ)
        print(check_tries(task_id, os.environ), flush=True)
        scheduler.tell(["scontrol", "requeue", task_id])
        return
    command = build_command(read_task(words, os.environ), os.environ)
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    if cores:
        os.environ.setdefault("OMP_NUM_THREADS", str(min(int(cores), count_cores())))
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    cli.run_guarded(main)
