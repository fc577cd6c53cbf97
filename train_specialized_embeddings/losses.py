"""The triplet loss on the unit sphere, and the pull toward a start."""

import torch

# Below this squared distance the square root's slope would explode; it is 1e-6 of the sphere's radius.
MIN_SQUARED_DISTANCE = 1e-12


def pair_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distances (B,) of rows (B, D)."""
    return (first - second).pow(2).sum(dim=1).clamp_min(MIN_SQUARED_DISTANCE).sqrt()


def triplet_losses(anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, margin: float) -> torch.Tensor:
    """Return max(0, d(anchor, positive) - d(anchor, negative) + margin) of each triplet, (B,).

    Source: Schroff et al. 2015 (FaceNet), with the distance instead of its square. A triplet is active where it is > 0.
    """
    return torch.relu(pair_distances(anchor, positive) - pair_distances(anchor, negative) + margin)


def relative_drift(weight: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return |weight - start|^2 / |start|^2, which is 1 where the weight has left its start by its own length."""
    return (weight - start).pow(2).sum() / start.pow(2).sum().clamp_min(torch.finfo(start.dtype).tiny)
