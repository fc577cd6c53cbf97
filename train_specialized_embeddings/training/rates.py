"""The learning rate of each layer, and how it changes during training."""

import math
from typing import Any

from torch import nn

from pipeline.config import TrainingSection
from pipeline.retrieval.projector import Projector


def rate_factor(step: int, num_steps: int, num_warmup: int) -> float:
    """Return the factor of the learning rates at a step, counted from 0: linear warm-up, then a half cosine."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def group_parameters(
    projector: Projector, loss: nn.Module, section: TrainingSection, share: float
) -> list[dict[str, Any]]:
    """Return the optimiser's groups of weights, with `share` of the configured rates at their peak.

    Adam moves every weight by about its rate, and an output by the sum over a layer's weights: a layer's rate is
    divided by the root of its inputs, so that one rate serves every width. The shortcut and the loss have no weight
    decay: it would only shrink vectors that are normalised.
    """
    layers: dict[str, tuple[Any, float]] = {"shortcut": (projector.shortcut, section.shortcut_learning_rate)}
    layers |= {f"hidden.{number}": (layer, section.learning_rate) for number, layer in enumerate(projector.hidden)}
    if projector.output is not None:
        layers["output"] = (projector.output, section.learning_rate)
    groups: list[dict[str, Any]] = []
    for name, (layer, rate) in layers.items():
        decay = 0.0 if name == "shortcut" else section.weight_decay
        peak = share * rate / layer.weight.shape[1] ** 0.5
        groups.append({"name": name, "params": list(layer.parameters()), "peak_lr": peak, "weight_decay": decay})
    if own := list(loss.parameters()):
        groups.append({"name": "loss", "params": own, "peak_lr": share * section.learning_rate, "weight_decay": 0.0})
    return groups
