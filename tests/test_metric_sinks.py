"""TensorBoard and Weights & Biases beside metrics.jsonl."""

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from training_data import OUTPUTS, read_checkpoints, read_metrics, run, simplify

from pipeline.errors import PipelineError
from train_specialized_embeddings.training import fitting, metric_sinks
from train_specialized_embeddings.training.metric_sinks import flatten
from train_specialized_embeddings.training.training_run import TrainingRun


def test_nested_numbers_are_named_by_their_paths() -> None:
    record = {"epoch": 1, "train_loss": None, "val": {"map": 0.5}, "band_shares": [0.25, 0.75], "name": "x"}
    assert flatten(record) == {"epoch": 1.0, "val/map": 0.5, "band_shares/0": 0.25, "band_shares/1": 0.75}


def test_tensorboard_gets_every_epoch_once_after_a_kill_too(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that it imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(fitting, "SAVE_INTERVAL_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "log_epoch", lambda _, record: 1 / (3 - record["epoch"]))
        with pytest.raises(ZeroDivisionError):
            run(workspace, "logging.tensorboard=true")
    run(workspace, "logging.tensorboard=true")
    events = EventAccumulator(str(workspace / "checkpoint/_tensorboard")).Reload()
    for name in ("val/map", "embedding_spread"):
        section, _, key = name.rpartition("/")
        expected = [(record[section] if section else record)[key] for record in read_metrics(workspace)]
        assert [event.step for event in events.Scalars(name)] == [0, 1, 2, 3, 4, 5]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(expected)
    assert len(events.Scalars("train_loss")) == 5
    assert "step_loss" not in events.Tags()["scalars"]
    run(workspace, overwrite=True)
    assert sorted(path.name for path in (workspace / "checkpoint").iterdir()) == OUTPUTS


def test_tensorboard_gets_the_loss_of_every_step_after_a_kill_too(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(workspace)
    plain, weights = read_metrics(workspace), read_checkpoints(workspace)
    overrides = ("logging.tensorboard=true", "logging.step_losses=true", "training.band_sampling=ucb")
    monkeypatch.setattr(fitting, "SAVE_INTERVAL_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "log_epoch", lambda _, record: 1 / (3 - record["epoch"]))
        with pytest.raises(ZeroDivisionError):
            run(workspace, *overrides, overwrite=True)
    run(workspace, *overrides)
    events = EventAccumulator(str(workspace / "checkpoint/_tensorboard"), {"scalars": 0}).Reload()
    losses = [loss for record in read_metrics(workspace)[1:] for loss in record["step_losses"]]
    assert [event.value for event in events.Scalars("step_loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("step_loss")] == list(range(1, len(losses) + 1))
    # The bandit's statistics: how often it took a band, and its reward there.
    for name in ("band_shares", "bandit_rewards"):
        expected = [record[name][0] for record in read_metrics(workspace)[1:]]
        assert [event.value for event in events.Scalars(f"{name}/0")] == pytest.approx(expected)
    run(workspace, "logging.step_losses=true", overwrite=True)
    without = [
        {key: value for key, value in record.items() if key != "step_losses"} for record in read_metrics(workspace)
    ]
    assert simplify(without) == simplify(plain)
    assert simplify(read_checkpoints(workspace)) == simplify(weights)
    epoch = read_metrics(workspace)[1]
    assert len(epoch["step_losses"]) >= 90 / 16  # a pass over 90 images
    assert sum(epoch["step_losses"]) / len(epoch["step_losses"]) == pytest.approx(epoch["train_loss"], rel=0.05)


class FakeRun:
    """Stands for wandb's run: notes what it is given."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.logged, self.finished = options, [], False

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished = True


def record_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Put a fake in wandb's place, and return the runs that are begun there."""
    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr(metric_sinks, "find_spec", lambda _: True)
    return runs


def test_weights_and_biases_gets_settings_and_every_epoch_under_one_id(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = record_runs(monkeypatch)
    run(workspace, "logging.wandb=offline")
    run(
        workspace,
        "logging.wandb=online",
        "logging.wandb_project=facades",
        "logging.wandb_run_name=third",
        overwrite=True,
    )
    first, second = runs
    assert (first.options["mode"], second.options["mode"]) == ("offline", "online")
    assert first.options["id"] == second.options["id"]
    assert first.options["config"]["training.num_epochs"] == 5
    assert Path(first.options["dir"]) == workspace / "checkpoint/_wandb"
    assert json.dumps(first.options["config"])
    assert first.finished
    assert [step for step, _ in first.logged] == [0, 1, 2, 3, 4, 5]
    assert [numbers["val/map"] for _, numbers in first.logged] == [
        record["val"]["map"] for record in read_metrics(workspace)
    ]


def test_weights_and_biases_counts_steps_where_it_gets_the_loss_of_each(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = record_runs(monkeypatch)
    run(workspace, "logging.wandb=offline", "logging.step_losses=true", "training.num_epochs=2")
    steps = [step for step, _ in runs[0].logged]
    first, second = (len(record["step_losses"]) for record in read_metrics(workspace)[1:])
    assert steps == sorted(steps)  # it drops what comes with a smaller one
    assert [(step, numbers["epoch"]) for step, numbers in runs[0].logged if "epoch" in numbers] == [
        (0, 0), (first, 1), (first + second, 2)
    ]  # fmt: skip
    losses = [loss for record in read_metrics(workspace)[1:] for loss in record["step_losses"]]
    assert [numbers["step_loss"] for _, numbers in runs[0].logged if "step_loss" in numbers] == losses


def test_weights_and_biases_counts_on_where_a_killed_run_goes_on_without_the_loss_of_each_step(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = record_runs(monkeypatch)
    monkeypatch.setattr(fitting, "SAVE_INTERVAL_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "log_epoch", lambda _, record: 1 / (3 - record["epoch"]))
        with pytest.raises(ZeroDivisionError):
            run(workspace, "logging.wandb=offline", "logging.step_losses=true")
    run(workspace, "logging.wandb=offline")
    num_steps = sum(len(record.get("step_losses") or []) for record in read_metrics(workspace))
    assert num_steps > 5
    ends = [step for step, numbers in runs[1].logged if "epoch" in numbers]
    assert ends[2:] == [num_steps, num_steps + 1, num_steps + 2, num_steps + 3]


@pytest.mark.parametrize(("key", "value"), [("tensorboard", "true"), ("wandb", "offline")])
def test_a_missing_package_is_named_with_its_extra_before_anything_is_read(
    workspace: Path, key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_sinks, "find_spec", lambda _: None)
    monkeypatch.setattr("train_specialized_embeddings.training.fitting.load_features", None)  # would fail if called
    with pytest.raises(PipelineError, match=rf"\[logging\].{key}: the package {key} is not installed: pip install .*"
                                            rf"\[{key}\]"):  # fmt: skip
        run(workspace, f"logging.{key}={value}")
