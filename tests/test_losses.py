"""The loss against a loop over triplets, and where it has no slope."""

import math

import pytest
import torch

from train_specialized_embeddings.losses import pair_distances, relative_drift, triplet_losses


def random_unit_rows(seed: int, count: int = 7, width: int = 5) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


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
