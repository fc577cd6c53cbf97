"""Where training starts: a projector whose linear shortcut is a closed-form map and whose MLP branch adds nothing."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config import TrainingModelSection, TrainingSection
from pipeline.features import Features
from pipeline.log import logger
from pipeline.projector import Projector
from pipeline.whitening import SHRINKAGES, LinearMap, collect_scatter, fit_pca_whitening, whiten_within_class
from train_specialized_embeddings.validation import Scores, ValidationSet


@dataclass(frozen=True)
class Baselines:
    """The closed-form maps fitted on the training split, and how they and the raw embeddings fare in validation."""

    whitening: LinearMap
    pca: LinearMap
    shrinkage: float
    scores: dict[str, Scores]  # raw, pca_whitened, whitening


def fit_baselines(train: Features, validation: ValidationSet, output_dim: int, section: TrainingSection) -> Baselines:
    """Fit PCA-whitening and within-class whitening; the shrinkage is the best of SHRINKAGES by validation mAP."""
    pca = fit_pca_whitening(train.embeddings, output_dim)
    scatter = collect_scatter(train.embeddings, train.building_codes)
    wanted = section.whitening_shrinkage
    tried: dict[float, tuple[LinearMap, Scores]] = {}
    for shrinkage in SHRINKAGES if wanted == "auto" else (wanted,):
        whitening = whiten_within_class(scatter, output_dim, shrinkage)
        tried[shrinkage] = (whitening, validation.score(whitening.apply(validation.embeddings)))
    chosen = max(tried, key=lambda shrinkage: tried[shrinkage][1]["map"])
    logger.info(
        "within-class whitening: validation mAP by shrinkage %s; taken %g",
        ", ".join(f"{key:g}: {scores['map']:.4f}" for key, (_, scores) in tried.items()), chosen,
    )  # fmt: skip
    scores = {
        "raw": validation.score_raw(),
        "pca_whitened": validation.score(pca.apply(validation.embeddings)),
        "whitening": tried[chosen][1],
    }
    return Baselines(tried[chosen][0], pca, chosen, scores)


def make_projector(
    input_dim: int, baselines: Baselines, model: TrainingModelSection, section: TrainingSection
) -> Projector:
    """Return a new projector at the start that `[training].init` names; random weights come from torch's state."""
    projector = Projector(
        input_dim, model.output_dim, model.hidden_dim, model.num_hidden_layers, model.dropout, model.activation,
        section.input_dropout,
    )  # fmt: skip
    if section.init == "random":
        return projector
    start = baselines.whitening if section.init == "whitening" else _fill_up(baselines.pca, model.output_dim)
    weight, bias = torch.from_numpy(start.weight), torch.from_numpy(start.bias)
    with torch.no_grad():
        projector.shortcut.weight.copy_(weight)
        projector.shortcut.bias.copy_(bias)
        if len(projector.hidden):
            _start_branch(projector.hidden[0], weight, bias)
    return projector


def _fill_up(pca: LinearMap, output_dim: int) -> LinearMap:
    """Scale components of variance 1 to mean square norm 1, as the whitening's are, and add rows of zeros."""
    rank, width = pca.weight.shape
    weight, bias = np.zeros((output_dim, width), np.float32), np.zeros(output_dim, np.float32)
    weight[:rank], bias[:rank] = pca.weight / np.sqrt(rank), pca.bias / np.sqrt(rank)
    return LinearMap(weight, bias)


def _start_branch(layer: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Let the branch's first layer read random mixtures of the start's outputs.

    Their mean square norm is 1, so standard normal mixing gives every hidden unit inputs of variance 1, whatever
    the scale and the mean of the backbone's features.
    """
    mixing = torch.randn(layer.weight.shape[0], weight.shape[0])
    layer.weight.copy_(mixing @ weight)
    layer.bias.copy_(mixing @ bias)


def relative_scale(layer: nn.Module) -> float:
    """Return a layer's root mean square weight over that of torch's default initialisation, sqrt(1 / 3D).

    Adam moves every weight by about the learning rate; layers that read the backbone's features take this factor,
    so that a learning rate means the same for features of any scale.
    """
    weight: Any = layer.weight
    return float(weight.detach().double().pow(2).mean().sqrt() * (3 * weight.shape[1]) ** 0.5)
