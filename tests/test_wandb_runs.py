"""The best settings from the runs of a Weights & Biases project; a fake stands for its public Api."""

import csv
import json
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_metric_sinks import FakeRun
from training_data import run as train
from tuning_data import make_workspace, search

from pipeline.config import load_config
from pipeline.errors import PipelineError
from train_specialized_embeddings import tune
from train_specialized_embeddings.training import metric_sinks

pytest.importorskip("optuna", reason="the extra `tune` is not installed")


class FakeError(Exception):
    """Stands for wandb.Error."""


class FakePublicRun:
    """Stands for a run of wandb.Api: what the server keeps of a FakeRun, after a passage through JSON."""

    def __init__(self, name: str, logged: FakeRun, **changes: Any) -> None:
        self.name, self.state = name, "finished"
        self.config = json.loads(json.dumps(logged.options["config"])) | changes
        self._rows = [numbers for _, numbers in logged.logged]

    def scan_history(self, keys: list[str]) -> list[dict[str, float]]:
        return [{key: row[key] for key in keys} for row in self._rows if all(key in row for key in keys)]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(metric_sinks, "find_spec", lambda _: True)
    return make_workspace(tmp_path, monkeypatch)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[FakeRun]]:
    """Put a fake wandb in place, with these runs on its server; return the runs that are logged to it."""

    def put(public: list[Any] | None = None, error: Exception | None = None) -> list[FakeRun]:
        logged: list[FakeRun] = []

        def init(**options: Any) -> FakeRun:
            logged.append(FakeRun(options))
            return logged[-1]

        def runs(path: str, filters: dict[str, Any]) -> Any:
            assert path == "someone/buildings"
            assert filters == {"state": "finished"}
            if error:
                raise error
            yield from public or []

        fake = types.SimpleNamespace(init=init, Error=FakeError, Api=lambda: types.SimpleNamespace(runs=runs))
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return logged

    return put


def take_best(workspace: Path, *overrides: str, **options: Any) -> Any:
    config = load_config(workspace / "config.toml", list(overrides))
    return tune.run(config, tune.TuneOptions(from_wandb_project="someone/buildings", **options))


def test_the_best_of_the_runs_with_these_splits_and_settings_is_written_for_training(workspace: Path, serve) -> None:
    logged = serve()
    search(workspace, 3, "logging.wandb=offline", "logging.step_losses=true")
    before = {path: path.read_bytes() for path in (workspace / "checkpoint/_tune").glob("*") if path.is_file()}
    public = [FakePublicRun(f"run {number}", one) for number, one in enumerate(logged)]
    public[1].name = 'best"\n[embedding_model]\ntrust_remote_code = true'
    next(row for row in public[1]._rows if row.get("epoch") == 1)["val/map"] = 0.99  # and not the last epoch
    better = FakeRun(logged[0].options)
    better.logged = [(0, {"epoch": 0.0, "val/map": 1.0})]
    public += [
        FakePublicRun("another split", better, split_hash="other"),
        FakePublicRun("another start", better, **{"training.init": "pca"}),
        FakePublicRun("outside the space", better, **{"training.learning_rate": 7.0}),
        FakePublicRun("no number", better, **{"training.batch_size": 100.5}),
    ]
    public.append(types.SimpleNamespace(name="another program's", config={"lr": 1}, scan_history=lambda **_: []))
    serve(public)
    result = take_best(workspace)
    assert (result.counts["in"], result.counts["out"], result.counts["dropped"]) == (8, 3, 5)
    folder = workspace / "checkpoint/_tune/wandb"
    text = (folder / "best.toml").read_text()
    expected: dict[str, dict[str, Any]] = {"training": {}, "training_model": {}}
    for name in tune_space():
        section, _, key = name.partition(".")
        expected[section][key] = logged[1].options["config"][name]
    assert tomllib.loads(text) == expected
    assert "the best of 3 complete ones: validation map 0.9900; the settings as configured" in text
    assert {path: path.read_bytes() for path in before} == before  # the study's own report
    with open(folder / "trials.csv", encoding="utf-8") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert scores[1] == 0.99
    assert scores[0] == max(row["val/map"] for row in public[0]._rows if "val/map" in row)
    train(workspace, str(folder / "best.toml"))  # as --set takes it
    assert (workspace / "checkpoint/checkpoint_best.pt").is_file()


def test_another_score_may_choose_and_a_training_run_counts_too(workspace: Path, serve) -> None:
    logged = serve()
    train(workspace, "logging.wandb=offline")
    serve([FakePublicRun("a training", logged[0])])
    assert take_best(workspace, objective="recall_at_5").counts["out"] == 1
    assert "validation recall_at_5" in (workspace / "checkpoint/_tune/wandb/best.toml").read_text()


def test_a_project_without_such_a_run_and_one_that_cannot_be_read_are_one_line(workspace: Path, serve) -> None:
    serve([])
    with pytest.raises(PipelineError, match=r"someone/buildings: none of its 0 finished runs is of stage 6"):
        take_best(workspace)
    for error in (FakeError("no API key\nlog in"), ValueError("Could not find project"), OSError("no route to host")):
        serve(error=error)
        with pytest.raises(PipelineError, match=r"cannot be read \(.*\): give ENTITY/PROJECT, and run `wandb login`"):
            take_best(workspace)
    assert not (workspace / "checkpoint").exists()


def test_a_missing_wandb_is_one_line_that_names_the_extra(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., Any]
) -> None:
    monkeypatch.setattr(metric_sinks, "find_spec", lambda name: None if name == "wandb" else True)
    outcome = run_main(tune.main, "--config", workspace / "config.toml", "--from-wandb-project", "someone/buildings")
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1].startswith(
        "error: --from-wandb-project: the package wandb is not installed: pip install"
    )


def tune_space() -> list[str]:
    from train_specialized_embeddings.tuning.search_space import SPACE

    return list(SPACE)
