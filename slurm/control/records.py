"""Keep what was submitted below log_dir/submissions, so that a later command knows which jobs are this pipeline's."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.files.workspace import locked, read_json
from pipeline.stages import STAGES, TUNE, Stage
from slurm.control.scheduler import format_shards, parse_shards


@dataclass(frozen=True)
class Record:
    """One job that was submitted; `output` says which pipeline's it is, should two share a log folder."""

    stage: int
    job_id: str
    shards: str  # as in --array; empty for a job that is no array
    shard_count: int
    dependency: str
    output: str
    account: str  # of --account, empty without one

    def list_shards(self) -> list[int]:
        """Return the numbers of its shards, [0] where it has none."""
        return parse_shards(self.shards) if self.shards else [0]


def submissions_dir(log_dir: Path) -> Path:
    """Return the folder of the records."""
    return log_dir / "submissions"


def log_path(log_dir: Path, stage: Stage, job: str, shard: object) -> str:
    """Return where a job, or a task of an array, writes what it prints."""
    return str(log_dir / "slurm" / (f"{stage.name}-{job}_{shard}.log" if stage.is_array else f"{stage.name}-{job}.log"))


@contextlib.contextmanager
def holding(log_dir: Path) -> Iterator[None]:
    """Let one process submit at a time, so that two never submit the same shards; another gets a PipelineError."""
    folder = submissions_dir(log_dir)
    with locked(folder, "is submitting: wait for it, then run this again", folder / ".lock"):
        (log_dir / "slurm").mkdir(exist_ok=True)  # without it a job dies without a log
        yield


def read_records(log_dir: Path) -> list[Record]:
    """Return all jobs that were ever submitted with this log folder, the oldest first."""
    records = []
    for path in sorted(submissions_dir(log_dir).glob("[0-9]*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            records += [Record(**content) for content in read_json(path)]
    return records


def format_table(records: list[Record]) -> str:
    """Return the jobs as a table."""
    names = {stage.number: stage.name for stage in (*STAGES.values(), TUNE)}
    line = "{:<5}  {:<32}  {:<9}  {:<14}  {}".format
    lines = [line("stage", "name", "job", "shards", "waits for")]
    for record in records:
        shards = f"{format_shards(record.list_shards())} of {record.shard_count}" if record.shards else "-"
        lines.append(line(record.stage or "-", names[record.stage], record.job_id, shards, record.dependency or "-"))
    return "\n".join(lines)
