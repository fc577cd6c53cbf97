"""Tell where embeddings have drawn together, or their norms have left those of the start."""

from typing import Any

import torch

# The share of the start's spread below which the embeddings are taken to have collapsed; the same of their norm before
# it is made 1, or that many times it: then steps of one size turn them too far, or not at all.
COLLAPSED_SHARE = 0.25


def is_collapsed(spread: float, norm: float, first_spread: float, first_norm: float) -> bool:
    """Whether embeddings have drawn together, or their norm before it is made 1 has left that of the first ones."""
    is_out = norm < COLLAPSED_SHARE * first_norm or norm > first_norm / COLLAPSED_SHARE
    return spread < COLLAPSED_SHARE * first_spread or is_out


def has_collapsed(record: dict[str, Any], start: dict[str, Any]) -> bool:
    """Whether an epoch's embeddings have collapsed, in training or in validation, beside those of the start."""
    shape = [row[key] for row in (record, start) for key in ("embedding_spread", "embedding_norm")]
    return bool(record["collapsed_in_training"]) or is_collapsed(*shape)


class ShapeSums:
    """Where images lie: summed up on the device, measured once a draw."""

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
        """Return 1 - |mean|^2 of the embeddings, the mean norm before they are normalised, and how many there were."""
        spread = 1.0 - float(self._mean.div(self._count).square().sum())
        return spread, float(self._norm / self._count), self._count
