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
from slurm.control.submission import Target
from slurm.control.work import is_done, list_units, look_at, take_shard

DONE, RUNNING, FAILED, WAITING, NOT_STARTED = "done", "running", "failed", "waiting", "not started"
FAILED_STATES = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")
# A running stage writes a progress line every 30 s; one that has been silent for so long is taken to have died.
SILENCE_SECONDS = 15 * 60
TAIL_BYTES = 1 << 16
EXIT_LINE = re.compile(r"^task: stage \d+ shard \d+ job \S* exit (\d+)$")
PROGRESS = re.compile(r": (\d+)/(\d+) (\S+), ([\d.]+) \S+/s, ETA (?:(\d+) s|unknown)")
STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ")


@dataclass(frozen=True)
class JobLog:
    """What the end of a job's log says."""

    path: Path
    exit_code: int | None  # None where no line says how it ended
    last_error: str
    items_per_second: float | None  # of the last progress line
    eta_seconds: float | None
    unit: str
    age_seconds: float


@dataclass(frozen=True)
class ShardState:
    """How one shard is, and the log of its last job where there is one."""

    shard: int
    state: str
    job: str = ""
    log: JobLog | None = None
    problem: str = ""  # what is wrong with its outputs

    def explain(self) -> str:
        """Return why it failed, empty where nothing says it."""
        return self.problem or (self.log.last_error if self.log else "")


@dataclass
class StageState:
    """How a stage is."""

    stage: Stage
    shards: list[ShardState] = field(default_factory=list)
    shard_count: int | None = None  # None where nothing says how many there will be
    units_done: int = 0
    units_total: int | None = None
    units_per_hour: float | None = None
    items_per_second: float | None = None
    items: str = ""
    eta_seconds: float | None = None
    account: str = ""

    def count(self, state: str) -> int:
        """Return how many shards are in a state."""
        return sum(shard.state == state for shard in self.shards)

    def failed(self) -> list[ShardState]:
        """Return the failed shards."""
        return [shard for shard in self.shards if shard.state == FAILED]


def survey(config: Config) -> list[StageState]:
    """Return the state of every stage that the configuration has paths for."""
    queued = scheduler.list_queued()
    kept = records.read_records(config.log_dir)
    ended = scheduler.list_ended(sorted({record.job_id for record in kept}))
    states = []
    for stage in STAGES.values():
        if stage.number == 8 and not has_new_data(config):
            continue
        try:
            output = Target(config.log_dir, config).output(stage)
        except ConfigError:
            continue
        own = [record for record in kept if (record.stage, record.output) == (stage.number, output)]
        states.append(survey_stage(stage, config, own, queued, ended))
    return states


def survey_stage(
    stage: Stage, config: Config, own: list[Record],
    queued: list[scheduler.QueuedTask] | None, ended: dict[tuple[str, int | None], str],
) -> StageState:  # fmt: skip
    """Return a stage's state; `own` are its jobs, the oldest first."""
    units = _list_units(stage, config)
    states = [look_at(unit) for unit in units or []]
    state = StageState(stage)
    state.shard_count = own[-1].shard_count if own else (len(units) if units and stage.unit == TAR else 1)
    if units is not None:
        state.units_total, state.units_done = len(units), sum(found.status == COMPLETE for found in states)
    elif not own and stage.unit == TAR:
        state.shard_count = None
    by_shard: dict[int, Record] = {}
    for record in own:  # the last one that has the shard, if it cuts the work as the last one does
        if record.shard_count == state.shard_count:
            by_shard.update(dict.fromkeys(record.list_shards(), record))
    for shard in range(state.shard_count or 0):
        own_states = take_shard(stage, states, shard, state.shard_count or 1)
        state.shards.append(judge_shard(stage, config, shard, own_states, by_shard.get(shard), queued, ended))
    done = [unit for unit, found in zip(units or [], states, strict=True) if found.status == COMPLETE]
    _measure(state, done, list(by_shard.values()))
    command = own[-1].command if own else []
    state.account = next((part.partition("=")[2] for part in command if part.startswith("--account=")), "")
    return state


def _list_units(stage: Stage, config: Config) -> list[Unit] | None:
    try:
        return list_units(stage, config)
    except (InputError, ConfigError):
        return None


