"""The settings that the tuning varies; the rest stays as configured. docs/tuning.md lists them."""

from dataclasses import dataclass
from typing import Any

from pipeline.config import Config


@dataclass(frozen=True)
class Dimension:
    """One setting: an interval (`log` for one that is searched by its logarithm), or words to choose from."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    words: tuple[Any, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether its numbers are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def holds(self, value: Any) -> bool:
        """Whether a configured value lies in it."""
        return value in self.words if self.words else self.low <= value <= self.high


# What the projector starts from (init, the whitening) is fitted once and shared by the trials, so that it is not here.
SPACE = {
    "training.loss": Dimension(words=("multi_similarity", "supcon")),
    "training.learning_rate": Dimension(1e-4, 1e-1, log=True),
    "training.shortcut_learning_rate": Dimension(1e-5, 1e-1, log=True),
    "training.weight_decay": Dimension(1e-6, 1e-1, log=True),
    "training.temperature": Dimension(0.02, 0.5, log=True),
    "training.input_noise": Dimension(0.0, 3.0),
    "training.warmup_epochs": Dimension(0.0, 3.0),
    "training.batch_size": Dimension(64, 16_384, log=True),
    "training.band_sampling": Dimension(words=("uniform", "ucb")),
    "training_model.hidden_dim": Dimension(128, 2048, log=True),
    "training_model.num_hidden_layers": Dimension(0, 2),
    "training_model.dropout": Dimension(0.0, 0.5),
}


def suggest(trial: Any) -> dict[str, Any]:
    """Let an Optuna trial choose a value for every setting."""
    values = {}
    for name, dimension in SPACE.items():
        if dimension.words:
            values[name] = trial.suggest_categorical(name, dimension.words)
        elif dimension.is_whole:
            values[name] = trial.suggest_int(name, dimension.low, dimension.high, log=dimension.log)
        else:
            values[name] = trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
    return values


def apply(config: Config, values: dict[str, Any]) -> Config:
    """Return the configuration with these values of settings, by `section.key`."""
    changed = {}
    for section in {name.partition(".")[0] for name in values}:
        keys = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(section + ".")}
        changed[section] = getattr(config, section).model_copy(update=keys)
    return config.model_copy(update=changed)


def configured(config: Config) -> dict[str, Any]:
    """Return the configured values that lie in the space."""
    values = {name: getattr(getattr(config, name.partition(".")[0]), name.partition(".")[2]) for name in SPACE}
    return {name: value for name, value in values.items() if SPACE[name].holds(value)}
