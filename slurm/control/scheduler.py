"""Ask SLURM's commands and give them orders."""

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import PROJECT_ROOT
from pipeline.errors import PipelineError

# A token belongs to the login node: jobs work offline, and the accounting may keep a job's environment.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
# These hide jobs from a query, or print them otherwise.
QUERY_SETTINGS = ("SQUEUE_", "SCONTROL_")
# These would make an array of a single job, wait for its end, move it out of the queries' sight, or take away its log
# or the signal by which it is requeued. The others hold: SBATCH_ACCOUNT, _PARTITION, _QOS, _TIMELIMIT, ...
IGNORED = {
    f"SBATCH_{name}"
    for name in ("ARRAY_INX", "CLUSTERS", "DEPENDENCY", "ERROR", "OPEN_MODE", "OUTPUT", "SIGNAL", "WAIT")
}
QUERY_TIMEOUT_SECONDS = 60
# Target.name_jobs and Target.settings, which jobs of before lack, and the number of shards.
JOB_NAME = re.compile(r"(\w+-[0-9a-f]{8})(?:-([0-9a-f]{8}))?-(\d+)")
WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")


@dataclass(frozen=True)
class QueuedTask:
    """One of a job's shards in the queue; `name` is JOB, or JOB_TASK of an array, `jobs` as in Target.name_jobs."""

    name: str
    shard: int
    shard_count: int
    jobs: str = ""
    is_waiting: bool = False
    settings: str = ""  # as in Target.settings


def ask(command: Sequence[str]) -> str | None:
    """Return what a SLURM command prints, None where it is missing or does not answer."""
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
    """Return the environment without tokens, and without what changes SLURM's answers or breaks the chain of jobs."""
    hidden = {*IGNORED, *SECRETS, *(name for name in os.environ if name.startswith(QUERY_SETTINGS))}
    return {name: value for name, value in os.environ.items() if name not in hidden}


def list_queued() -> list[QueuedTask] | None:
    """Return the user's tasks in the queue, None where squeue does not answer."""
    text = ask(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F|%K|%T|%j"])
    if text is None:
        return None
    tasks = []
    for line in text.splitlines():
        if line.count("|") != 3:  # with $SLURM_CLUSTERS, the cluster's name
            continue
        job_id, task, state, job_name = (part.strip() for part in line.split("|"))
        if not (found := JOB_NAME.fullmatch(job_name)):
            continue
        name, shard = (f"{job_id}_{task}", int(task)) if task.isdigit() else (job_id, 0)
        tasks.append(QueuedTask(name, shard, int(found[3]), found[1], state in WAITING_STATES, found[2] or ""))
    return tasks


def read_job_id(answer: str) -> str:
    """Return the job id that `sbatch --parsable` answers."""
    job_id = answer.strip().rpartition("\n")[2].partition(";")[0]
    if not job_id.isdigit():
        raise PipelineError(f"sbatch answered {job_id!r} in place of a job id: is sbatch wrapped by something?")
    return job_id


def format_shards(shards: Iterable[int]) -> str:
    """Write shard numbers as sbatch's --array does: `0-3,7`."""
    numbers = set(shards)
    firsts = sorted(shard for shard in numbers if shard - 1 not in numbers)
    lasts = sorted(shard for shard in numbers if shard + 1 not in numbers)
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in zip(firsts, lasts, strict=True))
