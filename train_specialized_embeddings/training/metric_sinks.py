"""Where an epoch's record goes beside metrics.jsonl: TensorBoard and Weights & Biases, if `[logging]` asks for them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import LoggingSection
from pipeline.errors import PipelineError
from pipeline.files import tables
from pipeline.files.workspace import discard
from train_specialized_embeddings.training.run_files import TENSORBOARD, WANDB


class Sink(Protocol):
    """What takes the numbers of an epoch, by names like `val/map`."""

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        """Take in one epoch."""

    def close(self) -> None:
        """Send or write what is left."""


class MetricSinks:
    """All sinks that the configuration asks for; none by default.

    Their folders are made anew by each process, which gives them the whole history: they agree with metrics.jsonl.
    Raises PipelineError where a package is missing.
    """

    def __init__(self, section: LoggingSection, folder: Path, provenance: dict[str, Any]) -> None:
        self._sinks: list[Sink] = []
        if section.tensorboard:
            require_package("tensorboard", "[logging].tensorboard", "set it to false")
            self._sinks.append(_TensorBoard(folder / TENSORBOARD))
        if section.wandb != "off":
            require_package("wandb", "[logging].wandb", 'set it to "off"')
            self._sinks.append(_WeightsAndBiases(folder / WANDB, section, provenance))

    def write(self, record: dict[str, Any]) -> None:
        """Give every sink the numbers of an epoch's record."""
        for sink in self._sinks:
            sink.write(record["epoch"], flatten(record))

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def require_package(name: str, where: str, otherwise: str, extra: str | None = None) -> None:
    """Raise PipelineError, naming the extra that brings it, where an optional package is not installed."""
    if find_spec(name) is None:
        raise PipelineError(
            f"{where}: the package {name} is not installed: pip install "
            f"'spatial-building-embeddings[{extra or name}]', or {otherwise}"
        )


def flatten(value: Any, name: str = "") -> dict[str, float]:
    """Return the numbers of nested dictionaries and lists by their paths; what is no number is left out."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {} if value is None or isinstance(value, str) else {name: float(value)}
    flat: dict[str, float] = {}
    for key, item in items:
        flat |= flatten(item, f"{name}/{key}" if name else key)
    return flat


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        discard(folder)
        self._writer = SummaryWriter(str(folder))

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, section: LoggingSection, provenance: dict[str, Any]) -> None:
        import wandb

        discard(folder)
        folder.mkdir(parents=True)
        # The same inputs and settings are the same run, so that a resumed one goes on under its own name.
        self._run = wandb.init(
            project=section.wandb_project, name=section.wandb_run_name, dir=folder, mode=section.wandb,
            id=tables.hash_json(provenance), resume="allow", config=provenance["settings"],
        )  # fmt: skip

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=epoch)

    def close(self) -> None:
        self._run.finish()
