"""Find out how far every stage is, from its outputs, its logs and, where it answers, squeue."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import PROJECT_ROOT, Config
from pipeline.errors import ConfigError, InputError
from pipeline.files.units import COMPLETE, STALE, UnitState
from pipeline.own_folders import open_without_waiting
from pipeline.stages import ANCHOR, STAGES, TAR, Stage, has_new_data
from slurm.control import records, scheduler
from slurm.control.records import Record
from slurm.control.submission import is_of_target
from slurm.control.target import Target, look_at, spell_overrides, take_shard

DONE, RUNNING, FAILED, WAITING, NOT_STARTED = "done", "running", "failed", "waiting", "not started"
NO_LOG = "no log: it was cancelled, or failed before it began"
TAIL_BYTES = 1 << 16
EXIT_LINE = re.compile(r"^task: stage \S+ shard \d+ job \S* exit (\d+)$")


@dataclass(frozen=True)
class JobLog:
    """What the end of a job's log says."""

    path: Path
    exit_code: int | None  # None where no line says how it ended
    last_error: str


def survey(config: Config, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the state of every stage that the configuration has paths for, as plain values."""
    target = Target(config.log_dir, config, tuple(overrides))
    kept = [record for record in records.read_records(config.log_dir) if is_of_target(record, target)]
    queued = scheduler.list_queued()
    stages = []
    for stage in STAGES.values():
        try:
            target.find_place(stage)
        except ConfigError:
            continue
        if stage.number != 8 or has_new_data(config):
            own = [record for record in kept if record.stage == stage.number]
            stages.append(describe_stage(target, config, stage, own, queued))
    return stages


def describe_stage(
    target: Target, config: Config, stage: Stage, own: list[Record], queued: scheduler.Queue | None
) -> dict[str, Any]:
    """Return a stage's state by its records, and by what is queued where SLURM answers.

    `total`, its number of shards, is None where nothing tells it yet.
    """
    try:
        found = [look_at(unit) for unit in target.list_units(stage)]
    except (InputError, ConfigError):
        found = []
    total = own[-1].shard_count if own else (len(found) or None) if stage.unit == TAR else 1
    # The last job that has a shard counts, if it cuts the work as the last one does.
    jobs = {shard: job for job in own if job.shard_count == total for shard in job.list_shards()}
    states, failures, may_retry = [], [], False
    for shard in range(total or 0):
        units, record = take_shard(stage, found, shard, total or 1), jobs.get(shard)
        log = read_log(Path(records.log_path(target.log_dir, stage, record.job_id, shard))) if record else None
        problem = next((unit.problem for unit in units if unit.status == STALE), "")
        states.append(judge_shard(target, stage, shard, units, record, log, queued))
        if states[-1] == FAILED:
            may_retry |= not problem  # submit refuses the others
            failures.append({
                "shard": shard,
                "job": (f"{record.job_id}_{shard}" if record.shards else record.job_id) if record else "",
                "exit_code": log.exit_code if log else None,
                "error": problem or (log.last_error if log else NO_LOG),
                "log": str(log.path) if log else None,
            })  # fmt: skip
    rest = [f"--account={own[-1].account}"] if own and own[-1].account else []
    rest += ["--config", str(config.file_path), *spell_overrides(target.overrides)]
    retry = [str(PROJECT_ROOT / "slurm/submit_stage.sh"), str(stage.number), *rest]
    retry += ["--array-size", str(total)] if stage.is_array else []
    return {
        "stage": stage.number,
        "name": stage.name,
        "done": states.count(DONE),
        "running": states.count(RUNNING),
        "failed": len(failures),
        "not_started": states.count(NOT_STARTED) + states.count(WAITING),
        "waiting_in_queue": states.count(WAITING),
        "total": total,
        "shards": states,
        "failures": failures,
        "retry": shlex.join(retry) if may_retry else None,
        "retry_rest": shlex.join([str(PROJECT_ROOT / "slurm/submit_pipeline.sh"), *rest]) if may_retry else None,
    }


def judge_shard(
    target: Target, stage: Stage, shard: int, units: list[UnitState], record: Record | None, log: JobLog | None,
    queued: scheduler.Queue | None,
) -> str:  # fmt: skip
    """Return how a shard is: by the queue, else by its outputs, else by how its last job ended."""
    is_there = bool(units) and all(unit.status == COMPLETE for unit in units)
    is_stale = any(unit.status == STALE for unit in units)
    task = (record.job_id, shard if record.shards else None) if record else None
    if queued is not None and task in queued:
        return WAITING if queued[task] else RUNNING
    if is_there and (log is None or log.exit_code == 0 or target.is_shard_done(units)):
        return DONE
    if is_stale or record is None:
        return FAILED if is_stale else NOT_STARTED
    if log is None:  # one that waited for others was taken out of the queue when they failed
        return NOT_STARTED if queued is None or record.dependency else FAILED
    if log.exit_code == 0:  # its shard is done, though perhaps not the output that all shards write together
        return DONE if stage.unit == ANCHOR else NOT_STARTED
    return RUNNING if log.exit_code is None and queued is None else FAILED


def read_log(path: Path) -> JobLog | None:
    """Return what the end of a log says, None where there is no log."""
    try:
        with open_without_waiting(path) as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    exits = [(number, int(match[1])) for number, line in enumerate(lines) if (match := EXIT_LINE.match(line))]
    end, code = exits[-1] if exits else (-1, None)
    behind = lines[end + 1 :]
    # A requeued task's log goes on behind its exit line; a task that is not requeued complains there, and ends.
    is_over = not behind or (len(behind) == 1 and behind[0].startswith("error: "))
    errors = [line for line in lines if re.search(r"(^|\W)error: | ERROR ", line)]
    last = lines[end - 1 : end] if is_over and end > 0 else lines[-1:]
    return JobLog(path, code if is_over else None, (errors or last or [""])[-1])
