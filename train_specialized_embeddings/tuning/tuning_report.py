"""Write the results of a study: the best settings as a TOML fragment, and a table of the trials."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import PipelineError
from pipeline.files import workspace
from pipeline.log import logger
from train_specialized_embeddings.tuning.search_space import SPACE


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
    with workspace.writing_to(paths[1]) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "score", "epochs", "seconds", *SPACE])
        for trial in trials:
            seconds = trial.duration.total_seconds() if trial.duration else 0.0
            epochs = max(trial.intermediate_values, default=0)
            row = [trial.number, trial.state.name.lower(), trial.value, epochs, f"{seconds:.1f}"]
            writer.writerow([*row, *map(trial.params.get, SPACE)])
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
