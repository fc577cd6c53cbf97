"""Stage 6 killed at any moment, run again, or run with other settings."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import (
    OUTPUTS,
    SETTINGS,
    WIDTH,
    assert_same_run,
    fill_workspace,
    make_split,
    read_checkpoints,
    read_metrics,
    run,
    simplify,
)

from pipeline.cli import Options
from pipeline.config import load_config
from pipeline.errors import InputError, StaleOutputError
from pipeline.files import tables
from pipeline.inference.model_files import embedding_settings, identify_model
from pipeline.retrieval.checkpoint import build_projector, load_checkpoint
from publish_model import convert_to_hf
from publish_model.convert_to_hf import PublishOptions
from train_specialized_embeddings import train
from train_specialized_embeddings.training import fitting
from train_specialized_embeddings.training.training_run import TrainingRun


def kill(*_: Any) -> None:
    raise KilledError


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def write_json_and_die(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
    raise KilledError


@pytest.fixture
def undisturbed(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """A workspace like the other, for a run that nothing kills."""
    folder = write_config(tmp_path / "undisturbed", **SETTINGS).parent
    fill_workspace(folder)
    return folder


def run_killed(workspace: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, *settings: str) -> None:
    """Train, and die when an epoch is to be logged."""

    def log_epoch(_: TrainingRun, record: dict[str, Any]) -> None:
        if record["epoch"] == epoch:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "log_epoch", log_epoch)
        with pytest.raises(KilledError):
            run(workspace, *settings)


@pytest.mark.parametrize(
    "point", ["latest", "metrics", "best", "epoch_2", "epoch_4", "final", "settle", "mark", "after"]
)
def test_a_run_killed_at_any_write_and_resumed_equals_an_undisturbed_one(
    workspace: Path, undisturbed: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "SAVE_INTERVAL_SECONDS", -1.0)  # save after each epoch
    run(undisturbed)
    name = {"mark": "provenance.json", "metrics": "metrics.jsonl", "latest": ".checkpoint_latest.pt"}.get(
        point, f"checkpoint_{point}.pt"
    )
    real, times = fitting.workspace.writing_to, 0

    def writing_to(path: Path, **options: Any) -> Any:
        nonlocal times
        times += path.name == name
        if path.name == name and (times == 3 or point in {"epoch_2", "epoch_4", "final", "mark"}):
            raise KilledError
        return real(path, **options)

    with monkeypatch.context() as patch:
        if point == "after":
            patch.setattr(fitting.workspace, "write_json", write_json_and_die)
        elif point == "settle":
            patch.setattr(TrainingRun, "settle", kill)
        else:
            patch.setattr(fitting.workspace, "writing_to", writing_to)
        with pytest.raises(KilledError):
            run(workspace)
    if point == "after":
        assert run(workspace).kept
        (workspace / "checkpoint/.checkpoint_latest.pt").unlink()
    else:
        assert run(workspace).written
    assert_same_run(workspace, undisturbed)


def test_resuming_goes_on_and_does_not_begin_anew(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fitting, "SAVE_INTERVAL_SECONDS", -1.0)
    run_killed(workspace, monkeypatch, 3)
    caplog.clear()
    monkeypatch.setattr("train_specialized_embeddings.training.fitting.fit_start", None)  # would fail if called
    with caplog.at_level("INFO", "spatial_building_embeddings"):
        run(workspace)
    assert "going on after epoch 2" in caplog.text
    assert [int(epoch) for epoch in re.findall(r"epoch (\d): loss", caplog.text)] == [3, 4, 5]


@pytest.mark.parametrize("loss", ["multi_similarity", "triplet"])
def test_with_a_bandit_a_killed_run_goes_on_exactly_too(
    workspace: Path, undisturbed: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("training.band_sampling=ucb", "training.anchors_per_epoch=500", f"training.loss={loss}")
    monkeypatch.setattr(fitting, "SAVE_INTERVAL_SECONDS", -1.0)
    run(undisturbed, *settings)
    run_killed(workspace, monkeypatch, 3, *settings)
    run(workspace, *settings)
    assert_same_run(workspace, undisturbed)
    bandit = read_checkpoints(workspace)["checkpoint_final.pt"]["sampler"]["bandit"]
    assert sum(bandit["pulls"]) > 100
    means = [reward / pulls for reward, pulls in zip(bandit["rewards"], bandit["pulls"], strict=True)]
    assert read_metrics(workspace)[-1]["bandit_rewards"] == means


def test_sigkill_of_the_script_and_a_rerun_equal_an_undisturbed_run(
    workspace: Path, undisturbed: Path, tmp_path: Path
) -> None:
    overrides = ["training.num_epochs=40", "training.save_every_n_epochs=10"]
    arguments = [item for override in overrides for item in ("--set", override)]
    script = Path(train.__file__)
    latest = workspace / "checkpoint/.checkpoint_latest.pt"
    for _ in range(10):  # on a machine that is busy it may have ended before we look
        shutil.rmtree(workspace / "checkpoint", ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, str(script), "--config", str(workspace / "config.toml"), *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path,
        )  # fmt: skip
        while not latest.exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            break
    assert latest.exists()
    run(undisturbed, *overrides)
    assert run(workspace, *overrides).written
    assert simplify(read_checkpoints(workspace)) == simplify(read_checkpoints(undisturbed))
    assert simplify(read_metrics(workspace)) == simplify(read_metrics(undisturbed))


@pytest.mark.parametrize(
    "change",
    [{"history": None}, {"history": [1]}, {"best": {}}, {"peak": {"x": 1}}, {"coordinates": {}}, {"metrics": [1]}],
)
def test_a_state_of_another_shape_is_one_line(
    workspace: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    latest = workspace / "checkpoint/.checkpoint_latest.pt"
    run_killed(workspace, monkeypatch, 3)
    torch.save(torch.load(latest, weights_only=True) | change, latest)
    with pytest.raises(InputError, match=r"checkpoint_latest\.pt: no run can go on from it"):
        run(workspace)


def test_a_complete_run_is_kept_without_importing_torch(workspace: Path) -> None:
    first = run(workspace)
    before = {path.name: path.stat().st_mtime_ns for path in (workspace / "checkpoint").iterdir()}
    again = run(workspace)
    assert (again.counts["in"], again.counts["out"], again.written) == (first.counts["in"], first.counts["out"], [])
    assert [path.name for path in again.kept] == [OUTPUTS[0], *OUTPUTS[3:]]
    assert {path.name: path.stat().st_mtime_ns for path in (workspace / "checkpoint").iterdir()} == before
    code = (
        "import sys; from train_specialized_embeddings import train\n"
        f"train.main(['--config', {str(workspace / 'config.toml')!r}])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(train.__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "nothing redone" in done.stderr


def test_a_moved_folder_another_device_and_a_named_width_change_nothing(workspace: Path, tmp_path: Path) -> None:
    run(workspace)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("merged", "checkpoint", "difficulty.parquet", "config.toml"):
        shutil.move(workspace / name, moved / name)
    assert run(moved, "infrastructure.device=cpu", f"training_model.input_dim={WIDTH}").kept


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("training.num_epochs=6", "training.num_epochs was 5 and is now 6"),
        ("training_model.hidden_dim=7", "training_model.hidden_dim was 6 and is now 7"),
        ("global.seed=7", "seed was 42 and is now 7"),
    ],
)
def test_changed_settings_are_refused_by_name_until_overwrite(workspace: Path, override: str, difference: str) -> None:
    run(workspace)
    with pytest.raises(StaleOutputError, match=f"{difference}.*--overwrite"):
        run(workspace, override)
    assert run(workspace, override, overwrite=True).written


def test_changed_inputs_are_refused_by_name(workspace: Path) -> None:
    run(workspace)
    tables.write_parquet(workspace / "merged/val.parquet", make_split(13, 2), {})
    with pytest.raises(StaleOutputError, match="input val.parquet has changed"):
        run(workspace)


def test_a_killed_run_with_other_settings_is_refused_by_name(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_killed(workspace, monkeypatch, 3)
    with pytest.raises(StaleOutputError, match="margin was .* and is now 0.7"):
        run(workspace, "training.margin=0.7")


def test_overwrite_leaves_nothing_of_the_old_run(workspace: Path) -> None:
    run(workspace)
    run(workspace, "training.save_every_n_epochs=5", overwrite=True)
    names = sorted(path.name for path in (workspace / "checkpoint").iterdir())
    assert names == ["checkpoint_best.pt", "checkpoint_epoch_5.pt", "checkpoint_final.pt", *OUTPUTS[-2:]]


def test_a_checkpoint_of_unknown_origin_is_not_trained_over(workspace: Path) -> None:
    (workspace / "checkpoint").mkdir()
    (workspace / "checkpoint/checkpoint_best.pt").write_bytes(b"somebody's")
    for overwrite in (False, True):
        with pytest.raises(StaleOutputError, match=r"checkpoint_best.pt: nothing beside it says what it was made from"):
            run(workspace, overwrite=overwrite)
    assert (workspace / "checkpoint/checkpoint_best.pt").read_bytes() == b"somebody's"


def test_a_complete_run_that_lost_a_file_is_trained_again(workspace: Path) -> None:
    run(workspace)
    before = simplify(read_checkpoints(workspace))
    (workspace / "checkpoint/checkpoint_best.pt").unlink()
    assert run(workspace).written
    assert simplify(read_checkpoints(workspace)) == before


# ------------------------------------------------------------------------------------------------ fewer validations


def test_fewer_validations_give_the_same_weights_and_every_checkpoint_that_is_kept_has_one(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(workspace)
    every_epoch, before = read_metrics(workspace), read_checkpoints(workspace)
    with caplog.at_level("INFO", logger="spatial_building_embeddings"):
        run(workspace, "training.validate_every_n_epochs=3", overwrite=True)
    records, found = read_metrics(workspace), read_checkpoints(workspace)
    assert [record["epoch"] for record in records if record["val"]] == [0, 2, 3, 4, 5]  # 2 and 4 leave a checkpoint
    for one, other in zip(records, every_epoch, strict=True):
        assert one["val"] in (other["val"], None)
        assert one["train_loss"] == other["train_loss"]
    for name in ("checkpoint_epoch_2.pt", "checkpoint_final.pt"):
        assert simplify(found[name]["projector"]) == simplify(before[name]["projector"])
        assert found[name]["metrics"]["val"] == before[name]["metrics"]["val"]
    assert re.search(r"epoch 1: loss .*, not validated", caplog.text)


def test_a_run_killed_between_two_validations_goes_on_to_the_same_bits(
    workspace: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "SAVE_INTERVAL_SECONDS", -1.0)
    rarely = ("training.validate_every_n_epochs=4",)
    run(undisturbed, *rarely)
    run_killed(workspace, monkeypatch, 2, *rarely)
    assert read_metrics(workspace)[1]["val"] is None
    run(workspace, *rarely)
    assert_same_run(workspace, undisturbed)


def test_without_a_shortcut_training_starts_from_the_whitening_and_resumes_to_the_same_bits(
    workspace: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("training.use_residual=false", "training.init=whitening", "training_model.hidden_dim=20")
    monkeypatch.setattr(fitting, "SAVE_INTERVAL_SECONDS", -1.0)
    run(undisturbed, *options)
    run_killed(workspace, monkeypatch, 2, *options)
    run(workspace, *options)
    assert_same_run(workspace, undisturbed)
    start, best = read_metrics(workspace)[0]["val"], read_checkpoints(workspace)["checkpoint_best.pt"]
    assert start["map"] == pytest.approx(best["metrics"]["val"]["whitening"]["map"], abs=1e-6)
    assert best["architecture"]["use_residual"] is False
    assert not [name for name in best["projector"] if name.startswith("shortcut")]
    assert best["metrics"]["val"]["projector"]["map"] >= start["map"] - 0.02
    final = read_checkpoints(workspace)["checkpoint_final.pt"]["projector"]
    assert not final["output.weight"].equal(
        read_checkpoints(workspace)["checkpoint_epoch_2.pt"]["projector"]["output.weight"]
    )


def test_a_projector_without_a_shortcut_is_published_as_it_was_trained(workspace: Path) -> None:
    from published_models import write_backbone
    from transformers import AutoModel

    backbone = write_backbone(workspace / "backbone", hidden_size=WIDTH)
    options = ["training.use_residual=false", "training.init=whitening", "training_model.hidden_dim=20",
               f"embedding_model.model_name={backbone}", "paths.published_model_dir=published"]  # fmt: skip
    config = load_config(workspace / "config.toml", options)
    embedded_with = {"model": identify_model(backbone), **embedding_settings(config.embedding_model)}
    made_by = {"stage": "merge_and_split", "split_hash": "abc", "embedded_with": embedded_with}
    for name, split in (("train", make_split(30, 1)), ("val", make_split(12, 2))):
        tables.write_parquet(workspace / f"merged/{name}.parquet", split, made_by)
    train.run(config, Options())
    assert convert_to_hf.run(config, PublishOptions()).written
    model = AutoModel.from_pretrained(workspace / "published", trust_remote_code=True)
    assert model.config.projector["use_residual"] is False
    checkpoint = load_checkpoint(workspace / "checkpoint/checkpoint_best.pt")
    assert checkpoint.metrics["epoch"] > 0
    pixels = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = build_projector(checkpoint)(model.extract(pixels)[0])
        torch.testing.assert_close(model(pixels).embeddings, expected)
