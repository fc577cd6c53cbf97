"""Save and load checkpoints of the projector: tensors and plain Python values, nothing that could run code."""

import hashlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import workspace
from pipeline.config import TrainingModelSection
from pipeline.errors import InputError, one_line
from pipeline.files.identity import digest_file
from pipeline.files.tables import as_provenance
from pipeline.inference.devices import full_precision, needing_memory
from pipeline.log import logger
from pipeline.reference.weights import read_weights
from pipeline.retrieval.projector import Projector

StateDict = dict[str, torch.Tensor]

# Rows in one forward pass: large enough for any chip, 64 MiB at 4,096 dimensions.
BLOCK_ROWS = 4096
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

    def count_trained_on(self, building_ids: Iterable[str]) -> int | None:
        """Count the buildings that it was trained on; None where it does not name them."""
        trained_on = self.rest.get("trained_on")
        if not isinstance(trained_on, torch.Tensor):
            return None
        return int(torch.isin(hash_buildings(building_ids), trained_on).sum())


def hash_buildings(building_ids: Iterable[str]) -> torch.Tensor:
    """Return a hash (B,) of each building's id, int64: the entry `trained_on` of a checkpoint."""
    digests = b"".join(hashlib.blake2b(one.encode(), digest_size=8).digest() for one in building_ids)
    return torch.frombuffer(bytearray(digests), dtype=torch.int64) if digests else torch.empty(0, dtype=torch.int64)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all; the same content gives the same bytes."""
    archive = io.BytesIO()  # torch would write a path's name into the file, and hide the OSError of a full disk
    torch.save(content, archive)
    with workspace.writing_to(path) as temporary:
        temporary.write_bytes(archive.getbuffer())


def load_checkpoint(
    path: Path, section: TrainingModelSection | None = None, *, input_dim: int | None = None
) -> Checkpoint:
    """Load a checkpoint on the CPU, of this project or one that holds weights without an architecture.

    `section` gives the widths asked for, and dropout and activation where weights alone are stored; `input_dim` is the
    width of the features, if known. Raises InputError if the file is missing, damaged or not a checkpoint, its weights
    do not fit its architecture, or its widths are not those that are given.
    """
    content = read_content(path)
    _warn_of_another_run(path)
    if not isinstance(content.get("architecture"), dict):
        content = read_weights(path, content, section or TrainingModelSection())
    return make_checkpoint(path, content, section, input_dim)


def _warn_of_another_run(path: Path) -> None:
    """Warn where the folder's run did not write this file, or is not finished."""
    written = workspace.read_json_object(path.with_name("provenance.json")).get("outputs")
    if isinstance(written, dict) and path.name in written and written[path.name] != digest_file(path):
        logger.warning("%s: not the one that the training in its folder wrote: put that back", path)
    elif path.with_name(".checkpoint_latest.pt").exists():
        logger.warning("%s: of a training that has not finished: run stage 6 again to finish it", path)


def make_checkpoint(
    path: Path, content: dict[str, Any], section: TrainingModelSection | None = None, input_dim: int | None = None
) -> Checkpoint:
    """Return the checkpoint of a file's content; see `load_checkpoint`."""
    rest = {key: value for key, value in content.items() if key != "start" or isinstance(value, dict)}
    parts = {
        key: found if isinstance(found := rest.pop(key, None), dict) else {}
        for key in ("architecture", "projector", "metrics", "settings", "provenance")
    }
    parts["provenance"] = as_provenance(parts["provenance"]) or {}
    checkpoint = Checkpoint(path, **parts, rest=rest)
    # Weights that do not fit are refused before any work is done.
    checkpoint = replace(checkpoint, architecture=build_projector(checkpoint).architecture)
    found = checkpoint.architecture
    if input_dim not in (None, found["input_dim"]):
        raise InputError(
            f"{path}: its projector takes embeddings of {found['input_dim']} numbers, these have "
            f"{input_dim}: use the backbone that it was trained on, or train again"
        )
    for key in ("input_dim", "output_dim"):
        asked = getattr(section, key, "auto")
        if asked not in ("auto", found[key]):
            raise InputError(
                f"{path}: its {key} is {found[key]}, [training_model].{key} asks for {asked}: "
                "correct the setting, or train again"
            )
    return checkpoint


def build_projector(checkpoint: Checkpoint) -> Projector:
    """Return the checkpoint's projector in evaluation mode, on the CPU.

    Raises InputError if weights and architecture do not fit, or a weight is not finite.
    """
    architecture, weights = checkpoint.architecture, checkpoint.projector
    try:
        num_layers = architecture.get("num_hidden_layers", 1)
        if num_layers > len(weights):  # a number alone must not make layers
            raise ValueError(f"num_hidden_layers is {num_layers}, of {len(weights)} weights")
        if any(weight.is_complex() for weight in weights.values()):  # of which torch takes the real part
            raise ValueError("complex numbers")
        with torch.device("meta"):  # shapes are compared before memory is taken for them
            Projector(**architecture).load_state_dict(weights, strict=True, assign=True)
        if not (0 <= architecture.get("dropout", 0.0) < 1 and 0 < architecture.get("input_power", 1.0) < 100):
            raise ValueError("dropout or input_power is out of range")
        projector = Projector(**architecture)
        projector.load_state_dict(weights, strict=True)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{checkpoint.path}: weights and architecture do not fit ({one_line(error)[:300]}): make it with stage 6"
        ) from None
    for name, weight in projector.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"{checkpoint.path}: {name} holds numbers that are not finite: train again")
    return projector.eval()


def project(projector: Projector, embeddings: NDArray[np.float32], device: torch.device) -> NDArray[np.float32]:
    """Return the projector's output (N, output_dim) for backbone embeddings (N, D), in blocks.

    Puts the projector on the device and in evaluation mode. Raises DeviceMemoryError where that cannot hold it and a
    block.
    """
    with needing_memory("the projector and a block of images", "or set [infrastructure].device to cpu"):
        projector.eval().to(device)
        with torch.inference_mode(), full_precision():  # whatever the environment says: the shortcut centres
            blocks = [
                # A copy, because torch warns of rows that cannot be written to.
                projector(torch.from_numpy(np.array(embeddings[start : start + BLOCK_ROWS])).to(device)).cpu()
                for start in range(0, len(embeddings), BLOCK_ROWS)
            ]
    return torch.cat(blocks).numpy()


def read_content(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's file.

    Raises InputError if it is missing, damaged, holds no settings or code, or a tensor larger than the file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint: run stage 6 (train), or correct the path")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
                    raise ValueError("compressed: torch stores weights as they are")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle of another origin, which is refused or checked below
            content = torch.load(path, map_location="cpu", weights_only=True)
        if any(tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in _list_tensors(content)):
            raise ValueError("a tensor claims more numbers than are stored")
    except _LOAD_ERRORS as error:
        raise InputError(
            f"{path}: not a checkpoint that can be loaded safely ({one_line(error)[:200]}): remove it and train again"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint: make it with stage 6")
    return content


@contextmanager
def going_on_from(path: Path) -> Iterator[None]:
    """Raise InputError, naming a checkpoint, where it lacks what a run goes on from, or that has another shape."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path}: no run can go on from it ({type(error).__name__}: {one_line(error)[:200]}): take another, or "
            "begin anew"
        ) from None


def _list_tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _list_tensors(value)
