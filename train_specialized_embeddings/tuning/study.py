"""An Optuna study of stage 6's settings: its storage, its trials, its workers."""

import multiprocessing
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from pipeline.cli import StageResult
from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.files import tables
from pipeline.files.workspace import replacing
from pipeline.inference.devices import share_gpus
from pipeline.log import Progress, Stopwatch, logger, logging_to
from train_specialized_embeddings.training.fitting import (
    make_run,
    read_material,
    store_coordinates,
    training_within_memory,
)
from train_specialized_embeddings.training.starts import fit_baselines
from train_specialized_embeddings.tuning import search_space
from train_specialized_embeddings.tuning.tuning_report import write_report

FILES = {"journal": "journal.log", "sqlite": "study.db"}
# A trial is given up where its validation mAP is below the median of the others at the same epoch; the first trials
# are not, nor the epochs of a warm-up.
_FREE_TRIALS, _FREE_EPOCHS = 10, 3
# How long SQLite waits while another worker writes.
_LOCK_SECONDS = 60


def run_study(
    config: Config, options: Any, inputs: dict[str, Path], provenance: dict[str, Any], folder: Path
) -> StageResult:
    """Run the trials that are left and write the report; a study that is overwritten stays until a trial is complete.

    Raises StaleOutputError where the study in `folder` had other inputs or settings, PipelineError where no trial was
    complete.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    earlier = [folder / name for name in FILES.values()] if options.overwrite else []
    if options.overwrite and options.storage not in FILES:
        earlier = []
        with suppress(KeyError):  # there is none
            optuna.delete_study(study_name=options.study_name, storage=_open_storage(options.storage, folder))
    with replacing(folder, earlier):
        return run_trials(config, options, inputs, provenance, folder)


def run_trials(
    config: Config, options: Any, inputs: dict[str, Path], provenance: dict[str, Any], folder: Path
) -> StageResult:
    """Run the trials that are left, this process being one of the workers, and write the report.

    Raises PipelineError where no trial was complete.
    """
    result = StageResult("tune")
    study = open_study(config, options, folder, provenance)
    if _count_finished(study) < options.num_trials:
        start = multiprocessing.get_context("spawn").Process  # fork would copy threads that are not there any more
        work = (config, options, inputs, provenance, folder)
        helpers = [start(target=_help, args=(*work, number), daemon=True) for number in range(1, options.num_workers)]
        for helper in helpers:
            helper.start()
        _work(study, config, inputs, options, result.watch, 0)
        for helper in helpers:
            helper.join()
        result.written += write_report(folder, study)
    else:
        logger.info("tune: the study has its %d trials; a larger --trials goes on", options.num_trials)
        result.kept += write_report(folder, study)
    states = [trial.state for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    done, pruned = states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)
    result.add({"in": len(states), "out": done, "dropped": pruned, "rejected": len(states) - done - pruned})
    return result


def open_study(config: Config, options: Any, folder: Path, provenance: dict[str, Any]) -> optuna.Study:
    """Open the study, or begin it with the settings as configured.

    Raises StaleOutputError where it was made from other inputs, or settings that the trials do not choose.
    """
    study = optuna.create_study(
        storage=_open_storage(options.storage, folder), study_name=options.study_name, direction="maximize",
        load_if_exists=True, pruner=optuna.pruners.MedianPruner(_FREE_TRIALS, _FREE_EPOCHS),
    )  # fmt: skip
    # Without a seed: workers that begin together on several machines must not try the same.
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=_FREE_TRIALS, constant_liar=True)
    fixed = {key: value for key, value in provenance["settings"].items() if key not in search_space.SPACE}
    made_from = provenance | {"stage": "tune", "settings": fixed}
    if "provenance" in study.user_attrs:
        tables.matches(
            folder / FILES.get(options.storage, options.study_name), study.user_attrs["provenance"], made_from
        )
    else:
        study.set_user_attr("provenance", made_from)
        study.enqueue_trial(search_space.configured(config), skip_if_exists=True)
    return study


def _open_storage(storage: str, folder: Path) -> Any:
    """Return a file in the folder as storage, or the database of a URL, which may hold a password and is not shown."""
    if storage == "journal":
        return optuna.storages.JournalStorage(JournalFileBackend(str(folder / FILES[storage])))
    if storage == "sqlite":
        engine = {"connect_args": {"timeout": _LOCK_SECONDS}}
        return optuna.storages.RDBStorage(f"sqlite:///{folder / FILES[storage]}", engine_kwargs=engine)
    try:
        return optuna.storages.RDBStorage(storage)
    except (ImportError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise PipelineError(
            f"--storage {storage.partition('://')[0]}://...: the database cannot be opened ({type(error).__name__}): "
            "install its driver, or correct the URL"
        ) from None


def _help(*work: Any) -> None:
    """Work on the study in a process of its own."""
    config, options, inputs, provenance, folder, number = work
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with logging_to(config.log_dir / f"tune.{number}.log", config.logging.level):
        study = open_study(config, options, folder, provenance)
        _work(study, config, inputs, options, Stopwatch(), number)


def _work(  # noqa: PLR0917
    study: optuna.Study, config: Config, inputs: dict[str, Path], options: Any, watch: Stopwatch, number: int
) -> None:
    """Run trials until the study has enough; with W workers it may get W - 1 more.

    Workers share the GPUs, each with its part of the memory, so that a large trial fails and not its neighbour.
    """
    if config.infrastructure.device != "cpu":
        share_gpus(number, options.num_workers)
    with training_within_memory(config):
        objective = Objective(config, inputs, watch, options.sample_buildings)
    parent = multiprocessing.parent_process()
    while _count_finished(study) < options.num_trials and (parent is None or parent.is_alive()):
        study.optimize(objective, n_trials=1, catch=(PipelineError,), callbacks=[_log_trial])


def _log_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    values = [other.values[0] for other in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    found = "" if trial.value is None else f" {trial.value:.4f}"
    best = f"{max(values):.4f}" if values else "none yet"
    logger.info("trial %d: %s%s; %d finished, best %s", trial.number, trial.state.name.lower(), found,
                _count_finished(study), best)  # fmt: skip


def _count_finished(study: optuna.Study) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


class Objective:
    """The best validation mAP that settings reach; what they share is read and fitted once."""

    def __init__(
        self, config: Config, inputs: dict[str, Path], watch: Stopwatch, sample_buildings: int | None = None
    ) -> None:
        self.config, self.watch = config, watch
        self.material = read_material(config, inputs, watch, sample_buildings)
        with watch.measure("start"):
            self.baselines = fit_baselines(
                self.material.train, self.material.validation, config.training_model, config.training,
                self.material.device,
            )  # fmt: skip
        self.store = store_coordinates(self.material, self.baselines.start)

    def __call__(self, trial: optuna.Trial) -> float:
        """Train with the trial's settings, an epoch at a time, and give up where the others were better.

        Raises PipelineError where training diverges or the GPU cannot hold it, TrialPruned where it is given up.
        """
        config = search_space.apply(self.config, search_space.suggest(trial))
        with training_within_memory(config):
            return self._train(config, trial)

    def _train(self, config: Config, trial: optuna.Trial) -> float:
        material, seed = self.material, config.global_.seed
        torch.manual_seed(seed)
        material.sampler.seed(seed)
        run = make_run(config, material, self.store, self.baselines, watch=self.watch)
        run.begin()
        interval = config.logging.progress_interval_seconds
        with Progress(
            f"trial {trial.number}", config.training.num_epochs * run.trainer.num_anchors, "anchor", interval
        ) as bar:
            while not run.is_over:
                run.advance(bar)
                trial.report(run.history[-1]["val"]["map"], run.epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
        run.settle()
        return float(run.best["metrics"]["val"]["projector"]["map"])
