"""Put this task back into the queue after a warning, unless it has been often enough or gets no further.

    python slurm/control/requeue.py STAGE [--shards N] [the stage's own options]

Called by slurm/control/common.sh once the stage has kept what was finished. Exit code 1: the task stays as it is, a
failure.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.errors import PipelineError
from pipeline.files.units import measure_progress
from pipeline.files.writing import write_json
from pipeline.stages import ROW_GROUP, TAR
from slurm.control import records, scheduler
from slurm.control.task import Task, read_task

DEFAULT_MAX_REQUEUES = 20


def name_task(environment: Mapping[str, str]) -> str:
    """Return the id by which a task is requeued; an array's own id would requeue all its tasks."""
    if environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def take_mark(task: Task) -> list[Any]:
    """Return plain values that change whenever the task's shard gets further."""
    units = task.target.list_units(task.stage)
    own = task.shard.take(units) if task.stage.unit in (TAR, ROW_GROUP) else units
    return [measure_progress(unit) for unit in own]


def check_progress(task: Task, task_id: str, environment: Mapping[str, str]) -> str:
    """Return what to say of the next try, having noted how far this one got.

    Raises PipelineError where there is not to be a next one.
    """
    tries = int(environment.get("SLURM_RESTART_COUNT") or 0)
    most = int(environment.get("MAX_REQUEUES") or DEFAULT_MAX_REQUEUES)
    if tries >= most:
        raise PipelineError(
            f"stage {task.stage.label}, task {task_id}: begun {tries + 1} times already (MAX_REQUEUES is {most}): "
            "give it more --time, or smaller shards"
        )
    path = records.submissions_dir(task.target.log_dir) / "marks" / f"{task_id}.json"
    mark = take_mark(task)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before == mark:
        raise PipelineError(
            f"stage {task.stage.label}, task {task_id}: two tries, and the second got no further: give it more --time"
        )
    write_json(path, mark)
    return f"task {task_id} goes back into the queue (try {tries + 2}, {most} requeues at most)"


def main(argv: Sequence[str] | None = None) -> None:
    """Requeue this task."""
    task = read_task(sys.argv[1:] if argv is None else argv, os.environ)
    task_id = name_task(os.environ)
    print(check_progress(task, task_id, os.environ), flush=True)
    scheduler.tell(["scontrol", "requeue", task_id])


if __name__ == "__main__":
    cli.run_guarded(main)
