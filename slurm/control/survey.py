"""Find out how far every stage is, from its outputs, its logs and, where they answer, squeue and sacct."""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import ConfigError, InputError
from pipeline.files.units import COMPLETE, STALE, Unit, UnitState
from pipeline.stages import ANCHOR, STAGES, TAR, Stage, has_new_data
from slurm.control import records, scheduler
from slurm.control.records import Record
from slurm.control.submission import is_of_target
from slurm.control.target import Target, look_at, take_shard

DONE, RUNNING, FAILED, WAITING, NOT_STARTED = "done", "running", "failed", "waiting", "not started"
FAILED_STATES = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")
# A running stage writes a progress line every 30 s; one that has been silent for so long is taken to have died.
SILENCE_SECONDS = 15 * 60
TAIL_BYTES = 1 << 16
EXIT_LINE = re.compile(r"^task: stage \S+ shard \d+ job \S* exit (\d+)$")
PROGRESS = re.compile(r": (\d+)/(\d+) (\S+), ([\d.]+) \S+/s, ETA (?:(\d+) s|unknown)")


@dataclass(frozen=True)
class JobLog:
    """What the end of a job's log says."""

    path: Path
    exit_code: int | None  # None where no line says how it ended
    last_error: str
    items_per_second: float | None  # of the last progress line
    eta_seconds: float | None
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


@dataclass
class StageState:
    """How a stage is; `shard_count` and `units_total` are None where nothing tells them yet."""

    stage: Stage
    shard_count: int | None
    shards: list[ShardState] = field(default_factory=list)
    units_done: int = 0
    units_total: int | None = None
    items_per_second: float | None = None
    items: str = ""
    eta_seconds: float | None = None
    account: str = ""

    def count(self, state: str) -> int:
        """Return how many shards are in a state."""
        return sum(shard.state == state for shard in self.shards)


@dataclass(frozen=True)
class Surveyor:
    """What the records and SLURM say of a pipeline's jobs; `queued` is None where SLURM does not answer."""

    target: Target
    kept: list[Record]
    queued: dict[tuple[str, int | None], bool] | None  # whether the task waits
    ended: dict[tuple[str, int | None], str]

    def look_at_stage(self, stage: Stage) -> StageState:
        """Return a stage's state."""
        own = [record for record in self.kept if record.stage == stage.number]
        units = self._list_units(stage)
        found = [look_at(unit) for unit in units or []]
        count = len(units) if units and stage.unit == TAR else None if stage.unit == TAR else 1
        state = StageState(stage, own[-1].shard_count if own else count)
        # The last job that has a shard counts, if it cuts the work as the last one does.
        jobs = {shard: job for job in own if job.shard_count == state.shard_count for shard in job.list_shards()}
        for shard in range(state.shard_count or 0):
            states = take_shard(stage, found, shard, state.shard_count or 1)
            state.shards.append(self.judge_shard(stage, shard, states, jobs.get(shard)))
        if units is not None:
            state.units_total = len(units)
        state.units_done = sum(one.status == COMPLETE for one in found)
        measure_rates(state)
        command = own[-1].command if own else []
        state.account = next((part.partition("=")[2] for part in command if part.startswith("--account=")), "")
        return state

    def _list_units(self, stage: Stage) -> list[Unit] | None:
        try:
            return self.target.list_units(stage)
        except (InputError, ConfigError):
            return None

    def judge_shard(self, stage: Stage, shard: int, states: list[UnitState], record: Record | None) -> ShardState:
        """Return how a shard is: by the queue, else by its outputs, else by how its last job ended."""
        is_there = bool(states) and all(found.status == COMPLETE for found in states)
        problem = next((found.problem for found in states if found.status == STALE), "")
        if record is None:
            return ShardState(shard, DONE if is_there else FAILED if problem else NOT_STARTED, problem=problem)
        task = (record.job_id, shard if record.shards else None)
        log = read_log(record.log_path(shard))
        if self.queued is not None and task in self.queued:
            state = WAITING if self.queued[task] else RUNNING
        elif is_there and (log is None or log.exit_code == 0 or self.target.is_shard_done(states)):
            state = DONE
        elif problem:
            state = FAILED
        elif log is None:
            state = FAILED if self.ended.get(task) in FAILED_STATES else NOT_STARTED
        elif log.exit_code == 0:  # its shard is done, though perhaps not the output that all shards write together
            state = DONE if stage.unit == ANCHOR else NOT_STARTED
        elif log.exit_code is None and self.queued is None and log.age_seconds < SILENCE_SECONDS:
            state = RUNNING
        else:
            state = FAILED
        return ShardState(shard, state, f"{record.job_id}_{shard}" if record.shards else record.job_id, log, problem)


def survey(config: Config) -> list[StageState]:
    """Return the state of every stage that the configuration has paths for."""
    target = Target(config.log_dir, config)
    kept = [record for record in records.read_records(config.log_dir) if is_of_target(record, target)]
    tasks = scheduler.list_queued()
    queued = None if tasks is None else {(task.job_id, task.shard): task.is_waiting for task in tasks}
    ended = scheduler.list_ended(sorted({record.job_id for record in kept}))
    surveyor = Surveyor(target, kept, queued, ended)
    states = []
    for stage in STAGES.values():
        try:
            target.find_place(stage)
        except ConfigError:
            continue
        if stage.number != 8 or has_new_data(config):
            states.append(surveyor.look_at_stage(stage))
    return states


def read_log(path: Path) -> JobLog | None:
    """Return what the end of a log says, None where there is no log."""
    try:
        with open(path, "rb") as file:
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
        items_per_second=float(progress[4]) if progress else None,
        eta_seconds=float(progress[5]) if progress and progress[5] else None,
        items=progress[3] if progress else "",
        age_seconds=age,
    )


def measure_rates(state: StageState) -> None:
    """Put the rate and the time left into the state, as the logs of the running jobs have them."""
    running = [shard.log for shard in state.shards if shard.state == RUNNING and shard.log]
    rates = [log.items_per_second for log in running if log.items_per_second is not None]
    if rates:
        state.items_per_second, state.items = sum(rates), running[0].items
        state.eta_seconds = max((log.eta_seconds for log in running if log.eta_seconds is not None), default=None)
