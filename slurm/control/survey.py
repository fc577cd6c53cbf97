"""Find out how far every stage is, from its outputs, its logs and, where it answers, squeue."""

import re
import shlex
import time
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
# A running stage writes a progress line every 30 s; one that has been silent for so long is taken to have died.
SILENCE_SECONDS = 15 * 60
TAIL_BYTES = 1 << 16
EXIT_LINE = re.compile(r"^task: stage \S+ shard \d+ job \S* exit (\d+)$")
PROGRESS = re.compile(r": \d+/\d+ (\S+), ([\d.]+) \S+/s, ETA ")


@dataclass(frozen=True)
class JobLog:
    """What the end of a job's log says."""

    path: Path
    exit_code: int | None  # None where no line says how it ended
    last_error: str
    items_per_second: float  # of the last progress line, 0 without any
    items: str
    age_seconds: float


@dataclass(frozen=True)
class ShardState:
    """How one shard is, the log of its last job where there is one, and what is wrong with its outputs."""

    shard: int
    state: str
    job: str = ""
    log: JobLog | None = None
    problem: str = ""

    def describe_failure(self) -> dict[str, Any]:
        """Return as plain values what failed and why."""
        return {
            "shard": self.shard,
            "job": self.job,
            "exit_code": self.log.exit_code if self.log else None,
            "error": self.problem
            or (self.log.last_error if self.log else "no log: it was cancelled, or failed before it began"),
            "log": str(self.log.path) if self.log else None,
        }


def survey(config: Config, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the state of every stage that the configuration has paths for, as plain values."""
    target = Target(config.log_dir, config, tuple(overrides))
    kept = [record for record in records.read_records(config.log_dir) if is_of_target(record, target)]
    surveyor = Surveyor(target, kept, scheduler.list_queued())
    stages = []
    for stage in STAGES.values():
        try:
            target.find_place(stage)
        except ConfigError:
            continue
        if stage.number != 8 or has_new_data(config):
            stages.append(surveyor.describe_stage(stage))
    return stages


@dataclass(frozen=True)
class Surveyor:
    """What the records and SLURM say of a pipeline's jobs; `queued` is None where SLURM does not answer."""

    target: Target
    kept: list[Record]
    queued: dict[tuple[str, int | None], bool] | None  # whether the task waits

    def describe_stage(self, stage: Stage) -> dict[str, Any]:
        """Return a stage's state; `total`, its number of shards, is None where nothing tells it yet."""
        own = [record for record in self.kept if record.stage == stage.number]
        try:
            found = [look_at(unit) for unit in self.target.list_units(stage)]
        except (InputError, ConfigError):
            found = []
        total = own[-1].shard_count if own else (len(found) or None) if stage.unit == TAR else 1
        # The last job that has a shard counts, if it cuts the work as the last one does.
        jobs = {shard: job for job in own if job.shard_count == total for shard in job.list_shards()}
        shards = [
            self.judge_shard(stage, shard, take_shard(stage, found, shard, total or 1), jobs.get(shard))
            for shard in range(total or 0)
        ]
        states = [shard.state for shard in shards]
        running = [shard.log for shard in shards if shard.state == RUNNING and shard.log and shard.log.items]
        failed = [shard for shard in shards if shard.state == FAILED]
        again = [shard.shard for shard in failed if not shard.problem]  # submit refuses the others
        rest = [f"--account={own[-1].account}"] if own and own[-1].account else []
        assert self.target.config is not None
        rest += ["--config", str(self.target.config.file_path), *spell_overrides(self.target.overrides)]
        retry = [str(PROJECT_ROOT / "slurm/submit_stage.sh"), str(stage.number), *rest]
        if stage.is_array:
            retry += ["--array-size", str(total), "--shards", scheduler.format_shards(again)]
        return {
            "stage": stage.number,
            "name": stage.name,
            "done": states.count(DONE),
            "running": states.count(RUNNING),
            "failed": len(failed),
            "not_started": states.count(NOT_STARTED) + states.count(WAITING),
            "waiting_in_queue": states.count(WAITING),
            "total": total,
            "shards": states,
            "items_per_second": sum(log.items_per_second for log in running) if running else None,
            "items": running[0].items if running else "",
            "failures": [shard.describe_failure() for shard in failed],
            "retry": shlex.join(retry) if again else None,
            "retry_rest": shlex.join([str(PROJECT_ROOT / "slurm/submit_pipeline.sh"), *rest]) if again else None,
        }

    def judge_shard(self, stage: Stage, shard: int, states: list[UnitState], record: Record | None) -> ShardState:
        """Return how a shard is: by the queue, else by its outputs, else by how its last job ended."""
        is_there = bool(states) and all(found.status == COMPLETE for found in states)
        problem = next((found.problem for found in states if found.status == STALE), "")
        if record is None:
            return ShardState(shard, DONE if is_there else FAILED if problem else NOT_STARTED, problem=problem)
        task = (record.job_id, shard if record.shards else None)
        log = read_log(Path(records.log_path(self.target.log_dir, stage, record.job_id, shard)))
        if self.queued is not None and task in self.queued:
            state = WAITING if self.queued[task] else RUNNING
        elif is_there and (log is None or log.exit_code == 0 or self.target.is_shard_done(states)):
            state = DONE
        elif problem:
            state = FAILED
        elif log is None:  # one that waited for others was taken out of the queue when they failed
            state = NOT_STARTED if self.queued is None or record.dependency else FAILED
        elif log.exit_code == 0:  # its shard is done, though perhaps not the output that all shards write together
            state = DONE if stage.unit == ANCHOR else NOT_STARTED
        elif log.exit_code is None and self.queued is None and log.age_seconds < SILENCE_SECONDS:
            state = RUNNING
        else:
            state = FAILED
        return ShardState(shard, state, f"{record.job_id}_{shard}" if record.shards else record.job_id, log, problem)


def read_log(path: Path) -> JobLog | None:
    """Return what the end of a log says, None where there is no log."""
    try:
        with open_without_waiting(path) as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
        age = time.time() - path.stat().st_mtime
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
    progress = next((match for line in reversed(behind or lines) if (match := PROGRESS.search(line))), None)
    return JobLog(
        path=path,
        exit_code=code if is_over else None,
        last_error=(errors or last or [""])[-1],
        items_per_second=float(progress[2]) if progress else 0.0,
        items=progress[1] if progress else "",
        age_seconds=age,
    )
