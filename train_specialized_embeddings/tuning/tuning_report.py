"""Write the results of a study: the best settings as a TOML fragment, a table and plots of the trials."""

import csv
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import PipelineError
from pipeline.files import workspace
from pipeline.log import logger
from train_specialized_embeddings.tuning.search_space import SPACE, holds

_NUM_LISTED = 5
_PLOTS = {"history.png": "optimization_history", "epochs.png": "intermediate_values", "settings.png": "slice"}


def list_finished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the finished trials, without those that were stopped and tried again."""
    trials = study.get_trials(deepcopy=False)
    retried = [trial.user_attrs.get("retry_of") for trial in trials]
    return [trial for trial in trials if trial.state.is_finished() and trial.number not in retried]


def write_report(folder: Path, study: optuna.Study, objective: str) -> list[Path]:
    """Write best.toml, trials.csv and the plots, and log the best trials; return the paths.

    Raises PipelineError where no trial is complete.
    """
    trials = list_finished(study)
    ranked = sorted((trial for trial in trials if trial.state == TrialState.COMPLETE), key=_value, reverse=True)
    if not ranked:
        raise PipelineError(f"{folder}: no trial was complete: train with the settings as they are and read the log")
    contents = {"best.toml": _render_toml(ranked, objective), "trials.csv": _render_csv(trials)}
    contents |= {name: _plot(study, kind) for name, kind in _PLOTS.items()}
    for name, content in contents.items():
        with workspace.writing_to(folder / name) as temporary:
            temporary.write_bytes(content)
    for trial in ranked[:_NUM_LISTED]:
        settings = ", ".join(f"{key} {value}" for key, value in list_settings(trial).items())
        logger.info("trial %4d: validation %s %.4f: %s", trial.number, objective, _value(trial), settings)
    logger.info("to train with the best of them: train.py --set %s", folder / "best.toml")
    return [folder / name for name in contents]


def _value(trial: FrozenTrial) -> float:
    return float(trial.values[0])


def list_settings(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial's settings; names and values outside the space, which others may have written, are left out."""
    return {name: trial.params[name] for name in SPACE if name in trial.params and holds(name, trial.params[name])}


def _render_toml(ranked: list[FrozenTrial], objective: str) -> bytes:
    best = ranked[0]
    run = best.user_attrs.get("wandb_run")
    name = (
        f"Trial {best.number}" if run is None else f"Run {json.dumps(run)}"
    )  # a line break in it must not end the comment
    lines = [f"# {name}, the best of {len(ranked)} complete ones: validation {objective} {_value(best):.4f}"]
    configured = [trial for trial in ranked if trial.user_attrs.get("is_configured")]
    if configured:
        lines[0] += f"; the settings as configured: {_value(configured[0]):.4f}"
    else:
        lines.append("# No complete trial has the settings as configured: they may be better.")
        logger.warning("best.toml: no complete trial has the settings as configured: they may be better")
    settings = list_settings(best)
    for section in dict.fromkeys(name.partition(".")[0] for name in SPACE):
        own = {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(section + ".")}
        lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in own.items())]
    return ("\n".join(lines) + "\n").encode()


def _render_csv(trials: list[FrozenTrial]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "score", "epochs", "seconds", *SPACE])
    for trial in trials:
        seconds = trial.duration.total_seconds() if trial.duration else 0.0
        value = trial.value if trial.value is not None else ""
        epochs = max(trial.intermediate_values, default=0)
        settings = list_settings(trial)
        row = [trial.number, trial.state.name.lower(), value, epochs, f"{seconds:.1f}"]
        writer.writerow([*row, *(settings.get(name, "") for name in SPACE)])
    return text.getvalue().encode()


def _plot(study: optuna.Study, kind: str) -> bytes:
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls these plots experimental
        drawn = getattr(optuna.visualization.matplotlib, f"plot_{kind}")(study)
    figure = np.atleast_1d(drawn)[0].figure
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80, bbox_inches="tight")
    pyplot.close(figure)
    return picture.getvalue()
