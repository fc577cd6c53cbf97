"""Submit stage 8 alone, for somebody who has packaged images and a published model and no configuration.

    publish_model/slurm/submit_embeddings_from_parquet.sh --account A --input PARQUET --output OUTPUT --model-id ID \\
        --batch-size 32 [--array-size N] [--dry-run]

Fetches the model first, because compute nodes may have no internet. Submits the row groups that are not done; logs and
job ids are kept in OUTPUT/_logs. --limit, --read-batch-size, --dtype, --device, --max-reject-fraction and
--no-filter-valid go to the stage, other options that are not known here to sbatch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.errors import InputError, PipelineError
from pipeline.inference.model_files import locate_hub_model
from publish_model.new_data.embed_options import DEFAULT_MODEL_ID
from slurm.control import records, scheduler
from slurm.control.completeness import UnitState, check_dataset, shards_done
from slurm.control.outputs import READ_BATCH_SIZE, dataset_dir, list_row_group_units
from slurm.control.plan import Cut, Plan, PlannedJob, count_shards
from slurm.control.stages import STAGES
from slurm.control.submission import Request, Target, carry_out, find_active
from slurm.control.submit import add_common_options, count

STAGE = STAGES[8]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and what goes to sbatch."""
    parser = cli.make_parser(__doc__ or "", config=False)
    add_common_options(parser)
    add = parser.add_argument
    add("--input", "-i", type=Path, required=True, metavar="PARQUET", help="packaged images: image_bytes, OSMID")
    add("--output", "-o", type=Path, required=True, metavar="OUTPUT", help="dataset directory to write or resume")
    add(
        "--model-id", default=os.environ.get("MODEL_ID") or DEFAULT_MODEL_ID, metavar="ID",
        help=f"published model: hub id or folder (default: $MODEL_ID, else {DEFAULT_MODEL_ID})",
    )  # fmt: skip
    add("--batch-size", type=count, default=32, metavar="N", help="images in one pass at most (32)")
    add("--read-batch-size", type=count, default=READ_BATCH_SIZE, metavar="N", help="rows of a part (1000)")
    for name in ("--limit", "--dtype", "--device", "--max-reject-fraction"):
        add(name, help="as the stage has it")
    add("--no-filter-valid", action="store_true", help="as the stage has it")
    return parser.parse_known_args(list(argv))


def list_stage_options(arguments: argparse.Namespace, model: str) -> list[str]:
    """Return the stage's command line, with absolute paths: a job runs in another folder."""
    options = ["--input", str(arguments.input.resolve()), "--output", str(arguments.output.resolve())]
    options += ["--model-id", model, "--batch-size", str(arguments.batch_size)]
    options += ["--read-batch-size", str(arguments.read_batch_size)]
    for name in ("limit", "dtype", "device", "max_reject_fraction"):
        value = getattr(arguments, name)
        options += [f"--{name.replace('_', '-')}", value] if value is not None else []
    return options + (["--no-filter-valid"] if arguments.no_filter_valid else [])


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


def make_plan(arguments: argparse.Namespace, target: Target) -> Plan:
    """Plan one array over the row groups that are neither done nor in the queue.

    Raises StaleOutputError where the dataset was begun from another input.
    """
    active = find_active(target, [STAGE], records.read_records(target.log_dir)).get(8, [])
    cut = Cut(arguments.array_size, None, scheduler.read_max_array_size())
    if arguments.dry_run and not arguments.input.exists():
        shard_count = count_shards(STAGE, None, cut, active)
        return Plan([PlannedJob(STAGE, list(range(shard_count)), shard_count)])
    units = list_row_group_units(arguments.input, target.dataset_output or arguments.output, arguments.read_batch_size)
    check_dataset(arguments.input, arguments.output)
    shard_count = count_shards(STAGE, len(units), cut, active)
    done = shards_done([UnitState(unit.is_there()) for unit in units], shard_count, 1.0)
    taken = {task.shard for task in active}
    # With a limit the part that it cuts may be there and not whole: the stage looks into it.
    todo = [shard for shard in range(shard_count) if shard not in taken and (arguments.limit or not done[shard])]
    plan = Plan([PlannedJob(STAGE, todo, shard_count)] if todo else [])
    plan.notes.append(f"of {shard_count} shards: {sum(done)} done, {len(taken)} in the queue, {len(todo)} to submit")
    return plan


def run(arguments: argparse.Namespace, sbatch_options: list[str]) -> None:
    """Fetch the model and submit.

    Raises PipelineError where SLURM is missing or refuses the job.
    """
    model = locate_model(arguments.model_id, download=not arguments.dry_run)
    output = dataset_dir(arguments.output.resolve())
    options = list_stage_options(arguments, model)
    target = Target(output / "_logs", dataset_options=options, dataset_output=output)
    request = Request(arguments.account, arguments.max_concurrent, arguments.dry_run, tuple(sbatch_options))
    if arguments.dry_run:
        carry_out(make_plan(arguments, target), target, request)
        return
    list_row_group_units(arguments.input, output)  # a mistyped path leaves no folder behind
    if scheduler.list_queued() is None:
        raise PipelineError("squeue does not answer here: submit on a login node of the cluster, or give --dry-run")
    with records.holding(target.log_dir):
        plan = make_plan(arguments, target)
        for note in plan.notes:
            print(note, file=sys.stderr)
        submitted = carry_out(plan, target, request)
    print(records.format_table(submitted) if submitted else "nothing to submit")


def main(argv: Sequence[str] | None = None) -> None:
    """Submit from a command line."""
    run(*parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    cli.run_guarded(main)
