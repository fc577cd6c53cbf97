"""Submit the pipeline, or one stage of it, to SLURM: what is neither done nor in the queue, with its dependencies.

    slurm/submit_pipeline.sh --account A [--config C] [--from-stage N] [--to-stage N] [--array-size N] [--dry-run]
    slurm/submit_stage.sh STAGE --account A [--config C] [--shards LIST] [--array-size N] [--dry-run] [-- OPTIONS]
    slurm/submit_stage.sh tune --account A [--config C] [--array-size WORKERS] [--dry-run] [-- --trials N]

Prints the job ids and keeps them in log_dir/submissions. Options that are not known here go to sbatch, for every job;
what follows -- goes to the stage. $SBATCH_OPTIONS and, for stage N, $SBATCH_OPTIONS_N go to sbatch too (for tune,
$SBATCH_OPTIONS_tune).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.files.units import TarUnit
from pipeline.inference.model_files import locate_backbone
from pipeline.stages import STAGES, TAR, TUNE, Stage, check_paths, choose_stages, find_stage, has_new_data
from slurm.control import records, scheduler
from slurm.control.plan import Cut, Plan, make_plan
from slurm.control.shards import parse_shards
from slurm.control.submission import Request, Target, carry_out, find_active
from slurm.control.work import list_units


def count(text: str) -> int:
    """Read a whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def shard_list(text: str) -> list[int]:
    """Read shard numbers as in 0-3,7."""
    try:
        return parse_shards(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def stage_label(text: str) -> Stage:
    """Read the number of a stage, or tune."""
    try:
        return find_stage(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every submission."""
    add = parser.add_argument
    add("--account", metavar="A", help="account that pays (default: $SBATCH_ACCOUNT, else the cluster's own default)")
    add(
        "--array-size",
        type=count,
        metavar="N",
        help="shards of an array (per-tar stages: one a tar, 64 at most; else 1)",
    )
    add("--max-concurrent", type=count, metavar="N", help="tasks of an array that run at a time (all)")
    add("--venv-path", metavar="VENV", help="environment that this and the jobs run in (the project's .venv)")
    add("--dry-run", action="store_true", help="print every sbatch command and submit nothing")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Return the options, what goes to sbatch, and what goes to the stage.

    Raises ConfigError where they are wrong.
    """
    own, _, stage_options = _split(list(argv))
    parser = cli.make_parser(__doc__ or "")
    add_common_options(parser)
    kind = own.pop(0) if own and own[0] in ("pipeline", "stage") else "pipeline"
    parser.set_defaults(kind=kind)
    # For the pipeline too: sbatch would take it for --test-only, and submit nothing.
    parser.add_argument("--test", action="store_true", help="a stage's first tar only (stages 1, 2, 4)")
    if kind == "stage":
        parser.add_argument("stage", type=stage_label, metavar="STAGE", help="number of the stage, or tune")
        parser.add_argument("--shards", type=shard_list, metavar="LIST", help="these shards only, as in 0-3,7")
    else:
        parser.add_argument("--from-stage", type=int, default=1, choices=range(1, 10), metavar="N", help="first (1)")
        parser.add_argument("--to-stage", type=int, default=9, choices=range(1, 10), metavar="N", help="last (9)")
        parser.add_argument("--anchor-shards", type=count, metavar="N", help="shards of stage 5's array (1)")
        if stage_options:
            raise ConfigError("-- OPTIONS: they go to one stage: give them to submit_stage.sh")
    arguments, sbatch_options = parser.parse_known_args(own)
    if arguments.overwrite:
        raise ConfigError(
            "--overwrite: a task that is requeued would begin anew each time: remove the outputs of the stage instead"
        )
    if arguments.test:
        _check_test(arguments)
    if kind == "stage":
        arguments.from_stage = arguments.to_stage = arguments.stage.number
        arguments.anchor_shards = arguments.array_size
    elif arguments.from_stage > arguments.to_stage:
        raise ConfigError(f"--from-stage {arguments.from_stage} lies behind --to-stage {arguments.to_stage}")
    return arguments, sbatch_options, stage_options


def _check_test(arguments: argparse.Namespace) -> None:
    if arguments.kind == "pipeline" or arguments.stage.unit != TAR:
        raise ConfigError("--test: one tar is for what works tar by tar: give it to submit_stage.sh 1, 2 or 4")
    if arguments.shards or arguments.array_size:
        raise ConfigError("--test: one tar is one shard: leave out --shards and --array-size")
    arguments.array_size = 1


def _split(argv: list[str]) -> tuple[list[str], bool, list[str]]:
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], "--" in argv, argv[place + 1 :]


def check_weights(plan: Plan, config: Config) -> None:
    """Raise InputError where a job needs the backbone and it is neither a folder nor in the hub's cache."""
    if any(job.stage.number in (2, 7) for job in plan.jobs) and locate_backbone(config, download=False) is None:
        raise InputError(
            f"{config.embedding_model.model_name}: the backbone is not on this machine, and jobs run offline: run "
            f"slurm/prepare.sh --config {config.file_path}"
        )


def run(arguments: argparse.Namespace, sbatch_options: list[str], stage_options: list[str]) -> None:
    """Plan and submit.

    Raises PipelineError where SLURM is missing or refuses a job.
    """
    config = cli.config_from(arguments)
    first, last = arguments.from_stage, arguments.to_stage
    check_paths(config, choose_stages(config, first, last) or [TUNE])
    if arguments.kind == "stage" and first == 8 and not has_new_data(config):
        raise ConfigError(f"{config.file_path}: [new_data].input and output: both are needed to embed new data")
    target = Target(config.log_dir, config, arguments.overrides)
    if arguments.test:
        tars = [unit.tar_path for unit in list_units(arguments.stage, config) if isinstance(unit, TarUnit)]
        stage_options = [*stage_options, "--tar-file", str(tars[0])]
    request = Request(
        arguments.account, arguments.max_concurrent, arguments.dry_run, tuple(sbatch_options), tuple(stage_options)
    )
    cut = Cut(arguments.array_size, arguments.anchor_shards, scheduler.read_max_array_size())
    only = getattr(arguments, "shards", None)
    if arguments.dry_run:
        plan = plan_now(target, config, first, last, cut, only)
        tell_notes(plan)
        carry_out(plan, target, request)
        return
    if scheduler.list_queued() is None:
        raise PipelineError("squeue does not answer here: submit on a login node of the cluster, or give --dry-run")
    with records.holding(target.log_dir):
        plan = plan_now(target, config, first, last, cut, only)
        check_weights(plan, config)
        tell_notes(plan)
        submitted = carry_out(plan, target, request)
    print(records.format_table(submitted) if submitted else "nothing to submit")


def plan_now(target: Target, config: Config, first: int, last: int, cut: Cut, only: list[int] | None) -> Plan:
    """Plan with what is in the queue now."""
    known = [stage for stage in (*STAGES.values(), TUNE) if _has_output(target, stage)]
    active = find_active(target, known, records.read_records(target.log_dir))
    return make_plan(config, first, last, cut, active, only)


def _has_output(target: Target, stage: Stage) -> bool:
    """Whether the configuration says where the stage writes; those outside the range need not be set."""
    try:
        target.output(stage)
    except ConfigError:
        return False
    return stage.number != 8 or has_new_data(target.config) if target.config else True


def tell_notes(plan: Plan) -> None:
    """Say on stderr what is left alone, and why."""
    for note in plan.notes:
        print(note, file=sys.stderr)
    for job_id, shards in plan.replaced.items():
        print(f"job {job_id}, shards {shards}: cancelled and submitted anew behind what is retried", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Submit from a command line."""
    run(*parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    cli.run_guarded(main)
