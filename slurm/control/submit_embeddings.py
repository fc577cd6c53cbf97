"""Submit stage 8 alone, for somebody who has packaged images and a published model and no configuration.

    publish_model/slurm/submit_embeddings_from_parquet.sh --account A --input PARQUET --output OUTPUT --model-id ID \\
        --batch-size 32 [--array-size N] [--dry-run]

Fetches the model first, because compute nodes may have no internet. Submits the row groups that are not done; logs and
job ids are kept in OUTPUT/_logs. Every option of the stage is taken and goes to it, what is not known here goes to
sbatch.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.embeddings_dataset.dataset import resolve_dataset_dir
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.inference.model_files import locate_hub_model
from pipeline.stages import STAGES
from publish_model.generate_embeddings_from_parquet import list_row_groups
from publish_model.new_data.embed_options import EmbedOptions, add_options, check_places, open_input
from slurm.control import records, scheduler
from slurm.control.plan import Cut, Plan, PlannedJob, count_shards
from slurm.control.submission import Request, Target, carry_out, find_active
from slurm.control.submit import add_common_options
from slurm.control.work import find_done

STAGE = STAGES[8]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, EmbedOptions, list[str]]:
    """Return the options of the submission, those of the stage, and what goes to sbatch.

    Raises ConfigError where they are wrong.
    """
    parser = cli.make_parser(__doc__ or "", config=False)
    add_common_options(parser)
    own = set(vars(parser.parse_args([])))
    add_options(parser)
    arguments, sbatch_options = parser.parse_known_args(list(argv))
    options = EmbedOptions(**{name: value for name, value in vars(arguments).items() if name not in own})
    if options.overwrite:
        raise ConfigError("--overwrite: a task that is requeued would begin anew each time: remove OUTPUT instead")
    if not options.shard.is_whole:
        raise ConfigError("--shard: the tasks of the array are the shards: give --array-size N")
    check_places(options.input, options.output)
    return arguments, options, sbatch_options


def list_stage_options(options: EmbedOptions, model: str) -> list[str]:
    """Return the stage's command line, with absolute paths, because a job runs in another folder."""
    words = ["--input", str(options.input.resolve()), "--output", str(options.output.resolve()), "--model-id", model]
    for field in fields(EmbedOptions):
        value = getattr(options, field.name)
        if field.name in ("input", "output", "model_id") or value == field.default:
            continue
        words.append("--no-filter-valid" if field.name == "filter_valid" else f"--{field.name.replace('_', '-')}")
        if not isinstance(value, bool):
            words.append(",".join(value) if isinstance(value, tuple) else str(value))
    return words


def locate_model(model_id: str, *, download: bool) -> str:
    """Return what a job is to load: a folder's full path, or the hub id once the model is in the cache.

    Raises InputError where the model cannot be had.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1:
        raise InputError(f"{folder}: no such model folder: give --model-id a folder that stage 7 wrote, or a hub id")
    if download:
        locate_hub_model(model_id, download=True)
    return model_id


def make_plan(arguments: argparse.Namespace, options: EmbedOptions, target: Target) -> Plan:
    """Plan one array over the row groups that are neither done nor in the queue.

    Raises StaleOutputError where the dataset was begun from another input.
    """
    active = find_active(target, [STAGE], records.read_records(target.log_dir)).get(8, [])
    cut = Cut(arguments.array_size, None, scheduler.read_max_array_size())
    if arguments.dry_run and not options.input.exists():
        shard_count = count_shards(STAGE, None, cut, active)
        return Plan([PlannedJob(STAGE, list(range(shard_count)), shard_count)])
    units = list_row_groups(options)
    shard_count = count_shards(STAGE, len(units), cut, active)
    done = find_done(STAGE, units, shard_count, 1.0)
    taken = {task.shard for task in active}
    # With a limit the part that it cuts may be there and not whole: the stage looks into it.
    todo = [shard for shard in range(shard_count) if shard not in taken and (options.limit or not done[shard])]
    plan = Plan([PlannedJob(STAGE, todo, shard_count)] if todo else [])
    plan.notes.append(f"of {shard_count} shards: {sum(done)} done, {len(taken)} in the queue, {len(todo)} to submit")
    return plan


def run(arguments: argparse.Namespace, options: EmbedOptions, sbatch_options: list[str]) -> None:
    """Fetch the model and submit.

    Raises PipelineError where SLURM is missing or refuses the job.
    """
    model = locate_model(options.model_id, download=not arguments.dry_run)
    output = resolve_dataset_dir(options.output.resolve())
    target = Target(output / "_logs", dataset_options=list_stage_options(options, model), dataset_output=output)
    request = Request(arguments.account, arguments.max_concurrent, arguments.dry_run, tuple(sbatch_options))
    if arguments.dry_run:
        carry_out(make_plan(arguments, options, target), target, request)
        return
    open_input(options)  # a mistyped path leaves no folder behind
    if scheduler.list_queued() is None:
        raise PipelineError("squeue does not answer here: submit on a login node of the cluster, or give --dry-run")
    with records.holding(target.log_dir):
        plan = make_plan(arguments, options, target)
        for note in plan.notes:
            print(note, file=sys.stderr)
        submitted = carry_out(plan, target, request)
    print(records.format_table(submitted) if submitted else "nothing to submit")


def main(argv: Sequence[str] | None = None) -> None:
    """Submit from a command line."""
    run(*parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    cli.run_guarded(main)
