"""Let a batch's images be each other's negatives, beside the banded ones that were drawn for them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.config import TrainingSection
from train_specialized_embeddings.sampling.band_sampler import BandSampler, Triplets
from train_specialized_embeddings.training.losses import (
    hardest_negatives,
    supervised_contrastive_losses,
    triplet_losses,
)

# Anchors that are compared with each other's images at a time: a batch of 16,384 would need billions of cosines.
TILE = 1024


@dataclass(frozen=True)
class Tile:
    """Some of a batch's anchors (T, D), and the positives and negatives of all of them as candidates (2T, D)."""

    anchors: torch.Tensor
    candidates: torch.Tensor
    is_positive: torch.Tensor  # (T, 2T)
    is_negative: torch.Tensor  # (T, 2T) allowed as such

    @property
    def positives(self) -> torch.Tensor:
        """Each anchor's own positive, (T, D)."""
        return self.candidates[: len(self.anchors)]

    @property
    def negatives(self) -> torch.Tensor:
        """Each anchor's own banded negative, (T, D)."""
        return self.candidates[len(self.anchors) :]


def in_batch_losses(
    sampler: BandSampler, batch: Triplets, embeddings: torch.Tensor, section: TrainingSection
) -> torch.Tensor:
    """Return the loss of each anchor (B,) among its tile's images; `embeddings` (3B, D) are of the batch's triplets.

    Supervised contrastive, or the triplet with the nearer of the banded negative and the nearest one in the tile.
    """
    losses = [
        supervised_contrastive_losses(
            tile.anchors, tile.candidates, tile.is_positive, tile.is_negative, section.temperature
        )
        if section.loss == "supcon"
        else _mine_hard(tile, section.margin)
        for tile in _cut_tiles(sampler, batch, embeddings)
    ]
    return torch.cat(losses)


def _mine_hard(tile: Tile, margin: float) -> torch.Tensor:
    found = hardest_negatives(tile.anchors, tile.candidates, tile.is_negative)
    mined = triplet_losses(tile.anchors, tile.positives, tile.candidates[found], margin)
    banded = triplet_losses(tile.anchors, tile.positives, tile.negatives, margin)
    return torch.where(tile.is_negative.any(dim=1), torch.maximum(mined, banded), banded)


def _cut_tiles(sampler: BandSampler, batch: Triplets, embeddings: torch.Tensor) -> Iterator[Tile]:
    anchors, positives, negatives = embeddings.chunk(3)
    for start in range(0, len(batch), TILE):
        part = slice(start, start + TILE)
        rows = batch.anchors.rows[part, None]
        others = torch.cat([batch.positives[part], batch.negatives[part]])[None]
        rows, others = torch.broadcast_tensors(rows, others)
        is_positive = sampler.share_building(rows, others) & (rows != others)
        candidates = torch.cat([positives[part], negatives[part]])
        yield Tile(anchors[part], candidates, is_positive, sampler.allows(rows, others))
