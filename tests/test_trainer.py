"""A training step against slow loops, and its sums."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_band_sampler import make_features, make_neighbors

from pipeline.config import TrainingSection
from pipeline.log import Progress
from pipeline.retrieval.features import Features
from pipeline.retrieval.projector import Projector
from train_specialized_embeddings.sampling.band_sampler import BandSampler, Triplets
from train_specialized_embeddings.sampling.feature_store import FeatureStore
from train_specialized_embeddings.training.losses import triplet_losses
from train_specialized_embeddings.training.trainer import Trainer


def make_trainer(**settings: Any) -> tuple[Trainer, Features]:
    data = make_features(30)
    rows = np.random.default_rng(1).standard_normal((len(data), 6)).astype(np.float32)
    data = replace(data, embeddings=rows)
    torch.manual_seed(0)
    projector = Projector(6, 4, 8, 1, 0.0, "gelu", 0.0)
    sampler = BandSampler(data, make_neighbors(data), 3, 15.0)
    section = TrainingSection(batch_size=20, margin=0.3, hard_mining=False, **settings)
    return Trainer(projector, FeatureStore(rows, torch.device("cpu")), sampler, section), data


def list_triplets(trainer: Trainer, drawn: Triplets) -> list[tuple[int, int, int, int, int]]:
    """Return anchor's place, anchor, positive, negative, band of every triplet, by loops."""
    rows, found = drawn.anchors.rows.tolist(), drawn.found.tolist()
    if not trainer.section.share_within_building:
        columns = (rows, drawn.positives.tolist(), drawn.negatives.tolist(), drawn.bands.tolist())
        return [(i, *row) for i, row in enumerate(zip(*columns, strict=True)) if found[i]]
    triplets = []
    for place, anchor in enumerate(rows):
        first, size = int(drawn.anchors.starts[place]), int(drawn.anchors.sizes[place])
        for positive in range(first, first + size):
            for other in range(first, first + size):
                negative = int(drawn.negatives[other])
                is_allowed = bool(trainer.sampler.allows(torch.tensor([anchor]), torch.tensor([negative])))
                if positive != place and found[other] and is_allowed:
                    triplets.append((place, anchor, rows[positive], negative, int(drawn.bands[other])))
    return triplets


@pytest.mark.parametrize("shares", [False, True])
def test_a_steps_loss_gradient_and_counts_equal_a_loop_over_its_triplets(
    shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, data = make_trainer(share_within_building=shares)
    sampler = trainer.sampler
    drawn = sampler.draw(sampler.draw_groups(40) if shares else sampler.draw_anchors(40))
    triplets = list_triplets(trainer, drawn)
    assert len(triplets) > 30
    embeddings = trainer.projector(torch.from_numpy(data.embeddings))
    places, anchors, positives, negatives, bands = (torch.tensor(column) for column in zip(*triplets, strict=True))
    losses = triplet_losses(embeddings[anchors], embeddings[positives], embeddings[negatives], 0.3)
    # Each image counts the same, whatever the number of its triplets.
    means = [losses[places == place].mean() for place in places.unique()]
    torch.stack(means).mean().backward()
    expected = [weight.grad.clone() for weight in trainer.projector.parameters() if weight.grad is not None]

    counts = torch.zeros(2, 8, dtype=torch.float64)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    [(features, where)] = trainer.store.stream([trainer._list_rows(drawn)])
    loss_sum = trainer._take_step(drawn, features, where, counts)
    assert float(loss_sum) == pytest.approx(float(losses.detach().sum()), rel=1e-5)
    assert counts[0].tolist() == [int((bands == band).sum()) for band in range(8)]
    assert counts[1].tolist() == [int(((bands == band) & (losses > 0)).sum()) for band in range(8)]
    found = [weight.grad for weight in trainer.projector.parameters() if weight.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_an_epochs_report_is_that_of_all_its_steps() -> None:
    trainer, _ = make_trainer(triplets_per_epoch=70)
    report = trainer.run_epoch(Progress("train", None))
    assert report.num_triplets == 70
    assert (trainer.step, trainer.epoch) == (4, 1)
    assert sum(report.band_shares) == pytest.approx(1)


@pytest.mark.parametrize("shares", [False, True])
def test_the_bandit_turns_to_the_bands_whose_triplets_are_still_active(shares: bool) -> None:
    trainer, _ = make_trainer(band_sampling="ucb", share_within_building=shares, triplets_per_epoch=3000)
    assert trainer.bandit is not None
    trainer.projector.shortcut.weight.data.zero_()  # all images coincide: every triplet is active
    report = trainer.run_epoch(Progress("train", None))
    assert report.active_share == 1.0
    means = [reward / pulls for reward, pulls in zip(trainer.bandit.rewards, trainer.bandit.pulls, strict=True)]
    assert means == pytest.approx([1.0] * 7)


def test_a_state_of_a_gpu_goes_on_on_a_cpu_with_new_random_numbers_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bar, weights = Progress("train", None), []
    first, _ = make_trainer()
    first.run_epoch(bar)
    state = first.state()
    state["random"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 4
    state["sampler"]["random"] = torch.zeros(16, dtype=torch.uint8)
    for _ in range(2):
        trainer, _ = make_trainer()
        trainer.restore(copy.deepcopy(state))  # an optimiser goes on in the tensors it was given
        assert trainer.epoch == 1
        assert "run on a GPU, this one is on a CPU: random numbers begin anew" in caplog.records[-1].getMessage()
        trainer.run_epoch(bar)
        weights.append(trainer.projector.shortcut.weight.detach().clone())
    assert weights[0].equal(weights[1])


@pytest.mark.parametrize("settings", [{}, {"band_sampling": "ucb"}, {"share_within_building": True}])
def test_a_state_goes_on_bit_for_bit(settings: dict[str, Any]) -> None:
    (one, _), (other, _) = make_trainer(**settings), make_trainer(**settings)
    bar = Progress("train", None)
    one.run_epoch(bar)
    state = one.state()
    one.run_epoch(bar)
    torch.manual_seed(99)
    other.restore(state)
    other.run_epoch(bar)
    for first, second in zip(one.projector.parameters(), other.projector.parameters(), strict=True):
        assert first.equal(second)
    assert one.sampler.state.equal(other.sampler.state)
    assert (one.bandit and one.bandit.state) == (other.bandit and other.bandit.state)
