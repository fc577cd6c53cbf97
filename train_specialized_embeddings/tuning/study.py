"""Run an Optuna study of stage 6's settings."""

import multiprocessing
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
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
from train_specialized_embeddings.training.fitting import read_material, training_within_memory
from train_specialized_embeddings.training.training_run import begin_run
from train_specialized_embeddings.tuning import search_space
from train_specialized_embeddings.tuning.search_space import SPACE
from train_specialized_embeddings.tuning.tuning_report import write_report

FILES = {"journal": "journal.log", "sqlite": "study.db"}
# A trial is pruned where its validation mAP is below the median of the others at the same epoch; the first trials and
# the first epochs are not.
_FREE_TRIALS, _FREE_EPOCHS = 10, 3
# Seconds that SQLite waits while another worker writes.
_LOCK_SECONDS = 60


def run_study(
    config: Config, options: Any, inputs: dict[str, Path], provenance: dict[str, Any], folder: Path
) -> StageResult:
    """Run the remaining trials and write the report; an overwritten study stays until a trial is complete.

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
        study = open_study(config, options, folder, provenance)
        has_work = _count_finished(study) < options.num_trials
        result = StageResult("tune")
        if has_work:
            _run_workers(study, (config, options, inputs, provenance, folder), result.watch)
        else:
            logger.info("tune: the study has its %d trials; a larger --trials goes on", options.num_trials)
        paths = write_report(folder, study)
    (result.written if has_work else result.kept).extend(paths)
    states = [trial.state for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    done, pruned = states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)
    result.add({"in": len(states), "out": done, "dropped": pruned, "rejected": len(states) - done - pruned})
    return result


def open_study(config: Config, options: Any, folder: Path, provenance: dict[str, Any]) -> optuna.Study:
    """Open the study, or create it with a first trial of the configured settings.

    Raises StaleOutputError where it was made from other inputs, or from other settings that the trials do not choose.
    """
    study = optuna.create_study(
        storage=_open_storage(options.storage, folder), study_name=options.study_name, direction="maximize",
        load_if_exists=True, pruner=optuna.pruners.MedianPruner(_FREE_TRIALS, _FREE_EPOCHS),
    )  # fmt: skip
    # Without a seed: workers that start together on several machines must not try the same.
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=_FREE_TRIALS, constant_liar=True)
    fixed = {key: value for key, value in provenance["settings"].items() if key not in SPACE}
    made_from = provenance | {"stage": "tune", "settings": fixed}
    if "provenance" in study.user_attrs:
        tables.matches(
            folder / FILES.get(options.storage, options.study_name), study.user_attrs["provenance"], made_from
        )
    else:
        study.set_user_attr("provenance", made_from)
        study.enqueue_trial(search_space.list_configured(config), skip_if_exists=True)
    return study


def _open_storage(storage: str, folder: Path) -> Any:
    """Open a file in the folder, or the database of a URL, which may hold a password and is not shown."""
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


def _run_workers(study: optuna.Study, work: tuple[Any, ...], watch: Stopwatch) -> None:
    """Run trials in this process and in more of them, until the study has enough."""
    start = multiprocessing.get_context("spawn").Process  # a fork would copy locks without their threads
    options = work[1]
    workers = [start(target=_run_worker, args=(*work, number), daemon=True) for number in range(1, options.num_workers)]
    for worker in workers:
        worker.start()
    _run_trials(study, work, watch, 0)
    for worker in workers:
        worker.join()


def _run_worker(*arguments: Any) -> None:
    """Run trials in a process of its own."""
    *work, number = arguments
    config, options, _, provenance, folder = work
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with logging_to(config.log_dir / f"tune.{number}.log", config.logging.level):
        study = open_study(config, options, folder, provenance)
        _run_trials(study, tuple(work), Stopwatch(), number)


def _run_trials(study: optuna.Study, work: tuple[Any, ...], watch: Stopwatch, number: int) -> None:
    """Run trials until the study has enough; with W workers it may get W - 1 more.

    Workers share the GPUs, each with its part of the memory, so that a large trial fails and not its neighbour.
    """
    config, options, inputs, provenance, _ = work
    if config.infrastructure.device != "cpu":
        share_gpus(number, options.num_workers)
    with training_within_memory(config):
        objective = Objective(config, inputs, provenance, watch, options.sample_buildings)
    parent = multiprocessing.parent_process()
    while _count_finished(study) < options.num_trials and (parent is None or parent.is_alive()):
        trial = study.ask(SPACE)
        try:
            outcome: dict[str, Any] = {"values": objective(trial)}
        except optuna.TrialPruned:
            outcome = {"state": TrialState.PRUNED}
        except PipelineError as error:
            logger.warning("trial %d failed: %s", trial.number, error)
            outcome = {"state": TrialState.FAIL}
        _log_trial(study, study.tell(trial, **outcome))


def _log_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    values = [other.values[0] for other in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    found = "" if trial.value is None else f" {trial.value:.4f}"
    best = f"{max(values):.4f}" if values else "none yet"
    logger.info("trial %d: %s%s; %d finished, best %s", trial.number, trial.state.name.lower(), found,
                _count_finished(study), best)  # fmt: skip


def _count_finished(study: optuna.Study) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


class Objective:
    """The best validation mAP of a trial's settings; the data and the start are read and fitted once for all trials."""

    def __init__(
        self,
        config: Config,
        inputs: dict[str, Path],
        provenance: dict[str, Any],
        watch: Stopwatch,
        sample_buildings: int | None,
    ) -> None:
        self.config, self.watch = config, watch
        self.material = read_material(config, inputs, provenance, watch, num_buildings=sample_buildings)

    def __call__(self, trial: optuna.Trial) -> float:
        """Train with the trial's settings, an epoch at a time.

        Raises PipelineError where training diverges or the GPU cannot hold it, TrialPruned where other trials were
        better.
        """
        config = search_space.apply(self.config, trial.params)
        interval = config.logging.progress_interval_seconds
        with training_within_memory(config):
            run = begin_run(config, self.material, self.watch, {})
            total = config.training.num_epochs * run.trainer.num_anchors
            with Progress(f"trial {trial.number}", total, "anchor", interval) as bar:
                for record in run.run_epochs(bar):
                    if record["epoch"]:
                        trial.report(record["val"]["map"], record["epoch"])
                    if trial.should_prune():
                        raise optuna.TrialPruned
            run.settle()
        return float(run.best["metrics"]["val"]["projector"]["map"])
