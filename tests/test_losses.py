"""The loss against a loop over triplets, and where it has no slope."""

import math

import pytest
import torch

from train_specialized_embeddings.training.losses import (
    cosine_distances,
    multi_similarity_losses,
    pair_distances,
    relative_drift,
    semi_hard_negatives,
    supervised_contrastive_losses,
    triplet_losses,
)


def random_unit_rows(seed: int, count: int = 7, width: int = 5) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_triplet_losses_by_cosine_equal_a_loop_over_triplets(margin: float) -> None:
    anchors, positives, negatives = (random_unit_rows(seed) for seed in (1, 2, 3))
    expected = []
    for a, p, n in zip(anchors.tolist(), positives.tolist(), negatives.tolist(), strict=True):
        to_positive, to_negative = (1 - sum(x * y for x, y in zip(a, other, strict=True)) for other in (p, n))
        expected.append(max(0.0, to_positive - to_negative + margin))
    assert triplet_losses(anchors, positives, negatives, margin, "cosine").tolist() == pytest.approx(expected, abs=1e-6)
    squares = pair_distances(anchors, positives).square() / 2
    assert cosine_distances(anchors, positives).tolist() == pytest.approx(squares.tolist(), abs=1e-6)


@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_triplet_losses_equal_a_loop_over_triplets(margin: float) -> None:
    anchors, positives, negatives = (random_unit_rows(seed) for seed in (1, 2, 3))
    expected = []
    for a, p, n in zip(anchors.tolist(), positives.tolist(), negatives.tolist(), strict=True):
        to_positive = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, p, strict=True)))
        to_negative = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, n, strict=True)))
        expected.append(max(0.0, to_positive - to_negative + margin))
    losses = triplet_losses(anchors, positives, negatives, margin)
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_far_negative_costs_nothing_and_a_near_one_the_difference() -> None:
    anchor, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    opposite = torch.tensor([[-1.0, 0.0]])
    assert triplet_losses(anchor, positive, opposite, 0.2).item() == 0.0
    assert triplet_losses(anchor, opposite, positive, 0.2).item() == pytest.approx(2 - 2**0.5 + 0.2, abs=1e-6)


def test_a_degenerate_batch_of_equal_images_has_the_margin_as_loss_and_finite_gradients() -> None:
    rows = torch.ones(4, 3, requires_grad=True)
    losses = triplet_losses(rows, rows, rows, 0.2)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.2] * 4)
    assert torch.isfinite(rows.grad).all()


def test_an_empty_batch_has_no_losses() -> None:
    empty = torch.empty(0, 3)
    assert triplet_losses(empty, empty, empty, 0.2).shape == (0,)


def test_distances_of_equal_rows_are_zero_to_a_millionth() -> None:
    rows = random_unit_rows(4)
    assert pair_distances(rows, rows).max() <= 1e-6


def test_drift_is_the_squared_way_from_the_start_in_units_of_its_length() -> None:
    start = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_drift(start, start).item() == 0.0
    assert relative_drift(torch.zeros(2, 2), start).item() == pytest.approx(1.0)
    moved = torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    assert relative_drift(moved, start).item() == pytest.approx((1 + 4) / 25)
    assert relative_drift(torch.zeros(2, 2), torch.zeros(2, 2)).item() == 0.0


# ------------------------------------------------------------------------------------------------ within a batch


def random_masks(seed: int, count: int, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return who is whose positive and whose negative; nobody is both, some are neither."""
    drawn = torch.randint(0, 3, (count, num_candidates), generator=torch.Generator().manual_seed(seed))
    return drawn == 0, drawn == 1


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_supervised_contrastive_losses_equal_a_loop_over_pairs(temperature: float) -> None:
    anchors, candidates = random_unit_rows(1), random_unit_rows(2, 9)
    is_positive, is_negative = random_masks(3, 7, 9)
    is_positive[2], is_negative[4] = False, False  # an anchor without a positive, and one without a negative
    expected = []
    for i in range(7):
        cosines = [sum(x * y for x, y in zip(anchors[i].tolist(), row, strict=True)) for row in candidates.tolist()]
        negatives = [math.exp(cosines[j] / temperature) for j in range(9) if is_negative[i, j]]
        own = [math.exp(cosines[j] / temperature) for j in range(9) if is_positive[i, j]]
        expected.append(sum(-math.log(one / (one + sum(negatives))) for one in own) / max(1, len(own)))
    losses = supervised_contrastive_losses(anchors, candidates, is_positive, is_negative, temperature)
    assert losses.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert losses[2] == losses[4] == 0


def test_a_contrastive_batch_of_equal_images_or_without_negatives_has_finite_gradients() -> None:
    for is_negative in (torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)):
        rows = torch.ones(3, 2, requires_grad=True)
        candidates = torch.ones(4, 2)
        losses = supervised_contrastive_losses(rows, candidates, ~is_negative | True, is_negative, 0.01)
        losses.sum().backward()
        assert torch.isfinite(losses).all()
        assert torch.isfinite(rows.grad).all()


def test_multi_similarity_losses_equal_a_loop_over_pairs() -> None:
    anchors, candidates = random_unit_rows(1), random_unit_rows(2, 9)
    is_positive, is_negative = random_masks(3, 7, 9)
    is_positive[2], is_negative[4] = False, False  # an anchor without a positive, and one without a negative
    expected = []
    for i in range(7):
        cosines = [sum(x * y for x, y in zip(anchors[i].tolist(), row, strict=True)) for row in candidates.tolist()]
        near = sum(math.exp(-2 * (cosines[j] - 0.5)) for j in range(9) if is_positive[i, j])
        far = sum(math.exp(40 * (cosines[j] - 0.5)) for j in range(9) if is_negative[i, j])
        expected.append(math.log(1 + near) / 2 + math.log(1 + far) / 40)
    losses = multi_similarity_losses(anchors, candidates, is_positive, is_negative)
    assert losses.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("value", [True, False])
def test_a_multi_similarity_batch_of_equal_images_or_without_pairs_has_finite_gradients(value: bool) -> None:
    rows = torch.ones(3, 2, requires_grad=True)
    mask = torch.full((3, 4), value)
    losses = multi_similarity_losses(rows, torch.ones(4, 2), mask, mask)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(rows.grad).all()
    assert bool((losses == 0).all()) != value


def test_the_semi_hard_negative_is_the_nearest_allowed_one_beyond_the_positive() -> None:
    anchors, positives, candidates = random_unit_rows(1), random_unit_rows(5), random_unit_rows(2, 9)
    positives[0] = -anchors[0]  # nothing is beyond it
    _, is_negative = random_masks(3, 7, 9)
    found, exists = semi_hard_negatives(anchors, positives, candidates, is_negative)
    for i in range(7):
        limit = float(anchors[i] @ positives[i])
        cosines = {j: float(anchors[i] @ candidates[j]) for j in range(9) if is_negative[i, j]}
        beyond = {j: cosine for j, cosine in cosines.items() if cosine < limit}
        assert bool(exists[i]) == bool(beyond)
        if beyond:
            assert int(found[i]) == max(beyond, key=beyond.__getitem__)
    assert not exists[0]
    assert exists.any()
