"""Show how far the pipeline is on the cluster: every stage, what failed and why, and the commands that retry it.

    python slurm/status.py [--config C] [--json]

Reads the outputs, the jobs' logs and, where it answers, squeue. Changes nothing.
"""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import PROJECT_ROOT, Config
from pipeline.errors import ConfigError, InputError
from pipeline.files.units import UnitState
from pipeline.stages import ANCHOR, STAGES, TAR, Stage, has_new_data
from pipeline.workspace import open_without_waiting
from slurm.control import scheduler
from slurm.control.scheduler import QueuedTask
from slurm.control.target import Target, look_at, take_shard

HEAD = ("stage", "name", "done", "running", "failed", "not started", "of")
DONE, RUNNING, FAILED, WAITING, NOT_STARTED = "done", "running", "failed", "waiting", "not started"
TAIL_BYTES = 1 << 16
Log = dict[str, Any]
EXIT_LINE = re.compile(r"^task: stage \S+ shard \d+ job \S* (?:account (\S+) )?exit (\d+)$")
# Behind the name of the stage's jobs: a hash of settings, the number of shards, the job and, of an array, the shard.
LOG_NAME = re.compile(r"(?:-[0-9a-f]{8})?-(\d+)-(\d+)(?:_(\d+))?\.log")


def survey(config: Config, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the state of every stage that the configuration has paths for, as plain values."""
    target = Target(config.log_dir, config, tuple(overrides))
    queued = scheduler.list_queued()
    stages = []
    for stage in STAGES.values():
        with suppress(ConfigError):  # the configuration does not say where that stage writes
            jobs = target.name_jobs(stage)
            if stage.number != 8 or has_new_data(config):
                own = None if queued is None else [task for task in queued if task.jobs == jobs]
                stages.append(describe_stage(target, stage, own))
    return stages


def describe_stage(target: Target, stage: Stage, queued: list[QueuedTask] | None) -> dict[str, Any]:
    """Return a stage's state by its outputs and logs, and by its tasks in the queue where SLURM answers.

    `total`, its number of shards, is None where nothing tells it yet.
    """
    found, logs = list[UnitState](), find_logs(target, stage)
    with suppress(InputError, ConfigError):
        found = [look_at(unit) for unit in target.list_units(stage)]
    counts = [task.shard_count for task in queued or []] or [count for count, _, _ in logs[-1:]]
    total = counts[0] if counts else (len(found) or None) if stage.unit == TAR else 1
    # The last job that has a shard counts, if it cuts the work as the last one does.
    last = {shard: read_log(path) for count, shard, path in logs if count == total}
    tasks = {task.shard: task for task in queued or [] if task.shard_count == total}
    states, failures, may_retry = [], [], False
    accounts = [f"--account={log['account']}" for log in last.values() if log and log["account"]]
    for shard in range(total or 0):
        units, log = take_shard(stage, found, shard, total or 1), last.get(shard)
        problem = next((unit.problem for unit in units if unit.problem), "")
        states.append(judge_shard(target, stage, units, log, tasks.get(shard), queued is not None))
        if states[-1] == FAILED:
            may_retry |= not problem  # submit refuses the others
            known = log or dict.fromkeys(("job", "exit_code", "error", "log", "account"))
            failures.append({"shard": shard, **known, "error": problem or known["error"]})
    retry = [
        str(PROJECT_ROOT / "slurm/submit_stage.sh"), str(stage.number), *accounts[-1:],
        *target.list_settings(), *(["--array-size", str(total)] if stage.is_array else []),
    ]  # fmt: skip
    return {
        "stage": stage.number,
        "name": stage.name,
        "done": states.count(DONE),
        "running": states.count(RUNNING),
        "failed": len(failures),
        "not_started": states.count(NOT_STARTED) + states.count(WAITING),
        "total": total,
        "shards": states,
        "failures": failures,
        "retry": shlex.join(retry) if may_retry else None,
    }


def find_logs(target: Target, stage: Stage) -> list[tuple[int, int, Path]]:
    """Return the logs of a stage's jobs, the last written last, each with the number of shards and its shard."""
    jobs, found = target.name_jobs(stage), []
    for path in (target.log_dir / "slurm").glob(f"{jobs}-*.log"):
        if match := LOG_NAME.fullmatch(path.name.removeprefix(jobs)):
            count, _, shard = (int(number or 0) for number in match.groups())
            found.append((path.stat().st_mtime_ns, count, shard, path))  # a cluster's job ids begin anew
    return [entry[1:] for entry in sorted(found)]


def judge_shard(
    target: Target, stage: Stage, units: list[UnitState], log: Log | None, task: QueuedTask | None, has_slurm: bool
) -> str:
    """Return how a shard is: by the queue, else by its outputs, else by how its last job ended."""
    if task is not None:
        return WAITING if task.is_waiting else RUNNING
    is_there = bool(units) and all(unit.is_complete for unit in units)
    if is_there and (log is None or log["exit_code"] == 0 or target.is_shard_done(units)):
        return DONE
    if any(unit.problem for unit in units):
        return FAILED
    if log is None:  # not begun, or taken out of the queue when those that it waited for failed
        return NOT_STARTED
    if log["exit_code"] == 0:  # its shard is done, though perhaps not the output that all shards write together
        return DONE if stage.unit == ANCHOR else NOT_STARTED
    return FAILED if has_slurm or log["exit_code"] is not None else RUNNING


def read_log(path: Path) -> Log | None:
    """Return what the end of a job's log says, None where there is no log; an `exit_code` None: not how it ended."""
    try:
        with open_without_waiting(path) as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    exits = [(number, int(match[2]), match[1]) for number, line in enumerate(lines) if (match := EXIT_LINE.match(line))]
    end, code, account = exits[-1] if exits else (-1, None, None)
    behind = lines[end + 1 :]
    # A requeued task's log goes on behind its exit line; a task that is not requeued complains there, and ends.
    is_over = not behind or (len(behind) == 1 and behind[0].startswith("error: "))
    errors = [line for line in lines if re.search(r"(^|\W)error: | ERROR ", line)]
    last = lines[end - 1 : end] if is_over and end > 0 else lines[-1:]
    job, error = path.stem.rpartition("-")[2], (errors or last or [""])[-1]
    return {"job": job, "exit_code": code if is_over else None, "error": error, "log": str(path), "account": account}


def format_status(stages: list[dict[str, Any]]) -> str:
    line = "{:>5}  {:<32}  {:>5}  {:>7}  {:>6}  {:>11}  {:>5}".format
    counts = ("stage", "name", "done", "running", "failed", "not_started")
    lines = [line(*HEAD), *(line(*map(stage.get, counts), stage["total"] or "?") for stage in stages)]
    for stage in stages:
        for failure in stage["failures"]:
            job = f", job {failure['job']}" if failure["job"] else ""
            lines.append(f"\nstage {stage['stage']} {stage['name']}, shard {failure['shard']}{job}: failed")
            lines.append(f"  {failure['error']}")
            lines += [f"  {failure['log']}"] if failure["log"] else []
        lines += [f"  retry: {stage['retry']}"] if stage["retry"] else []
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    config = cli.config_from(arguments)
    stages = survey(config, arguments.overrides)
    if arguments.json:
        print(json.dumps({"config": str(config.file_path), "stages": stages}, indent=2))
    else:
        print(format_status(stages))


if __name__ == "__main__":
    cli.run_guarded(main)
