"""Ask SLURM's commands and give them orders."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import PROJECT_ROOT
from pipeline.errors import PipelineError

# SLURM's own default (slurm.conf(5)), for where no SLURM answers.
DEFAULT_MAX_ARRAY_SIZE = 1001
# A token belongs to the login node: jobs work offline, and the accounting may keep a job's environment.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
QUERY_TIMEOUT_SECONDS = 60
WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")


@dataclass(frozen=True)
class QueuedTask:
    """A job or one task of an array that is waiting or running; `shard` is None where it is no array."""

    job_id: str
    shard: int | None
    is_waiting: bool


def ask(command: Sequence[str]) -> str | None:
    """Return what a SLURM command prints, None where it is missing or does not answer."""
    if shutil.which(command[0]) is None:
        return None
    try:
        run = _run(command, timeout=QUERY_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None


def tell(command: Sequence[str]) -> str:
    """Return what a SLURM command prints; its complaint becomes a PipelineError."""
    try:
        run = _run(command, cwd=PROJECT_ROOT)  # a job finds the project by SLURM_SUBMIT_DIR
    except OSError as error:
        raise PipelineError(f"{command[0]}: cannot be run ({error.strerror}): run this where SLURM is") from None
    if run.returncode != 0:
        complaint = " ".join(run.stderr.split()) or f"exit code {run.returncode}"
        raise PipelineError(f"{command[0]} refused: {complaint}: correct that, then run this again")
    return run.stdout


def _run(
    command: Sequence[str], *, cwd: Path | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="backslashreplace", check=False, cwd=cwd,
        timeout=timeout, env=clean_environment(),
    )  # fmt: skip


def clean_environment() -> dict[str, str]:
    """Return the environment without tokens, and without what changes which jobs SLURM lists and how."""
    hidden = ("SQUEUE_", "SACCT_", *SECRETS)
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


def read_max_array_size() -> int:
    """Return the cluster's MaxArraySize, which is one more than the highest task number."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]) or "", re.MULTILINE)
    # 0 stands for a cluster without arrays; an array of one still has to be asked for.
    return max(1, int(match[1])) if match else DEFAULT_MAX_ARRAY_SIZE


def list_queued() -> list[QueuedTask] | None:
    """Return the user's waiting and running tasks, None where squeue does not answer."""
    text = ask(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F|%K|%T"])
    if text is None:
        return None
    tasks = []
    for line in text.splitlines():
        job_id, task, state = (part.strip() for part in line.split("|"))
        shards: Sequence[int | None] = [None] if task in ("N/A", "") else parse_shards(task)
        tasks += [QueuedTask(job_id, shard, state in WAITING_STATES) for shard in shards]
    return tasks


def list_ended(job_ids: Sequence[str]) -> dict[tuple[str, int | None], str]:
    """Return the state in which tasks ended, as far as the accounting knows them."""
    text = ask(["sacct", "-X", "-n", "-P", f"--jobs={','.join(job_ids)}", "--format=JobID,State"]) if job_ids else None
    ended: dict[tuple[str, int | None], str] = {}
    for line in (text or "").splitlines():
        match = re.fullmatch(r"(\d+)(?:_(\d+|\[.*\]))?\|(\w+).*", line)
        if match:
            shards: Sequence[int | None] = parse_shards(match[2]) if match[2] else [None]
            ended.update({(match[1], shard): match[3] for shard in shards})
    return ended


def read_job_id(answer: str) -> str:
    """Return the job id that `sbatch --parsable` answers."""
    job_id = answer.strip().splitlines()[-1].partition(";")[0]
    if not job_id.isdigit():
        raise PipelineError(f"sbatch answered {job_id!r} in place of a job id: is sbatch wrapped by something?")
    return job_id


def format_shards(shards: Iterable[int]) -> str:
    """Write shard numbers as sbatch's --array does: `0-3,7`."""
    ranges: list[list[int]] = []
    for shard in sorted(set(shards)):
        if ranges and shard == ranges[-1][1] + 1:
            ranges[-1][1] = shard
        else:
            ranges.append([shard, shard])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def parse_shards(text: str) -> list[int]:
    """Read what `format_shards` writes, and what squeue shows of an array, `[0-3,7%4]`; else ValueError."""
    shards: list[int] = []
    for part in re.sub(r"%\d+$", "", text.strip("[]")).split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ValueError(f"{text!r} must read like 0-3,7")
        shards += range(int(match[1]), int(match[2] or match[1]) + 1)
    return sorted(set(shards))
