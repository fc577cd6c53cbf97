"""Detect that embeddings have drawn together, or that their norms have left those of the start."""

from typing import Any

import torch

# Embeddings have collapsed where their spread is below this share of the start's, or their norm before normalisation
# is below this share of the start's or above its inverse: then steps of one size turn them too far, or not at all.
COLLAPSED_SHARE = 0.25


def is_collapsed(spread: float, norm: float, first_spread: float, first_norm: float) -> bool:
    """Compare the spread and the mean norm of embeddings with those of the start."""
    is_out = norm < COLLAPSED_SHARE * first_norm or norm > first_norm / COLLAPSED_SHARE
    return spread < COLLAPSED_SHARE * first_spread or is_out


def has_collapsed(record: dict[str, Any], start: dict[str, Any]) -> bool:
    """Tell whether an epoch's embeddings have collapsed, in training or in validation."""
    shape = [row[key] for row in (record, start) for key in ("embedding_spread", "embedding_norm")]
    return bool(record["collapsed_in_training"]) or is_collapsed(*shape)


class ShapeSums:
    """Sums over a draw's images, kept on the device and read once."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._mean = torch.zeros(width, device=device)
        self._norm = torch.zeros((), device=device)
        self._count = 0

    def add(self, outputs: torch.Tensor, embeddings: torch.Tensor) -> None:
        """Add images (B, D) before and after they are normalised."""
        self._mean += embeddings.sum(dim=0)
        self._norm += outputs.norm(dim=1).sum()
        self._count += len(outputs)

    def measure(self) -> tuple[float, float, int]:
        """Return 1 - |mean|^2 of the embeddings, the mean norm before normalisation, and the number of images."""
        spread = 1.0 - float(self._mean.div(self._count).square().sum())
        return spread, float(self._norm / self._count), self._count
