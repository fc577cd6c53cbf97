"""Become the stage that a job is for: find its shard, then run its script in this process.

    python slurm/control/task.py STAGE [--shards N] [the stage's own options]

The shard is $SLURM_ARRAY_TASK_ID of N (by default as many as the array goes up to). Called by slurm/control/common.sh.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import PROJECT_ROOT, count_cores
from pipeline.errors import ConfigError
from pipeline.stages import BY_LABEL, WORKER


def build_command(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the stage's command by a task's command line and SLURM's variables."""
    parser = cli.make_parser(__doc__ or "", config=False)
    parser.add_argument("stage", choices=tuple(BY_LABEL))
    parser.add_argument("--shards", type=int, default=None)
    arguments, options = parser.parse_known_args(list(argv))
    stage = BY_LABEL[arguments.stage]
    index = int(environment.get("SLURM_ARRAY_TASK_ID") or 0)
    total = arguments.shards or int(environment.get("SLURM_ARRAY_TASK_MAX") or 0) + 1
    if index >= total:
        raise ConfigError(f"task {index} of an array that is cut into {total} shards: submit it with submit_stage.sh")
    command = [sys.executable, str(PROJECT_ROOT / stage.script), *options]
    if stage.is_array and stage.unit != WORKER:
        command += ["--shard", f"{index}/{total}"]
    return command


def main(argv: Sequence[str] | None = None) -> None:
    command = build_command(sys.argv[1:] if argv is None else argv, os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(count_cores()))
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    cli.run_guarded(main)
