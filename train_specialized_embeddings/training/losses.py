"""The losses of embeddings on the unit sphere.

A loss is a function of the pairs of a batch that returns one value for each anchor, and a word of `[training].loss`.
A loss with parameters of its own (a proxy for each building, say) is a class of torch.nn.Module, made with the number
of buildings, the embeddings' width and the settings; its parameters are trained and saved with the projector's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from pipeline.config import TrainingSection

# Below this squared distance the square root's slope would explode; it is 1e-6 of the sphere's radius.
MIN_SQUARED_DISTANCE = 1e-12
# Of Multi-Similarity: the paper's a = 2 and b = 40, and the cosine between a near and a far pair.
POSITIVE_SCALE, NEGATIVE_SCALE, BASE = 2.0, 40.0, 0.5


@dataclass(frozen=True)
class Pairs:
    """The images that a step compares."""

    anchors: torch.Tensor  # (B, D) of unit length
    candidates: torch.Tensor  # (C, D) of unit length: the anchors themselves, and the banded negatives
    is_positive: torch.Tensor  # (B, C) another image of the anchor's building
    is_negative: torch.Tensor  # (B, C) an image that may be the anchor's negative
    buildings: torch.Tensor  # (B,) int64, the number of each anchor's building


def pair_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distances (...) of rows (..., D)."""
    return (first - second).pow(2).sum(dim=-1).clamp_min(MIN_SQUARED_DISTANCE).sqrt()


def cosine_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine (...) of unit rows (..., D), which is half their squared Euclidean distance."""
    return 1.0 - (first * second).sum(dim=-1)


# By the words of [training].triplet_distance.
DISTANCES = {"euclidean": pair_distances, "cosine": cosine_distances}


def multi_similarity(pairs: Pairs, _: TrainingSection) -> torch.Tensor:
    """Return, for each anchor, log(1 + sum e^(-a(s_p - l))) / a + log(1 + sum e^(b(s_n - l))) / b, (B,).

    s are the cosines to the candidates, p the anchor's positives, n its negatives. A sum over none is 0. Source: Wang
    et al. 2019 (Multi-Similarity), equation 15, without its mining of pairs.
    """
    cosines = (pairs.anchors @ pairs.candidates.T).float() - BASE  # (B, C)
    lowest = torch.finfo(cosines.dtype).min  # minus infinity would make the slope of an anchor without pairs a NaN
    parts = ((pairs.is_positive, -POSITIVE_SCALE), (pairs.is_negative, NEGATIVE_SCALE))
    sums = [(scale * cosines).masked_fill(~mask, lowest).logsumexp(dim=1) for mask, scale in parts]
    return functional.softplus(sums[0]) / POSITIVE_SCALE + functional.softplus(sums[1]) / NEGATIVE_SCALE


def supervised_contrastive(pairs: Pairs, section: TrainingSection) -> torch.Tensor:
    """Return, for each anchor, the mean over its positives p of -log(e^(s_p/t) / (e^(s_p/t) + sum e^(s_n/t))), (B,).

    s are the cosines to the candidates, n the anchor's negatives. Without a positive, or without a negative, it is 0.
    Source: Khosla et al. 2020, equation 2, without the other positives in the denominator, as in NT-Xent (Chen et al.
    2020).
    """
    logits = (pairs.anchors @ pairs.candidates.T).float() / section.temperature  # (B, C)
    lowest = torch.finfo(logits.dtype).min  # not minus infinity: see multi_similarity
    of_negatives = logits.masked_fill(~pairs.is_negative, lowest).logsumexp(dim=1, keepdim=True)
    losses = functional.softplus(of_negatives - logits) * pairs.is_positive
    return losses.sum(dim=1) / pairs.is_positive.sum(dim=1).clamp_min(1)


def triplet(pairs: Pairs, section: TrainingSection) -> torch.Tensor:
    """Return, for each anchor a, the mean over its positives p of max(0, d(a, p) - d(a, n) + margin), (B,).

    d is one of DISTANCES. n is the semi-hard negative: the nearest one that is farther than p (Schroff et al. 2015,
    FaceNet, section 3.2), or the farthest one where none is. The nearest of all would pull everything together until
    the embeddings collapse.
    """
    cosines = (pairs.anchors @ pairs.candidates.T).detach()
    rows, positives = pairs.is_positive.nonzero(as_tuple=True)  # a triplet for each, (T,)
    of_negatives = cosines[rows].masked_fill(~pairs.is_negative[rows], -torch.inf)  # (T, C)
    beyond = of_negatives.masked_fill(of_negatives >= cosines[rows, positives, None], -torch.inf)
    farthest = of_negatives.masked_fill(of_negatives.isinf(), torch.inf).argmin(dim=1)
    negatives = torch.where(beyond.isfinite().any(dim=1), beyond.argmax(dim=1), farthest)
    anchors = pairs.anchors[rows]
    measure = DISTANCES[section.triplet_distance]
    to_positive, to_negative = (measure(anchors, pairs.candidates[other]) for other in (positives, negatives))
    losses = torch.relu(to_positive - to_negative + section.margin) * pairs.is_negative[rows].any(dim=1)
    return losses.new_zeros(len(pairs.anchors)).index_add(0, rows, losses) / pairs.is_positive.sum(dim=1).clamp_min(1)


class _Function(nn.Module):
    def __init__(self, function: Callable[[Pairs, TrainingSection], torch.Tensor], section: TrainingSection) -> None:
        super().__init__()
        self.function, self.section = function, section

    def forward(self, pairs: Pairs) -> torch.Tensor:
        return self.function(pairs, self.section)


# By the words of [training].loss.
LOSSES: dict[str, Callable[[Pairs, TrainingSection], torch.Tensor] | type[nn.Module]] = {
    "multi_similarity": multi_similarity,
    "supcon": supervised_contrastive,
    "triplet": triplet,
}


def make_loss(section: TrainingSection, num_buildings: int, width: int) -> nn.Module:
    """Return the loss that `[training].loss` names, as a module that maps pairs to one value an anchor."""
    chosen = LOSSES[section.loss]
    return chosen(num_buildings, width, section) if isinstance(chosen, type) else _Function(chosen, section)
