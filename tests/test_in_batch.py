"""A batch's images as each other's negatives, against loops over all pairs."""

import pytest
import torch
from test_band_sampler import make_features, make_neighbors

from pipeline.config import TrainingSection
from train_specialized_embeddings.sampling.band_sampler import BandSampler
from train_specialized_embeddings.training import in_batch
from train_specialized_embeddings.training.in_batch import group_losses, mined_triplet_losses
from train_specialized_embeddings.training.losses import multi_similarity_losses, supervised_contrastive_losses

MIN_DISTANCE_M = 15.0


def normalise(count: int) -> torch.Tensor:
    rows = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(rows, dim=1)


def make_sampler() -> BandSampler:
    data = make_features(30)
    return BandSampler(data, make_neighbors(data), 3, MIN_DISTANCE_M)


def is_allowed(sampler: BandSampler, one: int, other: int) -> bool:
    return bool(sampler.allows(torch.tensor([one]), torch.tensor([other])))


def is_of_building(sampler: BandSampler, one: int, other: int) -> bool:
    return bool(sampler.share_building(torch.tensor([one]), torch.tensor([other])))


def test_all_pairs_at_once_are_what_each_pair_is() -> None:
    sampler = make_sampler()
    rows, others = torch.arange(0, 40, 3), torch.arange(60)
    is_positive, is_negative = sampler.compare(rows, others)
    for i, row in enumerate(rows.tolist()):
        for j, other in enumerate(others.tolist()):
            assert bool(is_negative[i, j]) == is_allowed(sampler, row, other)
            assert bool(is_positive[i, j]) == (row != other and is_of_building(sampler, row, other))


@pytest.mark.parametrize("loss", ["supcon", "multi_similarity"])
@pytest.mark.parametrize("tile", [8, 1024])
def test_group_losses_equal_those_of_all_images_of_the_tile(
    loss: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_batch, "TILE", tile)
    sampler, section = make_sampler(), TrainingSection(loss=loss, temperature=0.3)
    drawn = sampler.draw(sampler.draw_groups(20))
    firsts = drawn.anchors.firsts.tolist()
    assert [place for place, first in enumerate(drawn.anchors.starts.tolist()) if place == first] == firsts
    rows = [*drawn.anchors.rows.tolist(), *drawn.negatives[firsts].tolist()]
    embeddings = normalise(len(rows))
    count, expected = len(drawn), []
    for i in range(count):
        first = i // tile * tile
        candidates = [j for j in range(count) if first <= j < first + tile]
        candidates += [count + j for j, place in enumerate(firsts) if first <= place < first + tile]
        is_positive = [rows[j] != rows[i] and is_of_building(sampler, rows[i], rows[j]) for j in candidates]
        is_negative = [is_allowed(sampler, rows[i], rows[j]) for j in candidates]
        masks = torch.tensor([is_positive]), torch.tensor([is_negative])
        if loss == "supcon":
            one = supervised_contrastive_losses(embeddings[i : i + 1], embeddings[candidates], *masks, 0.3)
        else:
            one = multi_similarity_losses(embeddings[i : i + 1], embeddings[candidates], *masks)
        expected.append(float(one))
    assert group_losses(sampler, drawn, embeddings, section).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("tile", "distance"), [(8, "euclidean"), (1024, "euclidean"), (8, "cosine")])
def test_a_mined_triplets_negative_is_the_nearest_beyond_the_positive_or_the_banded_one(
    tile: int, distance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_batch, "TILE", tile)
    sampler = make_sampler()
    drawn = sampler.draw(sampler.draw_anchors(20))
    rows = [*drawn.anchors.rows.tolist(), *drawn.positives.tolist(), *drawn.negatives.tolist()]
    embeddings, expected = normalise(60), []
    for i in range(20):
        mates = range(i // tile * tile, min(20, (i // tile + 1) * tile))
        candidates = [20 + j for j in mates] + [40 + j for j in mates]
        distances = {j: float((embeddings[i] - embeddings[j]).norm()) for j in candidates}
        if distance == "cosine":
            distances = {j: 1 - float(embeddings[i] @ embeddings[j]) for j in candidates}
        far, banded = distances[20 + i], distances[40 + i]
        beyond = [distances[j] for j in candidates if is_allowed(sampler, rows[i], rows[j]) and distances[j] > far]
        expected.append(max(0.0, far - min([*beyond, banded]) + 0.4))
    section = TrainingSection(loss="triplet", margin=0.4, triplet_distance=distance)
    found = mined_triplet_losses(sampler, drawn, embeddings, section)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_shared_negatives_and_a_loss_of_whole_batches_are_refused_together() -> None:
    with pytest.raises(ValueError, match="share_within_building, loss: "):
        TrainingSection(share_within_building=True, loss="supcon")
    assert not TrainingSection(share_within_building=True, loss="triplet").compares_in_batch
