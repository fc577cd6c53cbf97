"""Submit stage 8 alone, for somebody who has packaged images and a published model and no configuration.

    publish_model/slurm/submit_embeddings_from_parquet.sh --account A --input PARQUET --output OUTPUT --model-id ID \\
        --batch-size 32 [--array-size N] [--dry-run]

Fetches the model first, because compute nodes may have no internet. Submits the row groups that are not done; logs are
kept in OUTPUT/_logs. Every option of the stage is taken and goes to it, what is not known here goes to
sbatch.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import open_input
from pipeline.errors import ConfigError
from pipeline.reference.model_folder import locate_published
from pipeline.stages import STAGES
from publish_model.new_data.embed_options import EmbedOptions, add_options, check_places
from slurm.control.submission import Request, submit
from slurm.control.submit import add_common_options
from slurm.control.target import Target


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


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch the model and submit from a command line."""
    arguments, options, sbatch_options = parse(sys.argv[1:] if argv is None else argv)
    remedy = "give --model-id a folder that stage 7 wrote, or a hub id"
    folder = locate_published(options.model_id, remedy, download=not arguments.dry_run)
    if folder is not None and folder == Path(options.model_id).expanduser():
        options = replace(options, model_id=str(folder.resolve()))  # a job runs in another folder
    if not arguments.dry_run:
        open_input(options)  # a mistyped path leaves no folder behind
    target = Target(EmbeddingsDataset(options.output).folder.resolve() / "_logs", embedding=options)
    submit(Request(target, [STAGES[8]], arguments, sbatch_options, []))


if __name__ == "__main__":
    cli.run_guarded(main)
