"""Where training starts: a projector whose linear shortcut is a closed-form map and whose MLP branch adds nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config import TrainingModelSection, TrainingSection
from pipeline.log import logger
from pipeline.retrieval.features import Features
from pipeline.retrieval.projector import Projector
from pipeline.retrieval.scores import QueryScores, summarize_scores
from pipeline.retrieval.whitening import (
    INPUT_POWER,
    SHARPENED_SHRINKAGES,
    SHRINKAGES,
    LinearMap,
    Scatter,
    collect_scatters,
    sharpen_whitening,
    whiten_by_pca,
    whiten_within_class,
)
from train_specialized_embeddings.training.validation import Scores, ValidationSet


@dataclass(frozen=True)
class Fitted:
    """A closed-form map, and how each validation query fares with it."""

    linear_map: LinearMap
    scores: QueryScores

    @property
    def mean(self) -> float:
        """Its mAP."""
        return float(self.scores.average_precision.mean())


@dataclass(frozen=True)
class Baselines:
    """The closed-form maps fitted on the training split, and how they and the raw embeddings fare in validation."""

    start: LinearMap | None  # what [training].init names, None for random weights
    note: dict[str, Any]  # how the start and the whitening came about, for the checkpoint
    scores: dict[str, Scores]  # raw, pca_whitened, whitening


def fit_baselines(
    train: Features,
    validation: ValidationSet,
    model: TrainingModelSection,
    section: TrainingSection,
    device: torch.device | None = None,
) -> Baselines:
    """Fit PCA-whitening, within-class whitening (the shrinkage that validates best) and what training starts from."""
    output_dim = model.output_dim
    powers = (1.0, INPUT_POWER) if section.init == "sharpened" else (1.0,)
    scatter, *powered = collect_scatters(train.embeddings, train.building_codes, powers, device)
    pca = whiten_by_pca(scatter, output_dim)
    tried = _try(whiten_within_class, scatter, validation, output_dim, _list_shrinkages(section, SHRINKAGES))
    shrinkage = max(tried, key=lambda key: tried[key].mean)
    whitening = tried[shrinkage]
    scores = {
        "raw": validation.score_raw(),
        "pca_whitened": validation.score(pca.apply(validation.embeddings)),
        "whitening": summarize_scores(whitening.scores),
    }
    note: dict[str, Any] = {"init": section.init, "shrinkage": shrinkage}
    start: LinearMap | None = None
    if model.input_norm and section.init != "random":  # the start is fitted to what its layer will get
        scatter, *powered = collect_scatters(train.embeddings, train.building_codes, powers, device, input_norm=True)
        pca = whiten_by_pca(scatter, output_dim)
        tried = _try(whiten_within_class, scatter, validation, output_dim, _list_shrinkages(section, SHRINKAGES))
        note["shrinkage_after_norm"] = max(tried, key=lambda key: tried[key].mean)
        whitening = tried[note["shrinkage_after_norm"]]
    if section.init == "sharpened":
        shrinkages = _list_shrinkages(section, SHARPENED_SHRINKAGES)
        tried = _try(sharpen_whitening, powered[0], validation, output_dim, shrinkages)
        start, note["sharpened_shrinkage"] = _choose_start(tried, whitening, validation)
    elif section.init != "random":
        start = whitening.linear_map if section.init == "whitening" else _fill_up(pca, output_dim)
    return Baselines(start, note, scores)


def _list_shrinkages(section: TrainingSection, candidates: tuple[float, ...]) -> tuple[float, ...]:
    return candidates if section.whitening_shrinkage == "auto" else (section.whitening_shrinkage,)


def _try(
    fit: Callable[[Scatter, int, float], LinearMap],
    scatter: Scatter,
    validation: ValidationSet,
    output_dim: int,
    shrinkages: tuple[float, ...],
) -> dict[float, Fitted]:
    """Return the map of each shrinkage with its validation scores."""
    tried = {}
    for shrinkage in shrinkages:
        fitted = fit(scatter, output_dim, shrinkage)
        tried[shrinkage] = Fitted(fitted, validation.score_each(fitted.apply(validation.embeddings)))
    logger.info(
        "%s: validation mAP by shrinkage %s", fit.__name__,
        ", ".join(f"{key:g}: {one.mean:.4f}" for key, one in tried.items()),
    )  # fmt: skip
    return tried


def _choose_start(
    tried: dict[float, Fitted], whitening: Fitted, validation: ValidationSet
) -> tuple[LinearMap, float | None]:
    """Return the sharpened map of the largest shrinkage that validates as well as the best one, and that shrinkage.

    As well means within a standard error, and the plain whitening is only taken where it is better by more than that:
    validation buildings are from where the training ones are, other places want more shrinkage (the one-standard-error
    rule; Breiman et al. 1984, section 3.4.3).
    """
    best = max(tried.values(), key=lambda one: one.mean)
    shrinkage = max(key for key, one in tried.items() if not validation.is_better(best.scores, one.scores))
    if validation.is_better(whitening.scores, tried[shrinkage].scores):
        logger.info("sharpened whitening validates worse than the plain one, from which training starts then")
        return whitening.linear_map, None
    return tried[shrinkage].linear_map, shrinkage


def make_projector(
    input_dim: int, baselines: Baselines, model: TrainingModelSection, section: TrainingSection
) -> Projector:
    """Return a new projector at the start; random weights come from torch's state."""
    start = baselines.start
    projector = Projector(
        input_dim, model.output_dim, model.hidden_dim, model.num_hidden_layers, model.dropout, model.activation,
        section.input_dropout, 1.0 if start is None else start.input_power, model.input_norm, model.hidden_dims,
    )  # fmt: skip
    if start is None:
        return projector
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
    return LinearMap(weight, bias, pca.input_power, pca.input_norm)


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