def judge_shard(
    stage: Stage, config: Config, shard: int, states: list[UnitState], record: Record | None,
    queued: list[scheduler.QueuedTask] | None, ended: dict[tuple[str, int | None], str],
) -> ShardState:  # fmt: skip
    """Return how a shard is: what the queue says goes first, then its outputs, then how its last job ended."""
    is_there = bool(states) and all(found.status == COMPLETE for found in states)
    problem = next((found.problem for found in states if found.status == STALE), "")
    if record is None:
        return ShardState(shard, DONE if is_there else FAILED if problem else NOT_STARTED, problem=problem)
    task = shard if record.shards else None
    job = f"{record.job_id}_{shard}" if record.shards else record.job_id
    log = read_log(record.log_path(shard))
    in_queue = [found for found in queued or [] if (found.job_id, found.shard) == (record.job_id, task)]
    if in_queue:
        state = WAITING if in_queue[0].is_waiting else RUNNING
    elif is_there and (log is None or log.exit_code == 0 or is_done(states, config.data.max_reject_fraction)):
        state = DONE
    elif problem:
        state = FAILED
    elif log is None:
        state = FAILED if ended.get((record.job_id, task)) in FAILED_STATES else NOT_STARTED
    elif log.exit_code == 0:  # its shard is done, though perhaps not what all shards write together
        state = DONE if stage.unit == ANCHOR else NOT_STARTED
    elif log.exit_code is None and queued is None and log.age_seconds < SILENCE_SECONDS:
        state = RUNNING
    else:
        state = FAILED
    return ShardState(shard, state, job, log, problem)


def read_log(path: Path) -> JobLog | None:
    """Return what the end of a log says, None where there is no log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
        age = time.time() - path.stat().st_mtime
    except OSError:
        return None
    lines = [line.rstrip() for line in lines if line.strip()]
    end = EXIT_LINE.match(lines[-1]) if lines else None
    # A requeued task's log goes on behind the line with which it ended.
    begun = [number for number, line in enumerate(lines[:-1]) if EXIT_LINE.match(line)]
    last_try = lines[begun[-1] + 1 :] if begun and not end else lines
    errors = [line for line in lines if re.search(r"(^|\W)error: | ERROR ", line)]
    progress = next((match for line in reversed(last_try) if (match := PROGRESS.search(line))), None)
    return JobLog(
        path=path,
        exit_code=int(end[1]) if end else _requeue_exit(lines),
        last_error=errors[-1] if errors else (lines[-2] if end and len(lines) > 1 else (lines[-1] if lines else "")),
        items_per_second=float(progress[4]) if progress else None,
        eta_seconds=float(progress[5]) if progress and progress[5] else None,
        unit=progress[3] if progress else "",
        age_seconds=age,
    )


def _requeue_exit(lines: list[str]) -> int | None:
    """Return the exit code that stands before the complaint of a task that does not requeue itself any more."""
    if len(lines) > 1 and lines[-1].startswith("error: ") and (match := EXIT_LINE.match(lines[-2])):
        return int(match[1])
    return None


def _measure(state: StageState, done: list[Unit], own: list[Record]) -> None:
    """Put rates and the time left into the state: by finished units, or by what the running jobs report."""
    running = [shard.log for shard in state.shards if shard.state == RUNNING and shard.log]
    rates = [log.items_per_second for log in running if log.items_per_second is not None]
    if rates:
        state.items_per_second, state.items = sum(rates), running[0].unit
        state.eta_seconds = max((log.eta_seconds for log in running if log.eta_seconds is not None), default=None)
    if not own or (state.units_total or 0) < 2:
        return
    starts = [begin for shard in state.shards if shard.log and (begin := _first_stamp(shard.log.path))]
    begun = min(starts, default=0.0)
    ends = sorted(path.stat().st_mtime for unit in done for path in unit.outputs[:1])
    new = [end for end in ends if end >= begun]
    if not starts or not new:
        return
    until = time.time() if running else new[-1]
    state.units_per_hour = 3600 * len(new) / max(until - begun, 1.0)
    if running:
        state.eta_seconds = 3600 * ((state.units_total or 0) - len(ends)) / state.units_per_hour


def _first_stamp(path: Path) -> float | None:
    """Return when a log begins, in seconds since the epoch."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if match := STAMP.match(line):
                return time.mktime(time.strptime(match[1], "%Y-%m-%d %H:%M:%S"))
    return None
