"""Send an epoch's record to TensorBoard and Weights & Biases where `[logging]` asks for them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline import workspace
from pipeline.config import LoggingSection
from pipeline.errors import PipelineError
from pipeline.files.identity import hash_json
from train_specialized_embeddings.training.run_files import TENSORBOARD, WANDB


@contextmanager
def sending_metrics(
    section: LoggingSection, folder: Path, provenance: dict[str, Any]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that sends an epoch's record to the sinks that the configuration asks for; none by default.

    Each process makes their folders anew and is to send the whole history, so that they agree with metrics.jsonl.
    Raises PipelineError where a package is missing.
    """
    board, run, num_steps = None, None, 0
    with ExitStack() as stack:
        if section.tensorboard:
            require_package("tensorboard", "[logging].tensorboard", "set it to false")
            from torch.utils.tensorboard import SummaryWriter

            workspace.discard(folder / TENSORBOARD)
            workspace.make_folder(folder / TENSORBOARD)
            board = stack.enter_context(SummaryWriter(str(folder / TENSORBOARD)))
        if section.wandb != "off":
            require_package("wandb", "[logging].wandb", 'set it to "off"')
            import wandb

            workspace.discard(folder / WANDB)
            workspace.make_folder(folder / WANDB)
            # A resumed run has the same inputs and settings, so it keeps its name.
            run = wandb.init(
                project=section.wandb_project, name=section.wandb_run_name, dir=folder / WANDB, mode=section.wandb,
                id=hash_json(provenance), resume="allow", group=provenance["stage"],
                config=provenance["settings"] | {"split_hash": provenance["split_hash"]},
            )  # fmt: skip
            stack.callback(run.finish)

        def send(record: dict[str, Any]) -> None:
            epoch, losses = record["epoch"], record.get("step_losses") or []
            numbers = flatten({key: value for key, value in record.items() if key != "step_losses"})
            nonlocal num_steps
            steps = list(enumerate(losses, num_steps + 1))
            num_steps += len(losses) or min(epoch, 1)  # a killed run may go on without them
            if board is not None:
                for name, number in numbers.items():
                    board.add_scalar(name, number, epoch)
                for step, loss in steps:
                    board.add_scalar("step_loss", loss, step)
                board.flush()
            if run is not None:
                for step, loss in steps:
                    run.log({"step_loss": loss}, step=step)
                run.log(numbers, step=num_steps)

        yield send


def require_package(name: str, where: str, otherwise: str, extra: str | None = None) -> None:
    """Raise PipelineError, naming the extra that brings it, where an optional package is not installed."""
    if find_spec(name) is None:
        raise PipelineError(
            f"{where}: the package {name} is not installed: pip install "
            f"'spatial-building-embeddings[{extra or name}]', or {otherwise}"
        )


def flatten(value: Any, name: str = "") -> dict[str, float]:
    """Return the numbers in nested dictionaries and lists, named by their paths like `val/map`."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {} if value is None or isinstance(value, str) else {name: float(value)}
    parts = (flatten(item, f"{name}/{key}" if name else str(key)) for key, item in value.items())
    return {path: number for part in parts for path, number in part.items()}
