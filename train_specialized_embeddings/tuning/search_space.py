"""The settings that the tuning varies; the rest stays as configured. docs/tuning.md lists them."""

import operator
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.config import Config

# The start (init, the whitening) is fitted once and shared by the trials, so it is not here.
SPACE: dict[str, BaseDistribution] = {
    "training.loss": CategoricalDistribution(("multi_similarity", "supcon")),
    "training.learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
    "training.shortcut_learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "training.weight_decay": FloatDistribution(1e-6, 1e-1, log=True),
    "training.temperature": FloatDistribution(0.02, 0.5, log=True),
    "training.input_noise": FloatDistribution(0.0, 3.0),
    "training.warmup_epochs": FloatDistribution(0.0, 3.0),
    "training.band_sampling": CategoricalDistribution(("uniform", "ucb")),
    "training_model.hidden_dim": IntDistribution(128, 2048, log=True),
    "training_model.num_hidden_layers": IntDistribution(0, 2),
    "training_model.dropout": FloatDistribution(0.0, 0.5),
}


def apply(config: Config, values: dict[str, Any]) -> Config:
    """Return the configuration with these values of settings, by `section.key`."""
    for name, value in values.items():
        section, _, key = name.partition(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
    return config


def list_configured(config: Config) -> dict[str, Any]:
    """Return the configured values that lie in the space."""
    values = {name: operator.attrgetter(name)(config) for name in SPACE}
    return {name: value for name, value in values.items() if holds(name, value)}


def holds(name: str, value: Any) -> bool:
    """Tell whether a value of a setting lies in the space."""
    distribution: Any = SPACE[name]
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    kinds = int if isinstance(distribution, IntDistribution) else int | float
    return isinstance(value, kinds) and distribution.low <= value <= distribution.high
