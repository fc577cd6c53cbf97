"""What was submitted, kept below log_dir/submissions, so that a later command knows which jobs are this pipeline's."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.files.failures import write_failure
from pipeline.files.writing import write_json
from pipeline.stages import Stage
from slurm.control.shards import format_shards, parse_shards


@dataclass(frozen=True)
class Record:
    """One job that was submitted; `output` says which pipeline's it is, should two share a log folder."""

    stage: int
    name: str
    job_id: str
    shards: str  # as in --array; empty for a job that is no array
    shard_count: int
    dependency: str
    output: str
    log_pattern: str  # with {job} and {shard} to fill in
    submitted: float  # seconds since the epoch
    command: list[str]

    def list_shards(self) -> list[int]:
        """Return the numbers of its shards, [0] where it has none."""
        return parse_shards(self.shards) if self.shards else [0]

    def log_path(self, shard: int) -> Path:
        """Return where a shard's job writes what it prints."""
        return Path(self.log_pattern.replace("{job}", self.job_id).replace("{shard}", str(shard)))


def submissions_dir(log_dir: Path) -> Path:
    """Return the folder of the records."""
    return log_dir / "submissions"


def job_logs_dir(log_dir: Path) -> Path:
    """Return the folder of what jobs print."""
    return log_dir / "slurm"


def log_pattern(stage: Stage, log_dir: Path, is_array: bool) -> str:
    """Return the log's path with {job} and {shard} to fill in."""
    name = f"{stage.name}-{{job}}_{{shard}}.log" if is_array else f"{stage.name}-{{job}}.log"
    return str(job_logs_dir(log_dir) / name)


@contextlib.contextmanager
def holding(log_dir: Path) -> Iterator[None]:
    """Let one process submit at a time, so that two of them never submit the same shards.

    Raises PipelineError where another one is at it, or the folders cannot be written.
    """
    folder = submissions_dir(log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        job_logs_dir(log_dir).mkdir(parents=True, exist_ok=True)  # without it a job dies without a log
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_failure(folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise PipelineError(f"{folder}: another process is submitting: wait for it, then run this again") from None
    except OSError:
        pass  # this file system has no locks
    try:
        yield
    finally:
        os.close(descriptor)


class Submission:
    """The file of one call: rewritten after every job, so that a kill in between forgets none."""

    def __init__(self, log_dir: Path) -> None:
        self.records: list[Record] = []
        stamp, number = time.strftime("%Y%m%d-%H%M%S"), 0
        while (path := submissions_dir(log_dir) / f"{stamp}-{number:02d}.json").exists():
            number += 1
        self.path = path

    def add(self, record: Record) -> None:
        """Keep one more job."""
        self.records.append(record)
        write_json(self.path, [asdict(kept) for kept in self.records])


def read_records(log_dir: Path) -> list[Record]:
    """Return all jobs that were ever submitted with this log folder, the oldest first."""
    records = []
    for path in sorted(submissions_dir(log_dir).glob("[0-9]*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            records += [Record(**content) for content in json.loads(path.read_text(encoding="utf-8"))]
    return records


def format_table(records: list[Record]) -> str:
    """Return the jobs as a table."""
    rows = [("stage", "name", "job", "shards", "waits for")]
    for record in records:
        shards = f"{format_shards(record.list_shards())} of {record.shard_count}" if record.shards else "-"
        rows.append((str(record.stage or "-"), record.name, record.job_id, shards, record.dependency or "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip
