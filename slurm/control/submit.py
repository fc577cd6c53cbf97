"""Submit the pipeline, or one stage of it, to SLURM: what is neither done nor in the queue, with its dependencies.

    slurm/submit_pipeline.sh --account A [--config C] [--from-stage N] [--to-stage N] [--array-size N] [--dry-run]
    slurm/submit_stage.sh STAGE --account A [--config C] [--array-size N] [--dry-run] [-- OPTIONS]
    slurm/submit_stage.sh tune --account A [--config C] [--array-size WORKERS] [--dry-run] [-- --trials N]
    publish_model/slurm/submit_embeddings_from_parquet.sh --account A --input PARQUET --output OUTPUT --model-id ID \\
        --batch-size 32 [--array-size N] [--dry-run]

Prints the job ids. The last one submits stage 8 for somebody without a configuration: it fetches the model first, takes
every option of the stage, and keeps the logs in OUTPUT/_logs. Options that are not known here go to sbatch, for every
job; what follows -- goes to the stage. $SBATCH_OPTIONS and, for stage N, $SBATCH_OPTIONS_N go to sbatch too (for tune,
$SBATCH_OPTIONS_tune).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import Config
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import open_input
from pipeline.errors import ConfigError
from pipeline.inference.model_files import locate_backbone
from pipeline.reference.model_folder import locate_published
from pipeline.stages import BY_LABEL, STAGES, TUNE, Stage, check_paths, choose_stages, has_new_data
from publish_model.new_data.embed_options import EmbedOptions, add_options, check_places
from slurm.control.submission import Request, submit
from slurm.control.target import Target


def add_common_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--account", metavar="A", help="account that pays (default: $SBATCH_ACCOUNT, else the cluster's own default)")
    add("--array-size", type=cli.whole_number, metavar="N",
        help="shards of an array (per-tar stages: one a tar, 64 at most; else 1)")  # fmt: skip
    add("--max-concurrent", type=cli.whole_number, metavar="N", help="tasks of an array that run at a time (all)")
    add("--venv-path", metavar="VENV", help="environment that this and the jobs run in (the project's .venv)")
    add("--dry-run", action="store_true", help="print every sbatch command and submit nothing")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Return the options, the words that go to sbatch, and those that go to the stage."""
    place = argv.index("--") if "--" in argv else len(argv)
    own, stage_options = list(argv[:place]), list(argv[place + 1 :])
    parser = cli.make_parser(__doc__ or "")
    add_common_options(parser)
    kind = own.pop(0) if own and own[0] in ("pipeline", "stage") else "pipeline"
    if kind == "stage":
        parser.add_argument("stage", choices=tuple(BY_LABEL), metavar="STAGE", help="number of the stage, or tune")
    else:
        parser.set_defaults(stage=None)
        parser.add_argument("--from-stage", type=int, default=1, choices=range(1, 10), metavar="N", help="first (1)")
        parser.add_argument("--to-stage", type=int, default=9, choices=range(1, 10), metavar="N", help="last (9)")
    arguments, sbatch_options = parser.parse_known_args(own)
    arguments.stage = BY_LABEL.get(arguments.stage)
    if kind == "pipeline" and stage_options:
        raise ConfigError("-- OPTIONS: they go to one stage: give them to submit_stage.sh")
    if arguments.overwrite:
        raise ConfigError(
            "--overwrite: a task that is requeued would begin anew each time: remove the outputs of the stage instead"
        )
    if kind == "pipeline" and arguments.from_stage > arguments.to_stage:
        raise ConfigError(f"--from-stage {arguments.from_stage} lies behind --to-stage {arguments.to_stage}")
    return arguments, sbatch_options, stage_options


def list_stages(config: Config, arguments: argparse.Namespace) -> list[Stage]:
    """Return the stages that were asked for; ConfigError names the paths that the configuration lacks."""
    stage: Stage | None = arguments.stage
    if stage == TUNE:
        check_paths(config, [TUNE])
        return [TUNE]
    first, last = (stage.number,) * 2 if stage else (arguments.from_stage, arguments.to_stage)
    if stage == STAGES[8] and not has_new_data(config):
        raise ConfigError(f"{config.file_path}: [new_data].input and output: both are needed to embed new data")
    return choose_stages(config, first, last)


def submit_embeddings(argv: Sequence[str]) -> None:
    """Fetch the published model and submit stage 8 alone."""
    parser = cli.make_parser(__doc__ or "", config=False)
    add_common_options(parser)
    add_options(parser)
    arguments, sbatch_options = parser.parse_known_args(list(argv))
    options = cli.options_from(arguments, EmbedOptions)
    if options.overwrite:
        raise ConfigError("--overwrite: a task that is requeued would begin anew each time: remove OUTPUT instead")
    if options.shard.count > 1:
        raise ConfigError("--shard: the tasks of the array are the shards: give --array-size N")
    check_places(options.input, options.output)
    # Absolute paths, because a job runs in another folder.
    options = replace(options, input=options.input.resolve(), output=options.output.resolve())
    located = locate_published(options.model_id, download=not arguments.dry_run)
    if located is not None and located.folder == Path(options.model_id).expanduser():
        options = replace(options, model_id=str(located.folder.resolve()))
    if not arguments.dry_run:
        open_input(options)  # a mistyped path leaves no folder behind
    target = Target(EmbeddingsDataset(options.output).folder.resolve() / "_logs", embedding=options)
    submit(Request(target, [STAGES[8]], arguments, sbatch_options, []))


def fetch_models(argv: Sequence[str]) -> None:
    parser = cli.make_parser(
        "Fetch the configured backbone, or named models, into the hub's cache, for jobs without internet.\n\n"
        "    slurm/prepare.sh [--config CONFIG] [--model-id ID ...] [--no-install]"
    )
    parser.add_argument(
        "--model-id", action="append", default=[], metavar="ID", dest="model_ids",
        help="fetch this hub model in place of the backbone; may be repeated",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if not arguments.model_ids:
        print(locate_backbone(cli.config_from(arguments), download=True))
    for name in arguments.model_ids:
        located = locate_published(name, download=True)
        print(located and located.folder)


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if other := {"embeddings": submit_embeddings, "fetch": fetch_models}.get(words[0] if words else ""):
        other(words[1:])
        return
    arguments, sbatch_options, stage_options = parse(words)
    config = cli.config_from(arguments)
    target = Target(config.log_dir, config, tuple(arguments.overrides))
    submit(Request(target, list_stages(config, arguments), arguments, sbatch_options, stage_options))


if __name__ == "__main__":
    cli.run_guarded(main)
