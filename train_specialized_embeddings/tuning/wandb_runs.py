"""Read the runs of a Weights & Biases project as trials of a study."""

from collections.abc import Iterator
from typing import Any

import optuna

from pipeline.cli import StageResult
from pipeline.errors import PipelineError, one_line
from pipeline.log import logger
from train_specialized_embeddings.training.metric_sinks import require_package
from train_specialized_embeddings.tuning.search_space import SPACE, holds, list_configured
from train_specialized_embeddings.tuning.study import Tuning, write_report


def report_runs(tuning: Tuning, project: str) -> StageResult:
    """Write the report on a project's finished runs of these splits and settings; the result counts the runs.

    Raises PipelineError where wandb is missing, the project cannot be read, or it has no such run.
    """
    runs = list(_read_runs(project, tuning.options.objective))
    study, configured = optuna.create_study(direction="maximize"), list_configured(tuning.config)
    # A score on another split, or with other settings that the trials do not choose, is no better or worse.
    wanted = tuning.provenance["settings"] | {"split_hash": tuning.provenance["split_hash"]}
    fixed = wanted.keys() - {*SPACE, "objective"}
    for name, config, scores in runs:
        settings = {key: config[key] for key in SPACE if key in config and holds(key, config[key])}
        if (
            scores
            and settings.keys() == SPACE.keys()
            and all(config.get(key, wanted[key]) == wanted[key] for key in fixed)
        ):
            study.add_trial(optuna.trial.create_trial(
                params=settings, distributions=SPACE, value=max(scores.values()), intermediate_values=scores,
                user_attrs={"wandb_run": name},
            ))  # fmt: skip
    trials = study.get_trials(deepcopy=False)
    where = f"--from-wandb-project {project}"
    logger.info("%s: %d of %d finished runs have these splits and settings", where, len(trials), len(runs))
    if not trials:
        raise PipelineError(
            f"{where}: none of its {len(runs)} finished runs is of stage 6 with these splits and settings: correct the "
            "name, or search with --trials and [logging].wandb"
        )
    paths = write_report(tuning.folder / "wandb", study, tuning.options.objective, configured)
    result = StageResult("tune", written=paths)
    result.add({"in": len(runs), "out": len(trials), "dropped": len(runs) - len(trials)})
    return result


def _read_runs(project: str, objective: str) -> Iterator[tuple[str, dict[str, Any], dict[int, float]]]:
    """Yield the name, the settings, and the validation score by epoch of each finished run."""
    require_package("wandb", "--from-wandb-project", "search with --trials")
    import wandb

    keys = ["epoch", f"val/{objective}"]
    try:
        for run in wandb.Api().runs(project, filters={"state": "finished"}):
            rows = [[row[key] for key in keys] for row in run.scan_history(keys=keys)]
            scores = {int(epoch): float(score) for epoch, score in rows if float(score) <= 1.0}  # no NaN
            yield str(run.name), dict(run.config), scores
    except (wandb.Error, ValueError, OSError) as error:
        raise PipelineError(
            f"--from-wandb-project {project}: cannot be read ({one_line(error)[:200]}): give ENTITY/PROJECT, and run "
            "`wandb login` once"
        ) from None
