"""Trials whose workers are stopped or killed, and the configured settings, which have to be among the finished ones."""

import logging
from pathlib import Path
from typing import Any

import pytest
from tuning_data import make_workspace, read_trials, search

from pipeline.config import load_config
from pipeline.errors import PipelineError, Terminated
from pipeline.workspace import locked

optuna = pytest.importorskip("optuna", reason="the extra `tune` is not installed")

from train_specialized_embeddings.tuning import search_space  # noqa: E402
from train_specialized_embeddings.tuning.search_space import SPACE  # noqa: E402
from train_specialized_embeddings.tuning.study import Tuning  # noqa: E402


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with splits, a difficulty table and a configuration whose settings lie in a space of small trials."""
    return make_workspace(tmp_path, monkeypatch)


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def stop_first(monkeypatch: pytest.MonkeyPatch, error: type[BaseException], times: int = 1) -> list[dict[str, Any]]:
    """Let the first trials end in an error, and return the settings of all, as they come."""
    real, tried = Tuning._train, []

    def train(self: Tuning, trial: Any, *rest: Any) -> float:
        tried.append(dict(trial.params))
        if len(tried) <= times:
            raise error("stopped")
        return real(self, trial, *rest)

    monkeypatch.setattr(Tuning, "_train", train)
    return tried


@pytest.mark.parametrize("error", [KilledError, KeyboardInterrupt, Terminated])
def test_a_trial_whose_worker_was_stopped_is_tried_again_and_counts_once(
    workspace: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = stop_first(monkeypatch, error)
    with pytest.raises(error):
        search(workspace, 2)
    result = search(workspace, 2)
    assert tried[0] == tried[1] == search_space.list_configured(load_config(workspace / "config.toml"))
    assert (result.counts["in"], result.counts["out"], result.counts["rejected"]) == (2, 2, 0)
    rows = read_trials(workspace)
    assert [row["state"] for row in rows] == ["complete", "complete"]
    assert "the settings as configured: " in (workspace / "checkpoint/_tune/best.toml").read_text()


def test_an_interruption_that_the_journals_lock_hides_behind_an_error_is_still_one(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hide(*_: Any) -> None:
        try:
            raise Terminated
        finally:
            raise FileNotFoundError(2, "No such file or directory", "journal.log.lock")

    monkeypatch.setattr(Tuning, "open_study", hide)
    with pytest.raises(Terminated):
        search(workspace, 1)


def test_settings_that_kill_their_workers_again_and_again_are_given_up(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = stop_first(monkeypatch, KilledError, times=3)
    for _ in range(3):
        with pytest.raises(KilledError):
            search(workspace, 2)
    assert search(workspace, 2).counts["rejected"] == 1
    assert tried[0] == tried[1] == tried[2]


def test_a_live_workers_trial_is_left_to_it(workspace: Path) -> None:
    search(workspace, 1)
    folder = workspace / "checkpoint/_tune"
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "journal.log")))
    study = optuna.load_study(study_name="stage6", storage=storage)
    trial = study.ask(SPACE)
    with locked(folder, "runs trial 1", folder / ".trial_0001.lock"):
        assert search(workspace, 2).counts["in"] == 2
        assert study.trials[trial.number].state == optuna.trial.TrialState.RUNNING
    search(workspace, 3)
    assert study.trials[trial.number].state == optuna.trial.TrialState.FAIL


def test_the_configured_settings_are_tried_again_and_missed_in_the_report_while_no_trial_has_them(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = stop_first(monkeypatch, PipelineError)
    with caplog.at_level(logging.WARNING, logger="spatial_building_embeddings"):
        assert search(workspace, 2).counts["rejected"] == 1
    assert "best.toml: no complete trial has the settings as configured" in caplog.text
    best = workspace / "checkpoint/_tune/best.toml"
    assert "No complete trial has the settings as configured" in best.read_text()
    search(workspace, 3)
    assert tried[2] == tried[0] != tried[1]
    assert "the settings as configured: " in best.read_text()
