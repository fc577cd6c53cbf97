"""The tuning of stage 6: its study, what it leaves, and what it refuses."""

import json
import logging
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_metric_sinks import record_runs
from training_data import run as train
from tuning_data import SMALL_SPACE, make_workspace, read_trials, search

from pipeline.config import Config, load_config
from pipeline.errors import ConfigError, InputError, PipelineError, StaleOutputError
from pipeline.retrieval.checkpoint import load_checkpoint
from train_specialized_embeddings import tune
from train_specialized_embeddings.training import metric_sinks

optuna = pytest.importorskip("optuna", reason="the extra `tune` is not installed")

from train_specialized_embeddings.tuning import search_space  # noqa: E402
from train_specialized_embeddings.tuning.search_space import SPACE  # noqa: E402
from train_specialized_embeddings.tuning.study import Tuning  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ["best.toml", "trials.csv"]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with splits, a difficulty table and a configuration whose settings lie in a space of small trials."""
    return make_workspace(tmp_path, monkeypatch)


def test_a_study_may_train_on_a_sample_of_the_buildings_which_is_another_study(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="spatial_building_embeddings"):
        assert search(workspace, 1, sample_buildings=11).counts["out"] == 1
    assert re.search(r"training on \d+ images of 11 buildings", caplog.text)
    with pytest.raises(StaleOutputError, match="sample_buildings was 11 and is now 12"):
        search(workspace, 2, sample_buildings=12)


def test_a_search_leaves_its_best_settings_and_a_table_and_goes_on_when_asked_for_more(workspace: Path) -> None:
    result = search(workspace, 3)
    assert [path.name for path in result.written] == OUTPUTS
    assert (result.counts["in"], result.counts["out"]) == (3, 3)
    first = read_trials(workspace)
    assert [row["trial"] for row in first] == ["0", "1", "2"]
    assert set(SPACE) < set(first[0])
    best = max(first, key=lambda row: float(row["score"]))
    fragment = tomllib.loads((workspace / "checkpoint/_tune/best.toml").read_text())
    assert {f"{section}.{key}": str(value) for section, keys in fragment.items() for key, value in keys.items()} == {
        name: best[name] for name in SPACE
    }
    assert {path.name for path in (workspace / "checkpoint").iterdir()} == {"_tune"}
    kept = search(workspace, 3)
    assert (kept.written, len(kept.kept)) == ([], 2)
    assert search(workspace, 5).counts["in"] == 5
    assert read_trials(workspace)[:3] == first


def test_the_first_trial_has_the_configured_settings_and_its_value_is_that_of_training(workspace: Path) -> None:
    search(workspace, 1)
    row = read_trials(workspace)[0]
    assert {name: row[name] for name in SPACE} == {
        name: str(value) for name, value in search_space.list_configured(load_config(workspace / "config.toml")).items()
    }
    train(workspace)
    log = (workspace / "checkpoint/metrics.jsonl").read_text()
    assert float(row["score"]) == max(float(value) for value in re.findall(r'"map": ([\d.]+)', log))
    text = (workspace / "checkpoint/_tune/best.toml").read_text()
    assert f"the settings as configured: {float(row['score']):.4f}" in text


def test_training_takes_the_fragment(workspace: Path) -> None:
    search(workspace, 2)
    fragment = workspace / "checkpoint/_tune/best.toml"
    config = load_config(workspace / "config.toml", [str(fragment), "training.temperature=0.3"])
    for section, keys in tomllib.loads(fragment.read_text()).items():
        for key, value in keys.items():
            assert getattr(getattr(config, section), key) == (0.3 if key == "temperature" else value)
    assert config.training_model.output_dim == 8
    assert train(workspace, str(fragment)).written


def test_a_fragment_that_cannot_be_read_is_a_bad_command_line(workspace: Path) -> None:
    (workspace / "bad.toml").write_text("[training\n")
    for name, message in (("gone.toml", "cannot read the configuration"), ("bad.toml", "not valid TOML")):
        with pytest.raises(ConfigError, match=rf"--set .*{name}: {message}"):
            load_config(workspace / "config.toml", [str(workspace / name)])


def test_two_workers_share_one_study(workspace: Path) -> None:
    script = workspace / "tune_small.py"
    script.write_text(
        SMALL_SPACE + "from train_specialized_embeddings import tune\n"
        "if __name__ == '__main__':\n    tune.cli.run_guarded(tune.main)\n"
    )
    line = [sys.executable, "-W", "error", str(script), "--config", str(workspace / "config.toml"), "--trials", "4"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": workspace}
    for worker in [subprocess.Popen(line, **pipes) for _ in range(2)]:
        out, errors = worker.communicate()
        assert worker.returncode == 0, errors
        assert [Path(name).name for name in out.splitlines()] in (OUTPUTS, [])  # nothing left for one that comes late
    rows = read_trials(workspace)
    assert 4 <= len(rows) <= 5
    assert len({tuple(row[name] for name in SPACE) for row in rows}) == len(rows)


def test_a_trial_that_another_worker_takes_back_while_it_is_asked_for_is_followed_by_the_next(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, taken = optuna.Study.ask, []

    def ask_late(study: optuna.Study, *arguments: Any) -> optuna.Trial:
        if not taken:
            taken.append(study.ask.__name__)
            raise optuna.exceptions.UpdateFinishedTrialError("Trial#0 has already finished and can not be updated.")
        return ask(study, *arguments)

    monkeypatch.setattr(optuna.Study, "ask", ask_late)
    assert search(workspace, 1).counts["in"] == 1
    assert taken


def test_bad_trials_are_pruned_or_counted_as_failed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train_specialized_embeddings.tuning import study

    monkeypatch.setattr(study, "_FREE_TRIALS", 1)
    monkeypatch.setattr(study, "_FREE_EPOCHS", 0)
    real, runs = study.TrainingRun, []

    def begin(*arguments: Any, **named: Any) -> Any:
        runs.append(real(*arguments, **named))
        if len(runs) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if len(runs) > 2:
            for projector in (runs[-1].trainer.projector, runs[-1].trainer.average):
                projector.shortcut.weight.data.fill_(1.0)  # all images coincide
        return runs[-1]

    monkeypatch.setattr(study, "TrainingRun", begin)
    result = search(workspace, 4)
    assert (result.counts["in"], result.counts["rejected"], result.counts["dropped"]) == (4, 1, 2)
    assert [row["state"] for row in read_trials(workspace)] == ["complete", "fail", "pruned", "pruned"]


def test_a_gpu_too_small_for_what_the_trials_share_is_one_line(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train_specialized_embeddings.training import fitting

    def refuse(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fitting, "fit_start", refuse)
    with pytest.raises(PipelineError, match=r"the GPU cannot hold training with .*: end what else runs on it"):
        search(workspace, 1)


def test_a_study_of_other_inputs_or_settings_is_refused_but_not_for_what_the_trials_choose(workspace: Path) -> None:
    search(workspace, 1)
    assert search(workspace, 1, "training.temperature=0.4", "training_model.hidden_dim=12").kept
    with pytest.raises(StaleOutputError, match=r"journal.log: .*training.num_epochs was 2 and is now 3.*--overwrite"):
        search(workspace, 1, "training.num_epochs=3")
    assert search(workspace, 1, "training.num_epochs=3", overwrite=True).written


# A trial whose score is text.
TEXT_SCORE = b"""{"op_code": 0, "worker_id": "w", "study_name": "stage6", "directions": [2]}
{"op_code": 4, "worker_id": "w", "study_id": 0, "datetime_start": "2026-01-01T00:00:00"}
{"op_code": 6, "worker_id": "w", "trial_id": 0, "state": 1, "values": ["x"], "datetime_complete": "2026-01-01T00:00:00"}
"""
# What else somebody may write of a trial.
EDITS: list[dict[str, Any]] = [
    {
        "op_code": 5, "param_name": "training.loss", "param_value_internal": 0,
        "distribution": json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": ["x"]}}),
    },
    {"op_code": 8, "user_attr": {"num_killed": "x"}},
    {"op_code": 6, "state": 1, "values": [10**400]},
]  # fmt: skip
BEGUN = TEXT_SCORE.split(b'{"op_code": 6')[0]
EDITED = [BEGUN + json.dumps({"worker_id": "w", "trial_id": 0, **one}).encode() + b"\n" for one in EDITS]
JOURNALS = [b"\xff\n", b"[1]\n", b'{"op_code": 0}\n', b'{"a":' * 100_000, TEXT_SCORE, *EDITED]


@pytest.mark.parametrize("content", JOURNALS)
def test_a_journal_that_is_none_is_one_line(workspace: Path, content: bytes) -> None:
    (workspace / "checkpoint/_tune").mkdir(parents=True)
    (workspace / "checkpoint/_tune/journal.log").write_bytes(content)
    with pytest.raises(InputError, match=r"journal\.log: damaged"):
        search(workspace, 1)


def test_half_a_line_that_a_full_disk_leaves_in_the_journal_does_not_end_the_study(workspace: Path) -> None:
    journal = workspace / "checkpoint/_tune/journal.log"
    search(workspace, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 100, limits[1]))
    try:
        with pytest.raises(PipelineError, match=r"cannot write .*journal\.log \(File too large\): free space"):
            search(workspace, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not journal.read_bytes().endswith(b"\n")
    search(workspace, 2)
    assert len(read_trials(workspace)) == 2
    assert all(json.loads(line) for line in journal.read_text().splitlines())


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to, lambda path, _: os.mkfifo(path)])
def test_no_study_is_written_through_a_link(workspace: Path, make: Callable[..., None]) -> None:
    (workspace / "checkpoint/_tune").mkdir(parents=True)
    (workspace / "notes").write_text("mine")
    make(workspace / "checkpoint/_tune/journal.log", workspace / "notes")
    with pytest.raises(PipelineError, match="a link or pipe"):
        search(workspace, 1)
    assert (workspace / "notes").read_text() == "mine"


def test_a_link_that_takes_the_studys_place_is_not_written_through(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mine, run_trials = workspace / "checkpoint" / "_tune", workspace / "mine", Tuning.run_trials
    mine.mkdir()

    def swap(*arguments: Any) -> None:
        folder.rename(workspace / "moved")
        folder.symlink_to(mine)
        run_trials(*arguments)

    monkeypatch.setattr(Tuning, "run_trials", swap)
    with pytest.raises(PipelineError, match="cannot write .*journal.log"):
        search(workspace, 1)
    assert not any(mine.iterdir())


def test_no_trial_logs_through_a_link(workspace: Path) -> None:
    (workspace / "mine").mkdir()
    (workspace / "checkpoint/_tune").mkdir(parents=True)
    (workspace / "checkpoint/_tune/trial_0000").symlink_to(workspace / "mine")
    with pytest.raises(PipelineError, match="trial_0000 is a link or pipe"):
        search(workspace, 1, "logging.tensorboard=true")
    assert not any((workspace / "mine").iterdir())


def test_a_study_without_any_complete_trial_says_so(workspace: Path) -> None:
    with pytest.raises(PipelineError, match=r"_tune: no trial was complete"):
        search(workspace, 2, "training.min_negative_distance_m=9e9")


def test_a_missing_optuna_is_one_line_that_names_the_extra(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., Any]
) -> None:
    monkeypatch.setattr(metric_sinks, "find_spec", lambda _: None)
    done = run_main(tune.main, "--config", workspace / "config.toml")
    assert done.code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: tune.py: the package optuna is not installed: pip install ")
    assert "'spatial-building-embeddings[tune]'" in last
    assert not (workspace / "checkpoint").exists()


@pytest.mark.parametrize("arguments", [["--trials", "0"], ["--objective", "f1"]])
def test_a_bad_command_line_ends_with_2(arguments: list[str], run_main: Callable[..., Any]) -> None:
    done = run_main(tune.main, *arguments)
    assert done.code == 2
    assert arguments[0] in done.stderr


def test_each_trial_is_a_run_of_its_own_in_weights_and_biases(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = record_runs(monkeypatch)
    search(workspace, 2, "logging.wandb=offline")
    assert len({run.options["id"] for run in runs}) == len(runs) == 2
    for run, row in zip(runs, read_trials(workspace), strict=True):
        assert run.finished
        assert run.options["group"] == "tune"
        assert {name: str(run.options["config"][name]) for name in SPACE} == {name: row[name] for name in SPACE}
        assert [step for step, _ in run.logged] == [0, 1, 2]


def test_another_score_may_be_the_objective_and_each_trial_may_keep_its_checkpoint(workspace: Path) -> None:
    search(workspace, 2, objective="recall_at_1", save_checkpoints=True)
    for row in read_trials(workspace):
        path = workspace / f"checkpoint/_tune/trial_{int(row['trial']):04d}/checkpoint_best.pt"
        found = load_checkpoint(path)
        assert found.metrics["val"]["projector"]["recall_at_1"] == float(row["score"])
        assert found.provenance["settings"]["training.learning_rate"] == float(row["training.learning_rate"])
    assert "validation recall_at_1" in (workspace / "checkpoint/_tune/best.toml").read_text()
    with pytest.raises(StaleOutputError, match="objective was 'recall_at_1' and is now 'map'"):
        search(workspace, 3)


def test_every_setting_of_the_space_is_a_key_and_is_documented_with_its_range() -> None:
    config = Config()
    text = (ROOT / "docs/tuning.md").read_text(encoding="utf-8")
    for name, dimension in SPACE.items():
        section, _, key = name.partition(".")
        assert hasattr(getattr(config, section), key)
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        if isinstance(dimension, optuna.distributions.CategoricalDistribution):
            assert all(word in row for word in dimension.choices), row
        else:
            assert all(f"{bound:g}" in row.replace(",", "") for bound in (dimension.low, dimension.high)), row
            assert ("logarithmic" in row) == dimension.log


@pytest.fixture(autouse=True)
def quiet() -> Any:
    yield
    logging.getLogger("optuna").handlers.clear()
