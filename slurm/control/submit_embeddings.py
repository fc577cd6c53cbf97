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
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.embeddings_dataset.packaged_input import open_input
from pipeline.errors import ConfigError, InputError
from pipeline.inference.model_files import DEFAULT_MODEL_ID, locate_hub_model
from pipeline.stages import STAGES
from publish_model.new_data.embed_options import EmbedOptions, add_options, check_places
from slurm.control.submission import Request, submit
from slurm.control.submit import add_common_options
from slurm.control.target import make_dataset_target


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, EmbedOptions, list[str]]:
    """Return the options of the submission, those of the stage, and the words that go to sbatch."""
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
    # Absolute paths, because a job runs in another folder.
    return arguments, replace(options, input=options.input.resolve(), output=options.output.resolve()), sbatch_options


def locate_model(model_id: str, *, download: bool) -> str:
    """Return what a job is to load: a folder's full path, or the hub id once the model is in the cache."""
    folder = Path(model_id).expanduser()
    if folder.is_dir() and model_id != DEFAULT_MODEL_ID:
        return str(folder.resolve())
    if model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1:
        raise InputError(f"{folder}: no such model folder: give --model-id a folder that stage 7 wrote, or a hub id")
    if download:
        locate_hub_model(model_id, download=True)
    return model_id


def run(arguments: argparse.Namespace, options: EmbedOptions, sbatch_options: list[str]) -> None:
    """Fetch the model and submit."""
    model_id = locate_model(options.model_id, download=not arguments.dry_run)
    if not arguments.dry_run:
        open_input(options)  # a mistyped path leaves no folder behind
    target = make_dataset_target(replace(options, model_id=model_id))
    submit(Request(target, [STAGES[8]], arguments, sbatch_options, []))


def main(argv: Sequence[str] | None = None) -> None:
    """Submit from a command line."""
    run(*parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    cli.run_guarded(main)
