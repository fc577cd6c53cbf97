"""The losses of embeddings on the unit sphere, and the pull toward a start.

A loss takes embeddings and masks that say who is whose positive and negative, and returns one value an anchor; all of
it on the device. A classification loss would fit in beside them.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

# Below this squared distance the square root's slope would explode; it is 1e-6 of the sphere's radius.
MIN_SQUARED_DISTANCE = 1e-12
# Of Multi-Similarity: the paper's a = 2 and b = 40, and the cosine between a near and a far pair; docs/training.md has
# what others gave.
POSITIVE_SCALE, NEGATIVE_SCALE, BASE = 2.0, 40.0, 0.5


def pair_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distances (...) of rows (..., D)."""
    return (first - second).pow(2).sum(dim=-1).clamp_min(MIN_SQUARED_DISTANCE).sqrt()


def cosine_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine (...) of unit rows (..., D), which is half their squared Euclidean distance."""
    return 1.0 - (first * second).sum(dim=-1)


# By [training].triplet_distance.
DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "euclidean": pair_distances,
    "cosine": cosine_distances,
}


def triplet_losses(  # noqa: PLR0917
    anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, margin: float, distance: str = "euclidean"
) -> torch.Tensor:
    """Return max(0, d(anchor, positive) - d(anchor, negative) + margin) of each triplet, (B,).

    d is one of DISTANCES; "cosine" is FaceNet's squared distance, halved (Schroff et al. 2015), "euclidean" its root. A
    triplet is active where its loss is > 0.
    """
    measure = DISTANCES[distance]
    return torch.relu(measure(anchor, positive) - measure(anchor, negative) + margin)


def supervised_contrastive_losses(  # noqa: PLR0917
    anchors: torch.Tensor,
    candidates: torch.Tensor,
    is_positive: torch.Tensor,
    is_negative: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Return, of each anchor (B, D), the mean over its positives p of -log(e^(s_p/t) / (e^(s_p/t) + sum e^(s_n/t))).

    s are the cosines to the candidates (C, D), n the anchor's negatives; the masks are (B, C). Without a positive, or
    without a negative, it is 0. Source: Khosla et al. 2020, equation 2, the other positives left out of the
    denominator as in NT-Xent (Chen et al. 2020).
    """
    logits = (anchors @ candidates.T).float() / temperature  # (B, C)
    lowest = torch.finfo(logits.dtype).min  # minus infinity would make the slope of an anchor without negatives a NaN
    of_negatives = logits.masked_fill(~is_negative, lowest).logsumexp(dim=1, keepdim=True)
    losses = functional.softplus(of_negatives - logits) * is_positive
    return losses.sum(dim=1) / is_positive.sum(dim=1).clamp_min(1)


def multi_similarity_losses(
    anchors: torch.Tensor, candidates: torch.Tensor, is_positive: torch.Tensor, is_negative: torch.Tensor
) -> torch.Tensor:
    """Return, of each anchor (B, D), log(1 + sum e^(-a(s_p - l))) / a + log(1 + sum e^(b(s_n - l))) / b.

    s are the cosines to the candidates (C, D), p the anchor's positives, n its negatives; the masks are (B, C). A sum
    over none is 0. Source: Wang et al. 2019 (Multi-Similarity), equation 15, without its mining of pairs.
    """
    cosines = (anchors @ candidates.T).float() - BASE  # (B, C)
    lowest = torch.finfo(cosines.dtype).min  # minus infinity would make the slope of an anchor without pairs a NaN
    parts = ((is_positive, -POSITIVE_SCALE), (is_negative, NEGATIVE_SCALE))
    sums = [(scale * cosines).masked_fill(~mask, lowest).logsumexp(dim=1) for mask, scale in parts]
    return functional.softplus(sums[0]) / POSITIVE_SCALE + functional.softplus(sums[1]) / NEGATIVE_SCALE


def semi_hard_negatives(
    anchors: torch.Tensor, positives: torch.Tensor, candidates: torch.Tensor, is_negative: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each anchor (B, D) its nearest negative beyond its positive (B, D), (B,), and whether there is one.

    The candidates are (C, D), the mask (B, C). Source: Schroff et al. 2015 (FaceNet), section 3.2.
    """
    with torch.no_grad():
        cosines = anchors @ candidates.T
        beyond = is_negative & (cosines < (anchors * positives).sum(dim=1, keepdim=True))
        return cosines.masked_fill(~beyond, -2.0).argmax(dim=1), beyond.any(dim=1)


def relative_drift(weight: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return |weight - start|^2 / |start|^2, which is 1 where the weight has left its start by its own length."""
    return (weight - start).pow(2).sum() / start.pow(2).sum().clamp_min(torch.finfo(start.dtype).tiny)
