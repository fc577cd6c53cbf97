"""Choose where models run."""

import torch

from pipeline.errors import PipelineError
from pipeline.log import logger


def choose_device(wanted: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` stands for on this machine.

    Raises PipelineError if `cuda` is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise PipelineError("device cuda: this machine has no usable GPU: set [infrastructure].device to auto or cpu")
    if wanted == "cpu" and available:
        logger.warning("a GPU is present but not used: the device is set to cpu")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def describe_device(device: torch.device) -> str:
    """Name the device for a log line."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
