"""Save and load checkpoints of the projector: tensors and plain Python values, nothing that could run code."""

import io
import pickle
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import TrainingModelSection
from pipeline.errors import InputError, one_line
from pipeline.files import workspace
from pipeline.inference.devices import needing_memory
from pipeline.retrieval.bare_weights import StateDict, read_bare_weights
from pipeline.retrieval.projector import Projector

# Rows in one forward pass: large enough for any chip, 64 MiB at 4,096 dimensions.
BLOCK_ROWS = 4096
# Keys of the projector's weights in checkpoints without an architecture.
WEIGHT_KEYS = ("projector", "projector_state_dict", "model_state_dict", "state_dict", "model")
# Raised by torch.load for a file that is cut, empty, of another kind, or would run code.
_LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, IndexError, TypeError,
    pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the projector's architecture and weights, and how they were made."""

    path: Path
    architecture: dict[str, Any]  # the arguments of Projector
    projector: StateDict
    metrics: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)  # optimiser, sampler, random state, ...


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all; the same content gives the same bytes."""
    archive = io.BytesIO()  # torch would write a path's name into the file, and hide the OSError of a full disk
    torch.save(content, archive)
    with workspace.writing_to(path) as temporary:
        temporary.write_bytes(archive.getbuffer())


def load_checkpoint(
    path: Path, model_section: TrainingModelSection | None = None, *, input_dim: int | None = None
) -> Checkpoint:
    """Load a checkpoint on the CPU, inferring the architecture where it has none (the reference implementation's).

    `model_section` gives the widths asked for, and dropout and activation where weights alone are stored; `input_dim`
    is the width of the features, if known.
    Raises InputError if the file is missing, damaged, not a checkpoint, does not fit the projector, or has other
    widths.
    """
    section = model_section or TrainingModelSection()
    content = _load(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint: make it with stage 6")
    rest = dict(content)
    if isinstance(content.get("architecture"), dict) and isinstance(content.get("projector"), dict):
        architecture, weights = rest.pop("architecture"), rest.pop("projector")
    else:
        key = next((key for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), None)
        architecture, weights = read_bare_weights(path, rest.pop(key) if key else rest, section)
        rest = rest if key else {}
    parts = {
        key: found if isinstance(found := rest.pop(key, None), dict) else {}
        for key in ("metrics", "settings", "provenance")
    }
    checkpoint = Checkpoint(path, architecture, weights, rest=rest, **parts)
    build_projector(checkpoint)  # refuses weights that do not fit before any work is done
    _check_widths(checkpoint, model_section, input_dim)
    return checkpoint


def build_projector(checkpoint: Checkpoint) -> Projector:
    """Return the checkpoint's projector in evaluation mode, on the CPU.

    Raises InputError if weights and architecture do not fit, or a weight is not finite.
    """
    try:
        projector = Projector(**checkpoint.architecture)
        projector.load_state_dict(checkpoint.projector, strict=True)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{checkpoint.path}: weights and architecture do not fit ({one_line(error)[:300]}): make it with stage 6"
        ) from None
    for name, weight in projector.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"{checkpoint.path}: {name} holds numbers that are not finite: train again")
    return projector.eval()


def project(projector: Projector, embeddings: NDArray[np.float32], device: torch.device) -> NDArray[np.float32]:
    """Return the projector's output (N, output_dim) for backbone embeddings (N, D), in evaluation mode, in blocks.

    Moves the projector to the device. Raises DeviceMemoryError where that cannot hold it and a block.
    """
    was_training = projector.training
    projector.eval()
    with needing_memory("the projector and a block of images", "or set [infrastructure].device to cpu"):
        projector.to(device)
        with torch.inference_mode():
            blocks = [
                # A copy, because torch warns of rows that cannot be written to.
                projector(torch.from_numpy(np.array(embeddings[start : start + BLOCK_ROWS])).to(device)).cpu()
                for start in range(0, len(embeddings), BLOCK_ROWS)
            ]
    projector.train(was_training)
    return torch.cat(blocks).numpy()


def _load(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint: run stage 6 (train), or correct the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a foreign pickle, which is refused or checked below
            return torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        raise InputError(
            f"{path}: not a checkpoint that can be loaded safely ({one_line(error)[:200]}): remove it and train again"
        ) from None


def _check_widths(checkpoint: Checkpoint, section: TrainingModelSection | None, input_dim: int | None) -> None:
    found_in, found_out = checkpoint.architecture["input_dim"], checkpoint.architecture["output_dim"]
    if input_dim is not None and input_dim != found_in:
        raise InputError(
            f"{checkpoint.path}: its projector takes embeddings of {found_in} numbers, these have {input_dim}: "
            "use the backbone that it was trained on, or train again"
        )
    if section is None:
        return
    for key, found, asked in (
        ("input_dim", found_in, section.input_dim),
        ("output_dim", found_out, section.output_dim),
    ):
        if asked not in ("auto", found):
            raise InputError(
                f"{checkpoint.path}: its {key} is {found}, [training_model].{key} asks for {asked}: "
                "correct the setting, or train again"
            )
