"""Tune stage 6: search its settings for the best validation mAP with Optuna, by one worker or many.

    python train_specialized_embeddings/tune.py --config config.toml --trials 200

Reads what stage 6 reads. Writes to checkpoint_dir/_tune the study (journal.log), trials.csv and best.toml, which every
stage takes by --set .../best.toml; nothing else in checkpoint_dir is touched.
A rerun goes on until the study has --trials finished trials; the same command started several times, on one machine
or on several that share the folder, works on one study. Needs Optuna: pip install 'spatial-building-embeddings[tune]'.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.files.units import Unit
from pipeline.retrieval.scores import SCORE_KEYS
from pipeline.stages import TUNE
from pipeline.workspace import naming_failures
from train_specialized_embeddings.train import describe_run, list_inputs
from train_specialized_embeddings.training.metric_sinks import require_package

STAGE = "tune"


@dataclass(frozen=True)
class TuneOptions:
    num_trials: int = 100
    objective: str = "map"
    sample_buildings: int | None = None  # of the training split; None is as configured
    save_checkpoints: bool = False
    from_wandb_project: str | None = None
    overwrite: bool = False


def list_units(config: Config) -> list[Unit]:
    return [Unit(STAGE, TUNE.list_outputs(config))]


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
    if options.sample_buildings is not None:
        training = config.training.model_copy(update={"sample_buildings": options.sample_buildings})
        config = config.model_copy(update={"training": training})
    inputs = list_inputs(config)
    provenance = describe_run(config, inputs) | {"stage": STAGE}
    provenance["settings"]["objective"] = options.objective
    from train_specialized_embeddings.tuning.study import JOURNAL, Tuning, run_study  # torch and Optuna
    from train_specialized_embeddings.tuning.wandb_runs import report_runs

    tuning = Tuning(config, options, inputs, provenance, config.path("checkpoint_dir") / "_tune")
    if options.from_wandb_project is not None:
        return report_runs(tuning, options.from_wandb_project)
    with naming_failures(tuning.folder / JOURNAL):  # Optuna's errors name no file
        try:
            return run_study(tuning)
        except (OSError, RuntimeError) as error:
            found: BaseException | None = error  # Optuna's file lock may hide an interruption behind its own error
            while found is not None and not isinstance(found, KeyboardInterrupt):
                found = found.__context__
            raise found or error  # noqa: B904


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--trials", type=cli.whole_number, default=100, dest="num_trials", metavar="N",
        help="finished trials in all (default: 100)")  # fmt: skip
    add("--objective", choices=SCORE_KEYS, default="map", help="the validation score to maximise (default: map)")
    add("--sample-buildings", type=cli.whole_number, metavar="N",
        help="train the trials on N buildings, drawn from [global].seed")  # fmt: skip
    add("--from-wandb-project", metavar="[ENTITY/]PROJECT",
        help="run no trial: write _tune/wandb/best.toml from the project's finished runs")  # fmt: skip
    add("--save-checkpoints", action="store_true", help="keep _tune/trial_N/checkpoint_best.pt")
    arguments = parser.parse_args(argv)
    options = cli.options_from(arguments, TuneOptions)
    cli.run_stage(
        STAGE, lambda config, _: run(config, options), cli.config_from(arguments), cli.options_from(arguments)
    )


if __name__ == "__main__":
    cli.run_guarded(main)
