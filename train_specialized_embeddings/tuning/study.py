"""Run an Optuna study of stage 6's settings."""

import csv
import itertools
import json
import os
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from pipeline import workspace
from pipeline.cli import StageResult
from pipeline.config import Config
from pipeline.errors import HeldError, InputError, PipelineError, one_line
from pipeline.files import tables
from pipeline.log import Stopwatch, logger
from pipeline.retrieval.checkpoint import save_checkpoint
from train_specialized_embeddings.training.fitting import read_material, training_within_memory
from train_specialized_embeddings.training.metric_sinks import sending_metrics
from train_specialized_embeddings.training.training_run import Material, TrainingRun
from train_specialized_embeddings.tuning import search_space
from train_specialized_embeddings.tuning.search_space import SPACE

JOURNAL = "journal.log"
# A trial is pruned where its score is below the median of the others at the same epoch; the first trials and the first
# epochs are not.
_FREE_TRIALS, _FREE_EPOCHS = 10, 3
# Settings that killed their workers so often, by their memory perhaps, are tried no more.
_MAX_RETRIES = 2
# What Optuna, or what follows, makes of a journal that somebody has edited.
_DAMAGE = ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError


@dataclass(frozen=True)
class Tuning:
    config: Config
    options: Any  # TuneOptions
    inputs: dict[str, Path]
    provenance: dict[str, Any]
    folder: Path

    def open_study(self) -> optuna.Study:
        """Open the study, or create it; while no trial has the configured settings, one with these is to come.

        Raises StaleOutputError where it was made from other inputs, or from other settings that the trials do not
        choose, InputError where its journal is damaged.
        """
        path = self.folder / JOURNAL
        os.close(workspace.open_file(path, os.O_RDWR | os.O_CREAT))  # Optuna would follow a link
        lock = JournalFileSymlinkLock(str(path))
        lock.acquire()
        try:
            content = path.read_bytes()
            if (end := content.rfind(b"\n") + 1) not in (0, len(content)):  # half a line, which a full disk has left
                os.truncate(path, end)
        finally:
            lock.release()
        try:
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
                study_name="stage6", direction="maximize", load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(_FREE_TRIALS, _FREE_EPOCHS),
                # Without a seed: workers that start together on several machines must not try the same.
                sampler=optuna.samplers.TPESampler(n_startup_trials=_FREE_TRIALS, constant_liar=True),
            )  # fmt: skip
            trials = study.get_trials(deepcopy=False)
            sum(trial.value or 0.0 for trial in trials)  # a score that is no number
            for name, kind in itertools.chain(*(trial.distributions.items() for trial in trials)):
                optuna.distributions.check_distribution_compatibility(SPACE[name], kind)
            made_from = self.provenance | {
                "settings": {key: value for key, value in self.provenance["settings"].items() if key not in SPACE}
            }
            if found := study.user_attrs.get("provenance"):
                tables.matches(path, found, made_from)
            else:
                study.set_user_attr("provenance", made_from)
            self._retry_killed(study)
            configured = search_space.list_configured(self.config)
            tried = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
            if len(list_finished(study)) < self.options.num_trials and not any(
                trial.system_attrs.get("fixed_params", trial.params) == configured for trial in tried
            ):
                study.enqueue_trial(configured)
        except _DAMAGE as error:
            raise InputError(f"{path}: damaged ({one_line(error)[:200]}): remove it, or give --overwrite") from None
        return study

    def run_trials(self, study: optuna.Study, watch: Stopwatch) -> None:
        """Run trials until the study has enough; W workers at once may run W - 1 more."""
        with training_within_memory(self.config):
            material = read_material(self.config, self.inputs, self.provenance, watch)
        while len(list_finished(study)) < self.options.num_trials:
            self._retry_killed(study)
            # Another worker takes a trial back that is not locked yet; this one then asks for the next.
            try:
                trial = study.ask(SPACE)
            except optuna.exceptions.UpdateFinishedTrialError:
                continue
            with suppress(HeldError), self._holding(trial.number):
                if study.trials[trial.number].state == TrialState.RUNNING:
                    self._run_trial(study, trial, material, watch)

    def _run_trial(self, study: optuna.Study, trial: optuna.Trial, material: Material, watch: Stopwatch) -> None:
        """Run a trial, and tell the study what came of it; one that is interrupted is to be tried again."""
        try:
            outcome: dict[str, Any] = {"values": self._train(trial, material, watch)}
        except optuna.TrialPruned:
            outcome = {"state": TrialState.PRUNED}
        except PipelineError as error:
            logger.warning("trial %d failed: %s", trial.number, error)
            outcome = {"state": TrialState.FAIL}
        except KeyboardInterrupt:
            _retry(study, study.trials[trial.number])
            raise
        told = study.tell(trial, **outcome)
        value, num_finished = "" if told.value is None else f" {told.value:.4f}", len(list_finished(study))
        logger.info("trial %d: %s%s; %d finished", told.number, told.state.name.lower(), value, num_finished)

    def _train(self, trial: optuna.Trial, material: Material, watch: Stopwatch) -> float:
        """Train with the trial's settings, an epoch at a time, and return its score.

        Raises PipelineError where training diverges or the GPU cannot hold it, TrialPruned where other trials were
        better.
        """
        config, objective = search_space.apply(self.config, trial.params), self.options.objective
        provenance = self.provenance | {"settings": self.provenance["settings"] | trial.params, "trial": trial.number}
        folder = self.folder / f"trial_{trial.number:04d}"
        with training_within_memory(config), sending_metrics(config.logging, folder, provenance) as send:
            run = TrainingRun(config, material, watch, provenance)
            for record in run.run_epochs(f"trial {trial.number}"):
                send(record)
                if record["epoch"] and record["val"]:
                    trial.report(record["val"][objective], record["epoch"])
                if trial.should_prune():
                    raise optuna.TrialPruned
            run.settle()
        if self.options.save_checkpoints:
            save_checkpoint(folder / "checkpoint_best.pt", run.best)
        return float(run.best["metrics"]["val"]["projector"][objective])

    def _holding(self, number: int) -> AbstractContextManager[None]:
        return workspace.locked(self.folder, f"runs trial {number}", self.folder / f".trial_{number:04d}.lock")

    def _retry_killed(self, study: optuna.Study) -> None:
        """Take back the trials of workers that have died, as their locks are free."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            with suppress(HeldError), self._holding(trial.number):
                if study.trials[trial.number].state == TrialState.RUNNING:
                    logger.warning("trial %d: its worker was killed: tried again", trial.number)
                    _retry(study, trial, num_killed=1)


def _retry(study: optuna.Study, trial: FrozenTrial, num_killed: int = 0) -> None:
    """End a trial that was stopped; another one with its settings is to come, which counts in its place."""
    study.tell(trial.number, state=TrialState.FAIL)
    num_killed += trial.user_attrs.get("num_killed", 0)
    if num_killed <= _MAX_RETRIES:
        settings = trial.system_attrs.get("fixed_params", {}) | trial.params
        study.enqueue_trial(settings, user_attrs={"retry_of": trial.number, "num_killed": num_killed})


def run_study(tuning: Tuning) -> StageResult:
    """Run the remaining trials and write the report; an overwritten study stays until a trial is complete.

    Raises StaleOutputError where the study had other inputs or settings, PipelineError where no trial was complete.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options, folder = tuning.options, tuning.folder
    with workspace.replacing(folder, [folder / JOURNAL] if options.overwrite else []):
        study, result = tuning.open_study(), StageResult("tune")
        has_work = len(list_finished(study)) < options.num_trials
        if has_work:
            tuning.run_trials(study, result.watch)
        else:
            logger.info("tune: the study has its %d trials; a larger --trials goes on", options.num_trials)
        paths = write_report(folder, study, options.objective, search_space.list_configured(tuning.config))
    (result.written if has_work else result.kept).extend(paths)
    states = [trial.state for trial in list_finished(study)]
    done, pruned = states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)
    result.add({"in": len(states), "out": done, "dropped": pruned, "rejected": len(states) - done - pruned})
    return result


