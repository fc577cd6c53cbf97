"""Become the stage that a job is for: find its shard, then run its script in this process.

    python slurm/control/task.py STAGE [--shards N] [the stage's own options]
    python slurm/control/task.py requeue

The shard is $SLURM_ARRAY_TASK_ID of N (by default as many as the array goes up to). With `requeue`, after SLURM's
warning, this task goes back into the queue, unless it has been there often enough: exit code 1, it stays a failure.
Called by slurm/control/common.sh.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import PROJECT_ROOT, count_cores
from pipeline.errors import ConfigError, PipelineError
from pipeline.stages import BY_LABEL, WORKER
from slurm.control import scheduler

DEFAULT_MAX_REQUEUES = 8


def build_command(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the stage's command by a task's command line and SLURM's variables."""
    parser = cli.make_parser(__doc__ or "", config=False)
    parser.add_argument("stage", choices=tuple(BY_LABEL))
    parser.add_argument("--shards", type=int, default=None)
    arguments, options = parser.parse_known_args(list(argv))
    stage = BY_LABEL[arguments.stage]
    index = int(environment.get("SLURM_ARRAY_TASK_ID") or 0)
    total = arguments.shards or int(environment.get("SLURM_ARRAY_TASK_MAX") or 0) + 1
    if index >= total:
        raise ConfigError(f"task {index} of an array that is cut into {total} shards: submit it with submit_stage.sh")
    command = [sys.executable, str(PROJECT_ROOT / stage.script), *options]
    if stage.is_array and stage.unit != WORKER:
        command += ["--shard", f"{index}/{total}"]
    return command


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
    command = build_command(words, os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(count_cores()))
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    cli.run_guarded(main)
