"""Stage 6 from another run's checkpoint: epoch 0 is that projector, and what does not fit is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from config_files import write_config
from reference_projector import ReferenceProjector
from training_data import SETTINGS, WIDTH, fill_workspace, make_split, read_checkpoints, read_metrics, run

from pipeline.config import load_config
from pipeline.errors import ConfigError, InputError, StaleOutputError
from pipeline.files import tables
from pipeline.retrieval.checkpoint import build_projector, hash_buildings, load_checkpoint, save_checkpoint
from pipeline.retrieval.features import load_features
from pipeline.retrieval.scores import score_queries, summarize_scores
from train_specialized_embeddings import tune
from train_specialized_embeddings.train import describe_run, list_inputs
from train_specialized_embeddings.training import fitting
from train_specialized_embeddings.tune import TuneOptions

OLD = "training.init_checkpoint=old/checkpoint_best.pt"
NEW_SPLIT = ({"stage": "merge_and_split", "split_hash": "new", "embedded_with": {"flip": True}},)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an earlier run in old/, and other buildings to train on."""
    folder = tmp_path_factory.mktemp("earlier")
    fill_workspace(folder)
    write_config(folder, **SETTINGS)
    run(folder)
    (folder / "checkpoint").rename(folder / "old")
    for name, count, seed in (("train", 25, 1), ("val", 14, 5)):
        tables.write_parquet(folder / f"merged/{name}.parquet", make_split(count, seed), *NEW_SPLIT)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, earlier: Path) -> Path:
    """A copy of that folder."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path, **SETTINGS)
    return tmp_path


def test_epoch_0_is_the_checkpoints_projector_and_training_goes_on_from_it(workspace: Path) -> None:
    run(workspace, OLD, "training_model.hidden_dim=7", "training_model.dropout=0.3", "training.num_epochs=2")
    old = load_checkpoint(workspace / "old/checkpoint_best.pt")
    run(workspace, OLD, "training.num_epochs=0", "paths.checkpoint_dir=start")
    start = load_checkpoint(workspace / "start/checkpoint_best.pt")
    rows = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 + 1
    torch.testing.assert_close(build_projector(start)(rows), build_projector(old)(rows), atol=1e-6, rtol=0)
    last = read_checkpoints(workspace)["checkpoint_final.pt"]
    assert last["start"]["init"] == "checkpoint"
    assert (last["architecture"]["hidden_dim"], last["architecture"]["dropout"]) == (6, 0.3)
    history = read_metrics(workspace)
    assert history[0]["val"] == pytest.approx(start.metrics["val"]["projector"])
    assert not torch.equal(last["projector"]["hidden.0.weight"], old.projector["hidden.0.weight"])
    names = load_features(workspace / "merged/train.parquet").building_ids.to_pylist()
    expected = {*hash_buildings(names).tolist(), *old.rest["trained_on"].tolist()}
    assert set(last["trained_on"].tolist()) == expected


def test_validation_buildings_that_the_checkpoint_was_trained_on_are_counted(
    workspace: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting.logger, "propagate", True)
    tables.write_parquet(workspace / "merged/val.parquet", make_split(9, 1), *NEW_SPLIT)
    run(workspace, OLD, "training.num_epochs=0")
    assert "checkpoint_best.pt: trained on 9 of the validation buildings, which flatter it" in caplog.text


def test_after_a_start_that_names_no_buildings_none_are_named(workspace: Path) -> None:
    content = torch.load(workspace / "old/checkpoint_best.pt", weights_only=True)
    save_checkpoint(workspace / "old/checkpoint_best.pt", {k: v for k, v in content.items() if k != "trained_on"})
    run(workspace, OLD, "training.num_epochs=0")
    assert load_checkpoint(workspace / "checkpoint/checkpoint_best.pt").count_trained_on(["0001_1"]) is None


def test_the_checkpoint_counts_by_its_content_and_a_killed_run_goes_on(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train_specialized_embeddings.training.fitting.SAVE_INTERVAL_SECONDS", 0.0)
    run(workspace, OLD, "paths.checkpoint_dir=whole")
    calls = iter(range(100))
    keep = fitting._save

    def die_at_the_third(*arguments: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        keep(*arguments)

    monkeypatch.setattr(fitting, "_save", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(workspace, OLD)
    shutil.copy(workspace / "old/checkpoint_best.pt", workspace / "elsewhere.pt")
    moved = "training.init_checkpoint=elsewhere.pt"
    run(workspace, moved)
    one, other = (load_checkpoint(workspace / folder / "checkpoint_final.pt") for folder in ("whole", "checkpoint"))
    for name, weight in one.projector.items():
        assert torch.equal(weight, other.projector[name])
    assert "elsewhere" not in str(one.settings) + str(other.settings) + str(other.provenance)
    assert run(workspace, OLD).kept
    with pytest.raises(StaleOutputError, match="input init_checkpoint is gone"):
        run(workspace)
    config = load_config(workspace / "config.toml", ["training.init_checkpoint=old/checkpoint_final.pt"])
    other_hash = {item["name"]: item for item in describe_run(config, list_inputs(config))["inputs"]}
    assert other_hash["init_checkpoint"]["hash"] != other.provenance["inputs"][-1]["hash"]


def test_what_cannot_be_started_from_is_refused_with_a_remedy(workspace: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.pt: no such file"):
        run(workspace, "training.init_checkpoint=nowhere.pt")
    with pytest.raises(InputError, match=r"its output_dim is 8, \[training_model\].output_dim asks for 9"):
        run(workspace, OLD, "training_model.output_dim=9")
    with pytest.raises(ConfigError, match=r"lies in \[paths\].checkpoint_dir"):
        run(workspace, OLD, "paths.checkpoint_dir=old")
    with pytest.raises(ConfigError, match="the trials choose the architecture: leave it out"):
        tune.run(load_config(workspace / "config.toml", [OLD]), TuneOptions())


@pytest.mark.parametrize(("norm", "residual"), [(True, True), (True, False), (False, True)])
def test_training_starts_from_a_projector_of_the_reference_implementation(
    workspace: Path, norm: bool, residual: bool
) -> None:
    torch.manual_seed(1)
    network = ReferenceProjector(WIDTH, [24, 18], 8, "gelu", norm=norm, residual=residual).eval()
    torch.save({"model_state_dict": network.state_dict(), "epoch": 3}, workspace / "old.pt")
    run(workspace, "training.init_checkpoint=old.pt", "training.num_epochs=2", "training.patience=0")  # 0: off
    assert len(read_metrics(workspace)) == 3
    found = read_checkpoints(workspace)["checkpoint_final.pt"]
    assert found["start"]["init"] == "checkpoint"
    assert set(found["metrics"]["val"]) == {"raw", "pca_whitened", "whitening", "projector"}
    rows = torch.from_numpy(load_features(workspace / "merged/val.parquet").embeddings)
    codes = load_features(workspace / "merged/val.parquet").building_codes
    with torch.no_grad():
        expected = summarize_scores(score_queries(network(rows).numpy(), codes))
    assert read_metrics(workspace)[0]["val"] == pytest.approx(expected, abs=1e-6)
    run(workspace, "training.init_checkpoint=old.pt", "training.num_epochs=0", "paths.checkpoint_dir=start")
    start = build_projector(load_checkpoint(workspace / "start/checkpoint_best.pt"))
    with torch.no_grad():
        torch.testing.assert_close(start(rows), network(rows), atol=1e-6, rtol=0)
    assert found["projector"].keys() == start.state_dict().keys()
    for name, weight in start.state_dict().items():  # the norms learn too
        assert name.startswith("shortcut") or not torch.equal(found["projector"][name], weight), name


def test_a_checkpoint_names_its_training_buildings(workspace: Path) -> None:
    run(workspace)
    found = load_checkpoint(workspace / "checkpoint/checkpoint_best.pt")
    ids = {
        name: load_features(workspace / f"merged/{name}.parquet").building_ids.to_pylist() for name in ("train", "val")
    }
    assert found.count_trained_on(ids["train"]) == len(ids["train"])
    assert found.count_trained_on(set(ids["val"]) - set(ids["train"])) == 0


def test_a_checkpoint_of_other_embeddings_is_refused(workspace: Path) -> None:
    made_by = NEW_SPLIT[0] | {"embedded_with": {"flip": False}}
    tables.write_parquet(workspace / "merged/train.parquet", make_split(25, 1), made_by)
    with pytest.raises(InputError, match=r"trained on other embeddings \(flip was True and is now False\)"):
        run(workspace, OLD)
    for name in ("train", "val"):
        tables.write_parquet(workspace / f"merged/{name}.parquet", make_split(25, 1, WIDTH + 1), *NEW_SPLIT)
    with pytest.raises(InputError, match=f"takes embeddings of {WIDTH} numbers, these have {WIDTH + 1}"):
        run(workspace, OLD)
