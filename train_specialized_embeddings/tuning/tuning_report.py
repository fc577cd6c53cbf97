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
from train_specialized_embeddings.tuning.search_space import SPACE

_NUM_LISTED = 5
_PLOTS = {"history.png": "optimization_history", "epochs.png": "intermediate_values", "settings.png": "slice"}


def write_report(folder: Path, study: optuna.Study) -> list[Path]:
    """Write best.toml, trials.csv and the plots, and log the best trials; return the paths.

    Raises PipelineError where no trial is complete.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    ranked = sorted((trial for trial in trials if trial.state == TrialState.COMPLETE), key=_value, reverse=True)
    if not ranked:
        raise PipelineError(f"{folder}: no trial was complete: train with the settings as they are and read the log")
    contents = {"best.toml": _render_toml(ranked), "trials.csv": _render_csv(trials)}
    contents |= {name: _plot(study, kind) for name, kind in _PLOTS.items()}
    for name, content in contents.items():
        with workspace.writing_to(folder / name) as temporary:
            temporary.write_bytes(content)
    for trial in ranked[:_NUM_LISTED]:
        logger.info("trial %4d: validation mAP %.4f: %s", trial.number, _value(trial), _describe(trial.params))
    logger.info("to train with the best of them: train.py --set %s", folder / "best.toml")
    return [folder / name for name in contents]


def _value(trial: FrozenTrial) -> float:
    return float(trial.values[0])


def _describe(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.partition('.')[2]} {value:.3g}" if isinstance(value, float) else f"{name.partition('.')[2]} {value}"
        for name, value in settings.items()
    )


def _render_toml(ranked: list[FrozenTrial]) -> bytes:
    best = ranked[0]
    lines = [f"# Trial {best.number}, the best of {len(ranked)} complete ones: validation mAP {_value(best):.4f}"]
    first = min(ranked, key=lambda trial: trial.number)
    if first.system_attrs.get("fixed_params", {}).keys() == SPACE.keys():
        lines[0] += f"; the settings as configured: {_value(first):.4f}"
    for section in dict.fromkeys(name.partition(".")[0] for name in SPACE):
        lines += ["", f"[{section}]"]
        lines += [
            f"{name.partition('.')[2]} = {json.dumps(value)}"
            for name, value in best.params.items()
            if name.startswith(section + ".")
        ]
    return ("\n".join(lines) + "\n").encode()


def _render_csv(trials: list[FrozenTrial]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "map", "epochs", "seconds", *SPACE])
    for trial in trials:
        seconds = trial.duration.total_seconds() if trial.duration else 0.0
        value = trial.value if trial.value is not None else ""
        epochs = max(trial.intermediate_values, default=0)
        settings = [trial.params.get(name, "") for name in SPACE]
        writer.writerow([trial.number, trial.state.name.lower(), value, epochs, f"{seconds:.1f}", *settings])
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
