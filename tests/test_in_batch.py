"""A batch's images as each other's negatives, against loops over all pairs."""

from typing import Any

import pytest
import torch
from test_band_sampler import make_features, make_neighbors

from pipeline.config import TrainingSection
from train_specialized_embeddings.sampling.band_sampler import BandSampler, Triplets
from train_specialized_embeddings.training import in_batch
from train_specialized_embeddings.training.in_batch import in_batch_losses

MIN_DISTANCE_M = 15.0


def draw(count: int) -> tuple[BandSampler, Triplets, torch.Tensor]:
    data = make_features(30)
    sampler = BandSampler(data, make_neighbors(data), 3, MIN_DISTANCE_M)
    drawn = sampler.draw(sampler.draw_anchors(count))
    rows = torch.randn(3 * count, 5, generator=torch.Generator().manual_seed(0))
    return sampler, drawn, torch.nn.functional.normalize(rows, dim=1)


def losses_by_loop(
    sampler: BandSampler, drawn: Triplets, embeddings: torch.Tensor, section: TrainingSection, tile: int
) -> list[float]:
    count = len(drawn)
    rows = [*drawn.anchors.rows.tolist(), *drawn.positives.tolist(), *drawn.negatives.tolist()]
    expected = []
    for i in range(count):
        mates = range(i // tile * tile, min(count, (i // tile + 1) * tile))
        candidates = [count + j for j in mates] + [2 * count + j for j in mates]
        own = torch.tensor([rows[i]])
        negatives = [j for j in candidates if bool(sampler.allows(own, torch.tensor([rows[j]])))]
        cosines = (embeddings @ embeddings[i]).tolist()
        if section.loss == "supcon":
            same = [j for j in candidates if bool(sampler.share_building(own, torch.tensor([rows[j]])))]
            positives = [j for j in same if rows[j] != rows[i]]
            total = torch.tensor([cosines[j] for j in negatives]).div(section.temperature).exp().sum()
            ratios = [torch.tensor(cosines[j] / section.temperature).exp() for j in positives]
            expected.append(sum(float(-torch.log(one / (one + total))) for one in ratios) / len(ratios))
        else:
            far = float((embeddings[i] - embeddings[count + i]).norm())
            near = min(float((embeddings[i] - embeddings[j]).norm()) for j in [*negatives, 2 * count + i])
            expected.append(max(0.0, far - near + section.margin))
    return expected


@pytest.mark.parametrize("settings", [{"hard_mining": True, "margin": 0.4}, {"loss": "supcon", "temperature": 0.3}])
@pytest.mark.parametrize("tile", [8, 1024])
def test_losses_equal_a_loop_over_all_images_of_the_tile(
    settings: dict[str, Any], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_batch, "TILE", tile)
    sampler, drawn, embeddings = draw(20)
    section = TrainingSection(**settings)
    losses = in_batch_losses(sampler, drawn, embeddings, section)
    assert losses.tolist() == pytest.approx(losses_by_loop(sampler, drawn, embeddings, section, tile), abs=1e-4)


def test_hard_mining_never_makes_a_triplet_easier() -> None:
    sampler, drawn, embeddings = draw(20)
    anchors, positives, negatives = embeddings.chunk(3)
    section = TrainingSection(margin=0.4)
    banded = in_batch.triplet_losses(anchors, positives, negatives, 0.4)
    mined = in_batch_losses(sampler, drawn, embeddings, section)
    assert (mined >= banded).all()
    assert (mined > banded).any()


def test_shared_negatives_and_the_contrastive_loss_are_refused_together() -> None:
    with pytest.raises(ValueError, match="share_within_building, loss: "):
        TrainingSection(share_within_building=True, loss="supcon")
    assert not TrainingSection(share_within_building=True).compares_in_batch
