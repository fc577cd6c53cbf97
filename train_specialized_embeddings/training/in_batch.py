"""Let a batch's images be each other's negatives, beside the banded ones that were drawn for them."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from pipeline.config import TrainingSection
from train_specialized_embeddings.sampling.band_sampler import BandSampler, Triplets
from train_specialized_embeddings.training.losses import (
    multi_similarity_losses,
    semi_hard_negatives,
    supervised_contrastive_losses,
    triplet_losses,
)

# Anchors that are compared with each other's images at a time: a batch of 16,384 would need billions of cosines.
TILE = 1024


def group_losses(
    sampler: BandSampler, batch: Triplets, embeddings: torch.Tensor, section: TrainingSection
) -> torch.Tensor:
    """Return each anchor's loss (B,) among its tile's images, Multi-Similarity or supervised contrastive.

    `embeddings` are of the batch's anchors and of a banded negative for the first of each group.
    """
    lose: Callable[..., torch.Tensor] = multi_similarity_losses
    if section.loss == "supcon":
        lose = partial(supervised_contrastive_losses, temperature=section.temperature)
    anchors, negatives = embeddings.split([len(batch), len(embeddings) - len(batch)])
    firsts = batch.anchors.firsts
    losses = []
    for start in range(0, len(batch), TILE):
        part = slice(start, start + TILE)
        own = slice(*np.searchsorted(firsts, [start, start + TILE]).tolist())  # the negatives of this tile's groups
        lines = torch.from_numpy(firsts[own]).to(embeddings.device)
        others = torch.cat([batch.anchors.rows[part], batch.negatives[lines]])
        candidates = torch.cat([anchors[part], negatives[own]])
        is_positive, is_negative = sampler.compare(batch.anchors.rows[part], others)
        losses.append(lose(anchors[part], candidates, is_positive, is_negative))
    return torch.cat(losses)


def mined_triplet_losses(
    sampler: BandSampler, batch: Triplets, embeddings: torch.Tensor, section: TrainingSection
) -> torch.Tensor:
    """Return each anchor's triplet loss (B,) with a negative of its tile; `embeddings` (3B, D) are of the triplets.

    The negative is the nearest one that is farther than the positive (semi-hard; FaceNet), where that is nearer than
    the banded one: the nearest of all pull everything together until the embeddings collapse.
    """
    lose = partial(triplet_losses, margin=section.margin, distance=section.triplet_distance)
    anchors, positives, negatives = embeddings.chunk(3)
    losses = []
    for start in range(0, len(batch), TILE):
        part = slice(start, start + TILE)
        others = torch.cat([batch.positives[part], batch.negatives[part]])
        candidates = torch.cat([positives[part], negatives[part]])
        _, is_negative = sampler.compare(batch.anchors.rows[part], others)
        found, exists = semi_hard_negatives(anchors[part], positives[part], candidates, is_negative)
        mined = lose(anchors[part], positives[part], candidates[found])
        banded = lose(anchors[part], positives[part], negatives[part])
        losses.append(torch.where(exists, torch.maximum(mined, banded), banded))
    return torch.cat(losses)
