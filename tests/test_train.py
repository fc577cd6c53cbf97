"""Stage 6: what it leaves, that it never ends below its start, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from closed_forms import collect_scatter, fit_pca_whitening, fit_within_class_whitening
from training_data import (
    OUTPUTS,
    SETTINGS,
    WIDTH,
    make_difficulty,
    make_split,
    read_checkpoints,
    read_metrics,
    run,
)

from pipeline.config import TrainingSection, load_config
from pipeline.errors import InputError, PipelineError, StaleOutputError
from pipeline.files import tables
from pipeline.retrieval.checkpoint import build_projector, load_checkpoint
from pipeline.retrieval.scores import SCORE_KEYS, score_queries, summarize_scores
from pipeline.retrieval.whitening import whiten_within_class
from train_specialized_embeddings import train
from train_specialized_embeddings.training import starts, training_run
from train_specialized_embeddings.training.losses import LOSSES
from train_specialized_embeddings.training.starts import Start, make_coordinates, make_projector
from train_specialized_embeddings.training.trainer import Trainer
from train_specialized_embeddings.training.validation import (
    ValidationSet,
    choose_validation_set,
    log_verdict,
)

BASELINES = ("raw", "pca_whitened", "whitening")


# ------------------------------------------------------------------------------------------------ what it leaves


def test_a_run_leaves_checkpoints_metrics_and_its_provenance(workspace: Path) -> None:
    result = run(workspace)
    rows = make_split(30, 1).num_rows + make_split(12, 2).num_rows
    assert (result.counts["in"], result.counts["out"], result.counts["rejected"], result.counts["dropped"]) == (
        rows,
        rows,
        0,
        0,
    )
    assert sorted(path.name for path in result.written) == OUTPUTS
    history = read_metrics(workspace)
    assert [record["epoch"] for record in history] == [0, 1, 2, 3, 4, 5]
    assert (history[0]["train_loss"], history[0]["num_negatives"]) == (None, 0)
    assert set(history[0]["val"]) == set(SCORE_KEYS)
    for record in history[1:]:
        assert record["train_loss"] > 0
        assert 0 < record["active_share"] <= 1
        assert sum(record["band_shares"]) == pytest.approx(1)
        assert record["num_negatives"] == 30  # one a building
        assert 0 < record["embedding_spread"] <= 1
        assert set(record["learning_rates"]) == {"shortcut", "hidden.0", "output"}
    mark = json.loads((workspace / "checkpoint/provenance.json").read_text())
    assert mark["counts"] == {"in": rows, "out": rows}
    assert [item["name"] for item in mark["inputs"]] == ["train.parquet", "val.parquet", "difficulty.parquet"]
    assert mark["settings"]["training.num_epochs"] == 5
    assert "training_model.input_dim" not in mark["settings"]


def test_every_checkpoint_holds_all_that_its_readers_need(workspace: Path) -> None:
    run(workspace)
    found = read_checkpoints(workspace)
    assert [content["epoch"] for name, content in found.items() if "best" not in name] == [2, 4, 5]
    for name, content in found.items():
        assert set(content) == {
            "architecture", "projector", "weights", "average", "coordinates", "origin", "optimizer", "loss",
            "sampler", "random", "epoch", "start", "metrics", "settings", "provenance", "trained_on",
        }  # fmt: skip
        assert content["architecture"]["input_dim"] == WIDTH
        assert content["provenance"]["split_hash"] == "abc"
        assert content["provenance"]["embedded_with"] == {"flip": True}
        assert list(content["metrics"]["val"]) == [*BASELINES, "projector"]
        assert content["metrics"]["epoch"] == content["epoch"]
        assert len(content["metrics"]["history"]) == (6 if "best" in name else content["epoch"] + 1)
        assert content["settings"]["training"]["num_epochs"] == 5
        loaded = load_checkpoint(workspace / "checkpoint" / name)
        assert build_projector(loaded)(torch.ones(2, WIDTH)).shape == (2, 8)


def test_the_best_checkpoint_is_the_best_epoch_by_validation_and_never_below_the_start(workspace: Path) -> None:
    # A rate that spoils the projector at once: the start must win.
    run(workspace, "training.learning_rate=300.0", "training.shortcut_learning_rate=300.0", "training.init=whitening",
        "training.warmup_epochs=0", "training.num_epochs=1")  # fmt: skip
    history = read_metrics(workspace)
    best = read_checkpoints(workspace)["checkpoint_best.pt"]
    maps = [record["val"]["map"] for record in history]
    assert best["epoch"] == maps.index(max(maps))
    assert best["metrics"]["val"]["projector"]["map"] == max(maps) >= maps[0]
    assert maps[0] == pytest.approx(best["metrics"]["val"]["whitening"]["map"], abs=1e-6)


def test_validation_scores_equal_those_computed_by_hand(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "SHRINKAGES", (0.3,))
    run(workspace, "training.num_epochs=0", "training.init=whitening")
    training, val = make_split(30, 1), make_split(12, 2)
    rows = [np.stack(split["embedding"].to_numpy()).astype(np.float32) for split in (training, val)]
    codes = [np.unique(split["building_id"].to_pylist(), return_inverse=True)[1] for split in (training, val)]
    expected = {
        "raw": rows[1] / np.linalg.norm(rows[1], axis=1, keepdims=True),
        "pca_whitened": fit_pca_whitening(rows[0], 8).apply(rows[1]),
        "whitening": fit_within_class_whitening(rows[0], codes[0].astype(np.int32), 8, 0.3).apply(rows[1]),
    }
    expected["projector"] = expected["whitening"]
    best = read_checkpoints(workspace)["checkpoint_best.pt"]
    for name, embeddings in expected.items():
        assert best["metrics"]["val"][name] == pytest.approx(summarize_scores(score_queries(embeddings, codes[1])))
    assert best["start"] == {"init": "whitening", "shrinkage": 0.3, "share": 0.0}


@pytest.mark.parametrize("init", ["pca", "random"])
def test_other_starts_are_trained_too(workspace: Path, init: str) -> None:
    run(workspace, f"training.init={init}")
    val = read_checkpoints(workspace)["checkpoint_best.pt"]["metrics"]["val"]
    start = read_metrics(workspace)[0]["val"]["map"]
    if init == "pca":
        assert start == pytest.approx(val["pca_whitened"]["map"], abs=1e-6)
    else:
        assert start != val["whitening"]["map"]


def test_no_hidden_layer_and_a_distance_and_few_anchors_work(workspace: Path) -> None:
    run(workspace, "training_model.num_hidden_layers=0", "training.min_negative_distance_m=2000",
        "training.anchors_per_epoch=7", "training.loss=triplet")  # fmt: skip
    history = read_metrics(workspace)
    assert all(2 <= record["num_negatives"] <= 4 for record in history[1:])  # buildings of 2 to 4 images
    assert set(history[1]["learning_rates"]) == {"shortcut"}


def test_without_a_difficulty_table_negatives_are_random(
    workspace: Path, write_config: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config(workspace, **SETTINGS)
    path.write_text(path.read_text().replace('difficulty_metadata_path = "difficulty.parquet"\n', ""))
    with caplog.at_level("WARNING", "spatial_building_embeddings"):
        run(workspace, "training.num_epochs=1")
    assert "difficulty_metadata_path is not set: negatives are random" in caplog.text
    assert read_metrics(workspace)[1]["band_shares"] == [0.0] * 7 + [1.0]
    assert run(workspace, "training.num_epochs=1").kept
    with pytest.raises(StaleOutputError, match="input difficulty.parquet was not among its inputs"):
        run(workspace, "training.num_epochs=1", "paths.difficulty_metadata_path=difficulty.parquet")


def test_training_on_a_sample_of_the_buildings_reads_these_alone(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "spatial_building_embeddings"):
        run(workspace, "training.sample_buildings=11", "training.num_epochs=1")
    assert "images of 11 buildings" in caplog.text
    assert read_checkpoints(workspace)["checkpoint_best.pt"]["settings"]["training"]["sample_buildings"] == 11


def test_the_log_shows_the_table_and_warns_of_a_projector_that_is_not_worth_publishing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = {name: dict.fromkeys(SCORE_KEYS, value) for name, value in
              {"raw": 0.5, "pca_whitened": 0.4, "whitening": 0.6, "projector": 0.45}.items()}  # fmt: skip
    with caplog.at_level("INFO", "spatial_building_embeddings"):
        log_verdict(scores, 3)
    assert (
        "the projector of epoch 3 does NOT beat raw and whitening by validation mAP: do not publish it" in caplog.text
    )
    scored = " 0.5000, ".join(key.replace("recall_at_", "R@") for key in SCORE_KEYS)
    assert f"validation, raw: {scored} 0.5000\n" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "spatial_building_embeddings"):
        log_verdict(scores | {"projector": dict.fromkeys(SCORE_KEYS, 0.62)}, 3)
    assert "NOT" not in caplog.text
    for error, warns in ((0.14, True), (0.16, False)):  # whitening is 0.15 ahead
        rows = {"projector": scores["projector"], "whitening": scores["whitening"] | {"map_error": error}}
        caplog.clear()
        with caplog.at_level("INFO", "spatial_building_embeddings"):
            log_verdict(rows, 3)
        assert ("does NOT beat whitening" in caplog.text) == warns


def test_a_run_whose_embeddings_draw_together_ends_says_so_and_keeps_what_was_better(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spreads = iter((0.9, 0.8, 0.24, 0.2))
    monkeypatch.setattr(training_run, "measure_spread", lambda _: next(spreads))
    monkeypatch.setattr(ValidationSet, "is_better", lambda *_: False)  # so that the last epoch is as good as any
    with caplog.at_level("WARNING", "spatial_building_embeddings"):
        run(workspace)
    assert [record["epoch"] for record in read_metrics(workspace)] == [0, 1, 2, 3]
    assert "epoch 3: the embeddings have collapsed, training ends: lower [training].learning_rate" in caplog.text
    assert read_checkpoints(workspace)["checkpoint_best.pt"]["epoch"] in (0, 2)  # by the share that is published


def test_a_rate_far_too_large_does_no_harm_to_what_is_published(workspace: Path) -> None:
    run(workspace, "training.learning_rate=300.0", "training.shortcut_learning_rate=300.0",
        "training.warmup_epochs=0", "training.num_epochs=50")  # fmt: skip
    history, best = read_metrics(workspace), read_checkpoints(workspace)["checkpoint_best.pt"]
    assert len(history) < 50
    assert best["metrics"]["val"]["projector"]["map"] >= history[0]["val"]["map"]


def test_the_scale_of_the_features_changes_nothing_but_rounding(
    workspace: Path, write_config: Callable[..., Path]
) -> None:
    run(workspace)
    scaled = workspace / "scaled"
    for name in ("train", "val"):
        split = tables.open_parquet(workspace / f"merged/{name}.parquet").read()
        values = split["embedding"].combine_chunks().flatten().to_numpy() * np.float32(64)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values), WIDTH)
        split = split.set_column(split.schema.get_field_index("embedding"), "embedding", column)
        tables.write_parquet(scaled / f"merged/{name}.parquet", split, {})
    shutil.copy(workspace / "difficulty.parquet", scaled / "difficulty.parquet")
    write_config(scaled, **SETTINGS)
    run(scaled)
    losses = [[record["train_loss"] for record in read_metrics(folder)[1:]] for folder in (workspace, scaled)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_large_validation_split_is_cut_to_whole_buildings(workspace: Path) -> None:
    from pipeline.retrieval.features import load_features

    val = load_features(workspace / "merged/val.parquet")
    chosen = choose_validation_set(val, 12, seed=1)
    assert 4 <= len(chosen.building_codes) <= 12
    sizes = np.bincount(val.building_codes)
    rows = (chosen.embeddings[:, None] == val.embeddings).all(axis=2).argmax(axis=1)
    codes = val.building_codes[rows]
    for code in np.unique(codes):
        assert (codes == code).sum() == sizes[code]
    assert len(choose_validation_set(val, 1000, seed=1).building_codes) == len(val)
    assert len(np.unique(choose_validation_set(val, 2, seed=1).building_codes)) == 2


def test_the_start_equals_the_whitening_and_its_branch_reads_inputs_of_variance_one(workspace: Path) -> None:
    from pipeline.retrieval.features import load_features

    data = load_features(workspace / "merged/train.parquet")
    scatter = collect_scatter(data.embeddings * 50, data.building_codes)
    whitening = whiten_within_class(scatter, WIDTH)
    start = make_coordinates(whitening, scatter, 8)
    section = load_config(workspace / "config.toml").training_model.model_copy(update={"hidden_dim": 400})
    projector = make_projector(Start(start, {}, {}), section, TrainingSection()).eval()
    rows, coordinates = data.embeddings * 50, start.linear_map.map_rows(data.embeddings * 50)
    expected = whitening.take_leading(8).apply(rows)
    np.testing.assert_allclose(projector(torch.from_numpy(coordinates)).detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(start.fold(projector)(torch.from_numpy(rows)).detach().numpy(), expected, atol=1e-4)
    assert float(projector.hidden[0](torch.from_numpy(coordinates)).var().detach()) == pytest.approx(1.0, rel=0.25)
    assert np.square(coordinates[:, :8]).mean() == pytest.approx(1.0, rel=1e-3)
    means = np.stack([coordinates[data.building_codes == code].mean(axis=0) for code in data.building_codes])
    np.testing.assert_allclose(start.spread, (coordinates - means).std(axis=0), rtol=1e-3)


# ------------------------------------------------------------------------------------------------ refusals


def test_splits_that_cannot_be_trained_on_are_refused_with_a_remedy(workspace: Path) -> None:
    single = make_split(1, 1)
    tables.write_parquet(workspace / "merged/train.parquet", single, {})
    with pytest.raises(InputError, match="train.parquet: holds one building, training needs two"):
        run(workspace)
    split = make_split(30, 1)
    first_images = np.unique(split["building_id"].to_pylist(), return_index=True)[1]
    tables.write_parquet(workspace / "merged/train.parquet", split.take(pa.array(first_images)), {})
    with pytest.raises(InputError, match="train.parquet: no building has two images"):
        run(workspace)
    tables.write_parquet(workspace / "merged/train.parquet", make_split(30, 1), {})
    tables.write_parquet(workspace / "merged/val.parquet", make_split(12, 2).slice(0, 0), {})
    with pytest.raises(InputError, match="val.parquet: holds no rows"):
        run(workspace)
    for split, seed in (("train", 1), ("val", 2)):
        made_by = {"stage": "merge_and_split", "settings": {"seed": seed}}
        tables.write_parquet(workspace / f"merged/{split}.parquet", make_split(30, 1), made_by)
    with pytest.raises(
        InputError, match=r"val.parquet: not of the same run as train.parquet \(seed was 1 and is now 2"
    ):
        run(workspace)
    tables.write_parquet(workspace / "merged/val.parquet", make_split(12, 2, width=13), {})
    with pytest.raises(PipelineError, match="val.parquet: its embeddings have 13 numbers, those of train.parquet 12"):
        run(workspace)


def test_validation_buildings_that_are_trained_on_are_counted(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables.write_parquet(workspace / "merged/val.parquet", make_split(12, 1), {})
    with caplog.at_level("WARNING", "spatial_building_embeddings"):
        run(workspace)
    assert f"{workspace}/merged/val.parquet: 12 of its buildings are trained on, which flatter the run" in caplog.text


def test_another_input_width_is_refused_naming_both(workspace: Path) -> None:
    with pytest.raises(PipelineError, match=r"embeddings have 12 numbers, \[training_model\].input_dim asks for 4096"):
        run(workspace, "training_model.input_dim=4096")


def test_a_run_without_any_negative_says_what_to_lower(workspace: Path) -> None:
    with pytest.raises(PipelineError, match="no negative can be drawn.*min_negative_distance_m = 9e"):
        run(workspace, "training.min_negative_distance_m=9e9")


def test_a_loss_that_is_no_number_ends_the_run(workspace: Path) -> None:
    with pytest.raises(PipelineError, match=r"training diverged .*: lower \[training\].learning_rate"):
        run(workspace, "training.learning_rate=1e30", "training.shortcut_learning_rate=1e30")


def test_a_gpu_too_small_for_a_step_is_one_line_and_the_run_goes_on_elsewhere(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(trainer: Trainer, *_: Any) -> None:
        if trainer.epoch == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return take_step(trainer, *_)

    take_step = Trainer._take_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_take_step", refuse)
        with pytest.raises(PipelineError, match=r"the GPU cannot hold training with .*batch_size = \d+: .*set to cpu"):
            run(workspace)
    run(workspace, "infrastructure.device=cpu")
    assert [line["epoch"] for line in read_metrics(workspace)][:2] == [0, 1]


def test_a_margin_that_no_triplet_reaches_is_said(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LOSSES, "triplet", lambda pairs, _: 0 * pairs.anchors.sum(dim=1))
    with caplog.at_level("WARNING", "spatial_building_embeddings"):
        run(workspace, "training.loss=triplet")
    assert "no triplet was active: raise [training].margin" in caplog.text


def test_two_training_images_of_two_buildings_are_enough(workspace: Path) -> None:
    tiny = make_split(2, 1)
    tables.write_parquet(workspace / "merged/train.parquet", tiny, {})
    tables.write_parquet(workspace / "difficulty.parquet", make_difficulty(tiny), {})
    assert run(workspace).written


def test_the_command_line_ends_with_the_usual_codes_and_one_line(workspace: Path, run_main: Callable[..., Any]) -> None:
    config = ("--config", workspace / "config.toml")
    done = run_main(train.main, *config)
    assert done.code == 0, done.stderr
    assert sorted(Path(line).name for line in done.stdout.splitlines()) == OUTPUTS
    assert re.search(r"train: \d+ in = \d+ out \+ 0 rejected \+ 0 dropped", done.stderr.splitlines()[-1])
    for number, text, arguments in (
        (2, "[training].epochs: unknown key", ("--set", "training.epochs=3")),
        (1, "no such file", ("--set", "paths.difficulty_metadata_path=gone.parquet")),
        (1, "training.num_epochs was 5 and is now 6", ("--set", "training.num_epochs=6")),
    ):
        failed = run_main(train.main, *config, *arguments)
        assert failed.code == number
        assert text in failed.stderr.splitlines()[-1]
        assert failed.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in failed.stderr
    assert run_main(train.main, "--help").stdout.startswith("Stage 6: ")


@pytest.mark.parametrize("text", ["training.anchors_per_epoch=0", "training.input_noise=-1.0"])
def test_settings_out_of_range_are_refused(workspace: Path, text: str) -> None:
    with pytest.raises(PipelineError, match=text.partition("=")[0].rpartition(".")[2]):
        load_config(workspace / "config.toml", [text])
