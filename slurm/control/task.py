"""Become the stage that a job is for: find its shard, its device and its tars, then run its script in this process.

    python slurm/control/task.py STAGE [--shards N] [the stage's own options]

The shard is $SLURM_ARRAY_TASK_ID of N (by default as many as the array goes up to). Called by slurm/control/common.sh.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import PROJECT_ROOT, Config, count_cores, load_config
from pipeline.errors import ConfigError
from pipeline.files.units import TarUnit
from pipeline.ids import Shard
from pipeline.stages import ROW_GROUP, TAR, WORKER, Stage, find_stage
from slurm.control.work import list_units


@dataclass(frozen=True)
class Task:
    """A stage, the shard of it, the options it was given, and its configuration where it has one."""

    stage: Stage
    shard: Shard
    options: list[str]
    config: Config | None


def read_task(argv: Sequence[str], environment: Mapping[str, str]) -> Task:
    """Read a task's command line and SLURM's variables.

    Raises ConfigError where they are wrong.
    """
    parser = cli.make_parser(__doc__ or "", config=False)
    parser.add_argument("stage", type=find_stage)
    parser.add_argument("--shards", type=int, default=None)
    arguments, options = parser.parse_known_args(list(argv))
    stage = arguments.stage
    config = None if stage.unit == ROW_GROUP else _load(options)
    index = int(environment.get("SLURM_ARRAY_TASK_ID") or 0)
    total = arguments.shards or int(environment.get("SLURM_ARRAY_TASK_MAX") or 0) + 1
    if index >= total:
        raise ConfigError(f"task {index} of an array that is cut into {total} shards: submit it with submit_stage.sh")
    return Task(stage, Shard(index, total) if stage.is_array else Shard(), options, config)


def _load(options: list[str]) -> Config:
    parser = cli.make_parser("")
    return cli.config_from(parser.parse_known_args(options)[0]) if options else load_config()


def build_command(task: Task, environment: Mapping[str, str]) -> list[str]:
    """Return the stage's command, with what follows from where it runs."""
    command = [sys.executable, str(PROJECT_ROOT / task.stage.script), *task.options]
    if task.stage.is_array and task.stage.unit != WORKER:
        command += ["--shard", f"{task.shard.index}/{task.shard.count}"]
    if task.stage.uses_gpu and must_have_gpu(environment):
        command += _require_gpu(task)
    cores = int(environment.get("SLURM_CPUS_PER_TASK") or 0)
    if task.config is not None and task.config.infrastructure.num_workers == "auto" and 0 < cores < count_cores():
        command += ["--set", f"infrastructure.num_workers={cores}"]  # a cluster that does not confine jobs to theirs
    return command


def must_have_gpu(environment: Mapping[str, str]) -> bool:
    """Whether the CPU will not do; a driver that torch cannot use must not turn a night of H100 into one of CPU."""
    wanted = environment.get("REQUIRE_GPU", "auto")
    return wanted == "1" or (wanted == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))


def _require_gpu(task: Task) -> list[str]:
    if task.config is None:
        given = task.options[task.options.index("--device") + 1] if "--device" in task.options else "auto"
        return ["--device", "cuda"] if given == "auto" else []
    return ["--set", "infrastructure.device=cuda"] if task.config.infrastructure.device == "auto" else []


def copy_tars(task: Task, scratch_dir: Path) -> list[str]:
    """Copy the shard's tars to a folder of the node and return the option that makes the stage read them there.

    The other tars are linked, so that the shard's number means the same tars there.
    """
    assert task.config is not None
    raw_dir = scratch_dir / "raw"
    raw_dir.mkdir(parents=True, exist_ok=True)
    units = [unit for unit in list_units(task.stage, task.config) if isinstance(unit, TarUnit)]
    own = {unit.tar_path for unit in task.shard.take(units)}
    for unit in units:
        if not unit.tar_path.is_file():
            continue
        place = raw_dir / unit.tar_path.name
        place.unlink(missing_ok=True)
        if unit.tar_path in own and not unit.output_path.exists():
            shutil.copyfile(unit.tar_path, place)
        else:
            place.symlink_to(unit.tar_path)
    return ["--set", f"paths.raw_dir={raw_dir}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Become the stage."""
    task = read_task(sys.argv[1:] if argv is None else argv, os.environ)
    command = build_command(task, os.environ)
    if task.stage.unit == TAR and os.environ.get("COPY_TARS_TO_TMPDIR") == "1" and "--tar-file" not in task.options:
        command += copy_tars(task, Path(os.environ["SLURM_TMPDIR"]))
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    if cores:
        os.environ.setdefault("OMP_NUM_THREADS", str(min(int(cores), count_cores())))
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    cli.run_guarded(main)
