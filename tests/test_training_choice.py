"""Stage 6: which epoch is kept, and how much of its way from the start is published."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_data import make_split, read_checkpoints, read_metrics, run

from pipeline.retrieval.checkpoint import build_projector, load_checkpoint
from pipeline.retrieval.scores import QueryScores, score_queries, summarize_scores
from train_specialized_embeddings.training.training_run import SHARES, TrainingRun
from train_specialized_embeddings.training.validation import ValidationSet


def test_what_is_published_lies_between_the_start_and_the_epoch_whose_weights_it_has(workspace: Path) -> None:
    run(workspace, "training.save_every_n_epochs=1", "training.init=random")  # far from what training reaches
    found = read_checkpoints(workspace)
    best = found["checkpoint_best.pt"]
    trained = found[f"checkpoint_epoch_{best['epoch']}.pt"]
    assert best["start"]["share"] in SHARES[1:]
    for name, weight in best["average"].items():
        expected = trained["origin"][name].lerp(trained["average"][name], best["start"]["share"])
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    val = make_split(12, 2)
    rows = torch.from_numpy(np.stack(val["embedding"].to_numpy()).astype(np.float32))
    codes = np.unique(val["building_id"].to_pylist(), return_inverse=True)[1]
    with torch.inference_mode():
        embeddings = build_projector(load_checkpoint(workspace / "checkpoint/checkpoint_best.pt"))(rows).numpy()
    assert best["metrics"]["val"]["projector"] == pytest.approx(summarize_scores(score_queries(embeddings, codes)))
    mark = json.loads((workspace / "checkpoint/provenance.json").read_text())
    assert mark["val"] == best["metrics"]["val"]


def score_as(maps: tuple[float, ...]) -> Callable[..., Any]:
    """Return a stand-in for TrainingRun._score, which calls give these mAPs in turn.

    Queries of a building share their noise. The standard error of a difference is about 0.002.
    """
    codes = np.repeat(np.arange(12), 3)
    noise = np.random.default_rng(0).standard_normal((len(maps), 12))
    noise = 0.005 * (noise - noise.mean(axis=1, keepdims=True))[:, codes]
    left = [QueryScores(np.arange(36), np.full(36, 1), mean + own) for mean, own in zip(maps, noise, strict=True)]

    def score(self: TrainingRun, _: Any) -> tuple[np.ndarray, QueryScores]:
        validation = ValidationSet(self.material.validation.embeddings, codes.astype(np.int32))
        self.material = replace(self.material, validation=validation)
        return np.eye(36, 40, dtype=np.float32), left.pop(0)

    return score


@pytest.mark.parametrize(
    ("maps", "best", "epochs"),
    [
        ((0.60, 0.61, 0.62, 0.63, 0.64, 0.65), 5, 5),
        ((0.60, 0.70, 0.699, 0.6995, 0.71, 0.72), 3, 3),  # as good as the best, give or take; a plateau ends training
        ((0.60, 0.70, 0.701, 0.69, 0.69, 0.72), 2, 4),  # a fall after the peak is seen
        ((0.60, 0.58, 0.57, 0.56, 0.55, 0.54), 0, 2),
        ((0.60, 0.58, 0.62, 0.60, 0.619, 0.63), 4, 4),
    ],
)
def test_the_last_epoch_that_validates_as_well_as_the_best_is_kept_and_a_plateau_ends_training(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, maps: tuple[float, ...], best: int, epochs: int
) -> None:
    monkeypatch.setattr(TrainingRun, "_score", score_as(maps))
    monkeypatch.setattr(TrainingRun, "settle", lambda _: None)
    run(workspace, "training.patience=2")
    assert read_checkpoints(workspace)["checkpoint_best.pt"]["epoch"] == best
    assert read_metrics(workspace)[-1]["epoch"] == epochs


def test_patience_ends_a_run_at_a_validation_only(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingRun, "_score", score_as((0.60, 0.50)))
    monkeypatch.setattr(TrainingRun, "settle", lambda _: None)
    run(workspace, "training.patience=2", "training.validate_every_n_epochs=3", "training.save_every_n_epochs=99")
    assert read_metrics(workspace)[-1]["epoch"] == 3


@pytest.mark.parametrize(
    ("maps", "share"),
    [
        ((0.60, 0.70, 0.80, 0.90), 1.0),
        ((0.60, 0.70, 0.80, 0.79), 0.75),
        ((0.60, 0.61, 0.60, 0.55), 0.5),
        ((0.60, 0.55, 0.50, 0.45), 0.0),
        ((0.60, 0.601, 0.60, 0.60), 0.0),  # better by less than a standard error
    ],
)
def test_the_share_of_the_training_that_validates_best_is_published(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, maps: tuple[float, ...], share: float
) -> None:
    def settle(self: TrainingRun) -> None:
        monkeypatch.setattr(TrainingRun, "_score", score_as(maps))
        monkeypatch.setattr(ValidationSet, "is_better", is_better)
        real_settle(self)

    real_settle, is_better = TrainingRun.settle, ValidationSet.is_better
    monkeypatch.setattr(ValidationSet, "is_better", lambda *_: False)  # so that the last epoch is as good as any
    monkeypatch.setattr(TrainingRun, "settle", settle)
    run(workspace)
    best = read_checkpoints(workspace)["checkpoint_best.pt"]
    assert best["start"]["share"] == share
    assert best["epoch"] == (5 if share else 0)
    assert best["metrics"]["val"]["projector"]["map"] == pytest.approx(maps[SHARES.index(share)])


def test_recall_is_measured_at_further_ranks(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="spatial_building_embeddings"):
        run(workspace, "training.recall_ranks=[2,3]")
    best = read_checkpoints(workspace)["checkpoint_best.pt"]
    val = make_split(12, 2)
    embeddings = np.stack(val["embedding"].to_numpy()).astype(np.float32)
    unit = build_projector(load_checkpoint(workspace / "checkpoint/checkpoint_best.pt"))(torch.from_numpy(embeddings))
    names = np.array(val["building_id"].to_pylist())
    similarity = (unit @ unit.T).detach().fill_diagonal_(-2).numpy()
    nearest = names[np.argsort(-similarity, axis=1)]
    for k in (2, 3):
        expected = np.mean([name in row[:k] for name, row in zip(names, nearest, strict=True)])
        assert best["metrics"]["val"]["projector"][f"recall_at_{k}"] == pytest.approx(expected)
    assert all({"recall_at_2", "recall_at_1"} <= row.keys() for row in best["metrics"]["val"].values())
    assert "validation, projector: R@2 0." in caplog.text
