"""What a study leaves for people: the best settings as a TOML fragment, a table and plots of the trials."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import PipelineError
from pipeline.files import writing
from pipeline.log import logger
from train_specialized_embeddings.tuning.search_space import SPACE

_NUM_LISTED = 5


def write_report(folder: Path, study: optuna.Study) -> list[Path]:
    """Write best.toml, trials.csv and trials.png, and log the best trials; return the paths.

    Raises PipelineError where no trial is complete.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    ranked = sorted((trial for trial in trials if trial.state == TrialState.COMPLETE), key=_value, reverse=True)
    if not ranked:
        raise PipelineError(f"{folder}: no trial was complete: train with the settings as they are and read the log")
    paths = [folder / name for name in ("best.toml", "trials.csv", "trials.png")]
    for path, content in zip(paths, (_render_toml(ranked), _render_csv(trials), _plot(trials, ranked)), strict=True):
        with writing.writing_to(path) as temporary:
            temporary.write_bytes(content)
    for trial in ranked[:_NUM_LISTED]:
        logger.info("trial %4d: validation mAP %.4f: %s", trial.number, _value(trial), _describe(trial.params))
    logger.info("to train with the best of them: train.py --set %s", paths[0])
    return paths


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


def _plot(trials: list[FrozenTrial], ranked: list[FrozenTrial]) -> bytes:
    """Draw the trials in their order, their epochs, and the mAP over each setting."""
    from matplotlib.figure import Figure

    num_columns = 4
    figure = Figure(figsize=(16, 3.2 * -(-(len(SPACE) + 2) // num_columns)))
    axes = iter(figure.subplots(-(-(len(SPACE) + 2) // num_columns), num_columns).flat)
    order = sorted(ranked, key=lambda trial: trial.number)
    best = [max(_value(trial) for trial in order[: place + 1]) for place in range(len(order))]
    axis = next(axes)
    axis.plot([trial.number for trial in order], [_value(trial) for trial in order], ".", color="tab:blue")
    axis.step([trial.number for trial in order], best, where="post", color="tab:orange")
    axis.set(title="validation mAP, and the best so far", xlabel="trial")
    axis = next(axes)
    for trial in trials:
        epochs = sorted(trial.intermediate_values)
        colour = "tab:blue" if trial.state == TrialState.COMPLETE else "lightgray"
        axis.plot(epochs, [trial.intermediate_values[epoch] for epoch in epochs], color=colour, linewidth=0.6)
    axis.set(title="validation mAP (gray: pruned)", xlabel="epoch")
    for (name, dimension), axis in zip(SPACE.items(), axes, strict=False):  # noqa: PLW2901
        values = [trial.params[name] for trial in ranked]
        axis.scatter(
            [str(value) for value in values] if dimension.words else values, [_value(trial) for trial in ranked], s=9
        )
        axis.set_title(name)
        if dimension.log:
            axis.set_xscale("log")
    for axis in axes:
        axis.set_axis_off()
    for axis in figure.axes:
        axis.ticklabel_format(axis="y", useOffset=False)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.05, top=0.96, wspace=0.25, hspace=0.45)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    return picture.getvalue()