def list_finished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the finished trials, without those that were stopped and tried again."""
    trials = study.get_trials(deepcopy=False)
    retried = [trial.user_attrs.get("retry_of") for trial in trials]
    return [trial for trial in trials if trial.state.is_finished() and trial.number not in retried]


def write_report(folder: Path, study: optuna.Study, objective: str, configured: dict[str, Any]) -> list[Path]:
    """Write best.toml, which also has the score of the `configured` settings, and trials.csv; return the paths.

    Raises PipelineError where no trial is complete.
    """
    paths, trials = [folder / "best.toml", folder / "trials.csv"], list_finished(study)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        raise PipelineError(f"{folder}: no trial was complete: train with the settings as they are and read the log")
    with workspace.writing_to(paths[0]) as temporary:
        temporary.write_text(_render_toml(complete, objective, configured), encoding="utf-8")
    rows = [
        [
            trial.number, trial.state.name.lower(), trial.value, max(trial.intermediate_values, default=0),
            f"{trial.duration.total_seconds() if trial.duration else 0.0:.1f}", *map(trial.params.get, SPACE),
        ]
        for trial in trials
    ]  # fmt: skip
    with workspace.writing_to(paths[1]) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        header = ["trial", "state", "score", "epochs", "seconds", *SPACE]
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    logger.info("to train with the best of %d trials: train.py --set %s", len(complete), paths[0])
    return paths


def _render_toml(complete: list[FrozenTrial], objective: str, configured: dict[str, Any]) -> str:
    best = max(complete, key=lambda trial: trial.values[0])
    run = best.user_attrs.get("wandb_run")
    # A line break in a run's name must not end the comment.
    name = f"Trial {best.number}" if run is None else f"Run {json.dumps(run)}"
    lines = [f"# {name}, the best of {len(complete)} complete ones: validation {objective} {best.values[0]:.4f}"]
    if own := [trial.values[0] for trial in complete if trial.params == configured]:
        lines[0] += f"; the settings as configured: {max(own):.4f}"
    else:
        lines.append("# No complete trial has the settings as configured: they may be better.")
        logger.warning("best.toml: no complete trial has the settings as configured: they may be better")
    for section, names in itertools.groupby(SPACE, lambda name: name.partition(".")[0]):
        values = {name.partition(".")[2]: best.params[name] for name in names if name in best.params}
        lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"
