"""Every loss against loops, and where it has no slope."""

import math
import typing

import pytest
import torch

from pipeline.config import TrainingSection
from train_specialized_embeddings.training.losses import (
    LOSSES,
    Pairs,
    cosine_distances,
    make_loss,
    multi_similarity,
    pair_distances,
    supervised_contrastive,
    triplet,
)


def random_unit_rows(seed: int, count: int = 7, width: int = 5) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def make_pairs(
    anchors: torch.Tensor, candidates: torch.Tensor, is_positive: torch.Tensor, is_negative: torch.Tensor
) -> Pairs:
    return Pairs(anchors, candidates, is_positive, is_negative, torch.zeros(len(anchors), dtype=torch.int64))


def random_pairs() -> Pairs:
    """Return 7 anchors and 9 candidates: some pairs are neither, one anchor has no positive, one no negative."""
    drawn = torch.randint(0, 3, (7, 9), generator=torch.Generator().manual_seed(3))
    is_positive, is_negative = drawn == 0, drawn == 1
    is_positive[2], is_negative[4] = False, False
    return make_pairs(random_unit_rows(1), random_unit_rows(2, 9), is_positive, is_negative)


def test_every_word_of_the_configuration_is_a_loss() -> None:
    assert list(LOSSES) == list(typing.get_args(TrainingSection.model_fields["loss"].annotation))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("margin", [0.05, 1.0])
def test_triplet_losses_equal_a_loop_over_anchors_positives_and_negatives(margin: float, distance: str) -> None:
    pairs, expected = random_pairs(), []

    def measure(one: list[float], other: list[float]) -> float:
        if distance == "cosine":
            return 1 - sum(x * y for x, y in zip(one, other, strict=True))
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(one, other, strict=True)))

    was_beyond = set()
    for i, anchor in enumerate(pairs.anchors.tolist()):
        to = [measure(anchor, row) for row in pairs.candidates.tolist()]
        negatives, losses = [to[j] for j in range(9) if pairs.is_negative[i, j]], []
        for positive in [to[j] for j in range(9) if pairs.is_positive[i, j]]:
            beyond = [one for one in negatives if one > positive]
            was_beyond.add(bool(beyond))
            if negatives:
                losses.append(max(0.0, positive - (min(beyond) if beyond else max(negatives)) + margin))
        expected.append(sum(losses) / max(1, len(losses)))
    losses = triplet(pairs, TrainingSection(loss="triplet", margin=margin, triplet_distance=distance))
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    assert was_beyond == {True, False}


def test_a_far_negative_costs_nothing_and_a_near_one_the_difference() -> None:
    anchor, right, opposite = torch.tensor([[1.0, 0.0]]), [0.0, 1.0], [-1.0, 0.0]
    masks = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    for candidates, expected in (([right, opposite], 0.0), ([opposite, right], 2 - 2**0.5 + 0.2)):
        pairs = make_pairs(anchor, torch.tensor(candidates), *masks)
        assert triplet(pairs, TrainingSection(margin=0.2)).item() == pytest.approx(expected, abs=1e-6)


def test_a_degenerate_batch_of_equal_images_has_the_margin_as_loss_and_finite_gradients() -> None:
    rows = torch.ones(4, 3, requires_grad=True)
    mask = torch.tensor([[True, False]] * 4)
    losses = triplet(make_pairs(rows, torch.ones(2, 3), mask, ~mask), TrainingSection(margin=0.2))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.2] * 4)
    assert torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("word", LOSSES)
def test_an_empty_batch_has_no_losses(word: str) -> None:
    empty, mask = torch.empty(0, 3), torch.empty(0, 2, dtype=torch.bool)
    section = TrainingSection(loss=word)
    assert make_loss(section, 2, 3)(make_pairs(empty, torch.ones(2, 3), mask, mask)).shape == (0,)


def test_distances_of_equal_rows_are_zero_to_a_millionth_and_the_cosine_one_is_half_the_square() -> None:
    rows, others = random_unit_rows(4), random_unit_rows(5)
    assert pair_distances(rows, rows).max() <= 1e-6
    squares = pair_distances(rows, others).square() / 2
    assert cosine_distances(rows, others).tolist() == pytest.approx(squares.tolist(), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_supervised_contrastive_losses_equal_a_loop_over_pairs(temperature: float) -> None:
    pairs, expected = random_pairs(), []
    for i in range(7):
        cosines = [sum(x * y for x, y in zip(pairs.anchors[i].tolist(), row, strict=True))
                   for row in pairs.candidates.tolist()]  # fmt: skip
        negatives = [math.exp(cosines[j] / temperature) for j in range(9) if pairs.is_negative[i, j]]
        own = [math.exp(cosines[j] / temperature) for j in range(9) if pairs.is_positive[i, j]]
        expected.append(sum(-math.log(one / (one + sum(negatives))) for one in own) / max(1, len(own)))
    losses = supervised_contrastive(pairs, TrainingSection(loss="supcon", temperature=temperature))
    assert losses.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert losses[2] == losses[4] == 0


def test_a_contrastive_batch_of_equal_images_or_without_negatives_has_finite_gradients() -> None:
    for is_negative in (torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)):
        rows = torch.ones(3, 2, requires_grad=True)
        pairs = make_pairs(rows, torch.ones(4, 2), ~is_negative | True, is_negative)
        losses = supervised_contrastive(pairs, TrainingSection(temperature=0.01))
        losses.sum().backward()
        assert torch.isfinite(losses).all()
        assert torch.isfinite(rows.grad).all()


def test_multi_similarity_losses_equal_a_loop_over_pairs() -> None:
    pairs, expected = random_pairs(), []
    for i in range(7):
        cosines = [sum(x * y for x, y in zip(pairs.anchors[i].tolist(), row, strict=True))
                   for row in pairs.candidates.tolist()]  # fmt: skip
        near = sum(math.exp(-2 * (cosines[j] - 0.5)) for j in range(9) if pairs.is_positive[i, j])
        far = sum(math.exp(40 * (cosines[j] - 0.5)) for j in range(9) if pairs.is_negative[i, j])
        expected.append(math.log(1 + near) / 2 + math.log(1 + far) / 40)
    assert multi_similarity(pairs, TrainingSection()).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("value", [True, False])
def test_a_multi_similarity_batch_of_equal_images_or_without_pairs_has_finite_gradients(value: bool) -> None:
    rows = torch.ones(3, 2, requires_grad=True)
    mask = torch.full((3, 4), value)
    losses = multi_similarity(make_pairs(rows, torch.ones(4, 2), mask, mask), TrainingSection())
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(rows.grad).all()
    assert bool((losses == 0).all()) != value
