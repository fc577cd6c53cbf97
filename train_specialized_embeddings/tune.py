"""Tune stage 6: search its settings for the best validation mAP with Optuna, by one worker or many.

    python train_specialized_embeddings/tune.py --config config.toml --trials 200 --workers 2

Reads what stage 6 reads. Writes to checkpoint_dir/_tune the study (journal.log or study.db), trials.csv, plots
and best.toml, which every stage takes by --set .../best.toml; nothing else in checkpoint_dir is touched.
A rerun goes on until the study has --trials finished trials; the same command started several times, on one machine
or on several that share the folder, works on one study. Needs Optuna: pip install 'spatial-building-embeddings[tune]'.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.files.units import Unit
from pipeline.stages import TUNE
from train_specialized_embeddings.train import describe_run, list_inputs
from train_specialized_embeddings.training.metric_sinks import require_package

STAGE = "tune"


@dataclass(frozen=True)
class TuneOptions:
    """What the command line asks for."""

    num_trials: int = 100
    num_workers: int = 1
    storage: str = "journal"
    study_name: str = "stage6"
    overwrite: bool = False
    sample_buildings: int | None = None  # of the training split; None is all


def list_units(config: Config) -> list[Unit]:
    """Return the one unit: the study."""
    return [Unit(STAGE, TUNE.list_outputs(config), leftover=config.path("checkpoint_dir") / "_tune")]


def run(config: Config, options: TuneOptions) -> cli.StageResult:
    """Search until the study has all its trials.

    The result counts trials: complete ones as out, pruned ones as dropped, failed ones as rejected.
    Raises ConfigError where [training].init_checkpoint is set, PipelineError where Optuna is missing or no trial was
    complete, StaleOutputError where the study was made from other inputs or settings, InputError where an input cannot
    be trained on.
    """
    require_package("optuna", "tune.py", "train with the settings as they are", extra="tune")
    if config.training.init_checkpoint is not None:
        raise ConfigError(
            f"{config.file_path}: [training].init_checkpoint: the trials choose the architecture: leave it out"
        )
    inputs = list_inputs(config)
    provenance = describe_run(config, inputs)
    if options.sample_buildings is not None:
        provenance["settings"]["sample_buildings"] = options.sample_buildings
    from train_specialized_embeddings.tuning.study import run_study  # torch and Optuna

    return run_study(config, options, inputs, provenance, config.path("checkpoint_dir") / "_tune")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the search from a command line."""
    parser = cli.make_parser(__doc__)
    names = [field.name for field in fields(TuneOptions)]
    parser.set_defaults(**{name: getattr(TuneOptions, name) for name in names})
    parser.add_argument(
        "--trials", type=_count, dest="num_trials", metavar="N", help="finished trials in all (default: 100)"
    )
    parser.add_argument(
        "--workers", type=_count, dest="num_workers", metavar="N", help="processes at once (default: 1)"
    )
    parser.add_argument(
        "--storage", type=_storage, metavar="{journal,sqlite,URL}",
        help="how the study is kept; sqlite not on a network file system; URL: a database as Optuna takes it, such as\n"
        "postgresql://host/name (default: journal)",
    )  # fmt: skip
    parser.add_argument("--study-name", metavar="NAME", help="which study of the storage (default: stage6)")
    parser.add_argument(
        "--sample-buildings", type=_count, metavar="N", help="train the trials on N buildings, drawn from [global].seed"
    )
    arguments = parser.parse_args(argv)
    options = TuneOptions(**{name: getattr(arguments, name) for name in names})
    config = cli.config_from(arguments)
    cli.run_stage(STAGE, lambda config, _: run(config, options), config, cli.options_from(arguments))


def _storage(text: str) -> str:
    if text not in ("journal", "sqlite") and "://" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} must be journal, sqlite or a database's URL")
    return text


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 on")
    return int(text)


if __name__ == "__main__":
    cli.run_guarded(main)
